"""Report of the images that a data set holds more than once: a table, and a figure of pairs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train.data.index import Data, groups_of
from train.evaluation.tables import write_table

MOST_PAIRS = 24


@dataclass(frozen=True)
class Duplicate:
    file: Path
    path: str
    label: str
    side: str  # train or val
    kind: str  # identical: another file of the group has the same bytes; near: none has
    similarity: float  # to the image in the group's centre, of the part that differs most


def list_duplicates(data: Data) -> list[list[Duplicate]]:
    """Return groups of images that show the same picture: contradictions first, then the least alike."""
    sets = [(side, s, groups_of(s, data.near)) for side, s in (("train", data.train), ("val", data.val))]
    sizes = Counter(group for _, _, groups in sets for group in groups)
    files = Counter([*data.train.sha256, *data.val.sha256])
    found: dict[str, list[Duplicate]] = {}
    for side, images, groups in sets:
        for i, group in enumerate(groups):
            if sizes[group] == 1:
                continue
            path, sha256 = images.paths[i], images.sha256[i]
            found.setdefault(group, []).append(
                Duplicate(
                    images.root / path,
                    path,
                    images.class_names[images.labels[i]],
                    side,
                    "identical" if files[sha256] > 1 else "near",
                    round(float(data.near[sha256].similarity), 3) if sha256 in data.near else 1.0,
                )
            )
    return sorted(
        found.values(), key=lambda rows: (not contradictory(rows), min(row.similarity for row in rows))
    )


def contradictory(rows: Sequence[Duplicate]) -> bool:
    return len({row.label for row in rows}) > 1


def save_duplicates(folder: Path, groups: Sequence[Sequence[Duplicate]]) -> None:
    """Write FOLDER/duplicates.csv and FOLDER/figures/duplicates.png, if there are any groups.

    Columns group, path, label, side, kind, similarity, contradiction.
    """
    if not groups:
        return
    table = [
        {
            "group": number,
            **{name: value for name, value in vars(row).items() if name != "file"},
            "contradiction": int(contradictory(rows)),
        }
        for number, rows in enumerate(groups, 1)
        for row in rows
    ]
    # --exclude reads it again, with names that are not UTF-8
    write_table(folder / "duplicates.csv", table, errors="surrogateescape")
    _draw(groups, folder / "figures" / "duplicates.png")


def _draw(groups: Sequence[Sequence[Duplicate]], path: Path) -> None:
    """Draw each group's centre beside the image that differs most, in its label if there is one."""
    # imported here: it takes half a second, which other data sets need not spend
    from train.evaluation.charts import save_figure
    from train.evaluation.figures import Picture, contact_sheet

    pictures = []
    for number, rows in enumerate(groups[:MOST_PAIRS], 1):
        centre = max(rows, key=lambda row: row.similarity)
        others = [row for row in rows if row is not centre]
        other = min(others, key=lambda row: (row.label == centre.label, row.similarity))
        for row in (centre, other):
            more = f" of {len(rows)}" if len(rows) > 2 else ""
            kind = f"{row.kind} {other.similarity:.2f}" if row.kind == "near" else row.kind
            name = row.path.rpartition("/")[2][:24]
            caption = f"{number}{more}: {name}\n{row.label}, {row.side}, {kind}"
            pictures.append(Picture(row.file, caption, contradictory(rows)))
    contradictions = sum(map(contradictory, groups))
    title = f"{len(groups)} groups of duplicates, {contradictions} with more than one label (red)"
    if len(groups) > MOST_PAIRS:
        title += f"; {MOST_PAIRS} are shown"
    save_figure(contact_sheet(title, pictures), path)
