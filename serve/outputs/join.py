"""Part files to one file, row by row, checked against their manifests on the way."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from serve.contract.errors import UserError
from serve.contract.files import file_sha256
from serve.inputs.inventory import digest_names
from serve.outputs.formats import FORMATS
from serve.outputs.layout import Joiner
from serve.shards import Manifest


def join(parts: Sequence[Path], manifests: Sequence[Manifest], file: IO[bytes]) -> str:
    """Copy the rows of all parts into `file`, and return the digest of their names.

    Raises:
        UserError: a part is not what its manifest describes, or its format cannot be joined.
    """
    name = manifests[0].job.settings.get("format")  # a piece may have any suffix
    form = FORMATS.get(str(name))
    if form is None or form.open_joiner is None:
        raise UserError(f"{parts[0]}: the format {name!r} cannot be joined")
    joiner = form.open_joiner(file)
    digest = digest_names(_copy(joiner, parts, manifests))
    joiner.close()
    return digest


def _copy(joiner: Joiner, parts: Sequence[Path], manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield the names of the rows that are copied."""
    for part, manifest in zip(parts, manifests, strict=True):
        if file_sha256(part) != manifest.sha256:
            raise UserError(f"{part} is not the file that its manifest describes: score it again")
        rows = 0
        for name in joiner.add(part):
            yield name
            rows += 1
        if rows != manifest.rows:
            raise UserError(f"{part} has {rows} rows, its manifest says {manifest.rows}: score it again")
