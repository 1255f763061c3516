"""A job's summary: what is counted, printed and written, and that parts add up to the whole."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest

from serve.contract.confidence import Threshold
from serve.contract.errors import UserError
from serve.contract.looks import Look, Looks
from serve.contract.profile import ValidationProfile
from serve.outputs.layout import Row
from serve.shards import Job, Manifest
from serve.summary import JobSummary, error_kind, is_summary, summary_of

NAMES = ("cat", "dog")
USUAL = Look(480, 4 / 3, False)
THRESHOLD = Threshold(0.8, 1000, 900, 900, 80)
MANIFEST = Manifest(Job("m", "i", 5, {}), 0, 5, 2, "s", {}, transient=1)


def profile(side: int = 480) -> ValidationProfile:
    looks = Looks()
    for _ in range(100):
        looks.add(Look(side, 4 / 3, False))
    return ValidationProfile(THRESHOLD, {"cat": 500, "dog": 500}, {"cat": 510, "dog": 490}, looks)


def summary_of_rows(rows: Sequence[Row], known: ValidationProfile | None = None) -> JobSummary:
    summary = JobSummary(NAMES, known or profile(), {"model": "m.onnx", "max_errors": 0.5})
    for row in rows:
        summary.add(row)
    return summary


def answers(n: int, sure: float, look: Look = USUAL, cats: float = 0.5) -> list[Row]:
    """Of n rows, `sure` are of probability 0.9, the others of 0.7."""
    rows = []
    for i in range(n):
        probability = np.float32(0.9 if i < sure * n else 0.7)
        pair = (probability, 1 - probability) if i % 10 < 10 * cats else (1 - probability, probability)
        rows.append(Row(f"{i}.jpg", np.array(pair, np.float32), look=look))
    return rows


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        (
            ["claims 8000x80 pixels in 9 bytes", "claims 64x9 pixels in 7 bytes"],
            "claims NxN pixels in N bytes",
        ),
        (["is cut (12 bytes missing)"] * 2, "is cut (N bytes missing)"),
        (["[Errno 2] No such file: '/data/a b/1.jpg'", "[Errno 2] No such file: '/x/it\\'s.jpg'"], None),
        (["s3://bucket/a/1.jpg: Access Denied", "https://me:secret@host/2.jpg: Access Denied"], None),
        (["/data/one/two.jpg: no data", "other/three.png: no data"], None),
        (["<BytesIO object at 0x7f0a12> is broken", "<BytesIO object at 0x7fffff> is broken"], None),
        (["pets/my cat 1.jpg is cut off", "pets/my dog.jpg is cut off"], "NAME is cut off"),
    ],
)
def test_errors_of_one_kind_are_counted_together(errors: list[str], kind: str | None) -> None:
    names = ["pets/my cat 1.jpg", "pets/my dog.jpg"]
    kinds = {error_kind(error, name) for error, name in zip(errors, names, strict=True)}
    assert len(kinds) == 1
    assert kind in (None, *kinds)
    assert "secret" not in kinds.pop()


def test_other_errors_stay_apart() -> None:
    errors = ("empty file (0 bytes)", "not a regular file", "truncated", "a/b: truncated")
    assert len({error_kind(error) for error in errors}) == 4


def test_the_commonest_errors_are_printed_with_counts() -> None:
    rows = [Row(f"{i}", error=f"error {'abcdefgh'[i % 8]} of {i}") for i in range(80)]
    rows += [Row("x", error="error h of 3")] * 5
    lines = list(summary_of_rows(rows).lines())
    assert lines[0] == "15 errors: error h of N"
    assert len(lines) == 6
    assert lines[-1] == "30 errors of 3 further kinds"


def test_parts_add_up_to_the_whole_by_way_of_json() -> None:
    rows = answers(300, 0.9) + [Row("x", error="no 1"), Row("y", error="no 2", transient=True)]
    whole, joined = summary_of_rows(rows), JobSummary()
    for first in range(0, len(rows), 77):
        part = summary_of_rows(rows[first : first + 77])
        joined.join(JobSummary.from_dict(json.loads(part.to_json())))
    assert joined.to_dict() == whole.to_dict()
    values = whole.to_dict()
    assert (values["rows"], values["errors"], values["transient_errors"]) == (302, 2, 1)
    assert values["errors_by_kind"] == {"no N": 2}
    assert values["predicted"] == {"cat": 150, "dog": 150}
    assert values["above_threshold"] == 270
    assert values["estimated_accuracy"]["accuracy"] == pytest.approx(0.9)
    assert values["validation_accuracy"] == 0.9
    assert values["validation"]["class_counts"] == {"cat": 500, "dog": 500}
    assert (values["model"], values["max_errors"]) == ("m.onnx", 0.5)


def test_answers_that_are_less_sure_cause_a_warning_and_others_none() -> None:
    alike, unsure = summary_of_rows(answers(1000, 0.9)), summary_of_rows(answers(1000, 0.7))
    assert not any(line.startswith("warning") for line in alike.lines())
    assert alike.differences() == []
    lines = list(unsure.lines())
    assert "0.700" in lines[0]
    assert "0.900" in lines[0]
    assert any(line.startswith("warning") for line in lines)


def test_images_that_look_different_are_described() -> None:
    found = summary_of_rows(answers(500, 0.9, Look(64, 4 / 3, True), cats=0.1)).differences()
    assert len(found) == 3
    assert all(a in b for a, b in zip(("short side 6", "grey 100% (0%)", "10% (51%)"), found, strict=True))


def test_a_class_that_validation_never_predicted_is_named() -> None:
    summary = summary_of_rows(answers(500, 0.9))
    summary.predicted = Counter({"bird": 500})
    assert any("'bird' 100% (0%)" in line for line in summary.differences())


@pytest.mark.parametrize(
    "known",
    [replace(profile(), threshold=None), None],
    ids=["a provider that was not verified", "a model of an earlier version"],
)
def test_without_a_threshold_there_is_no_estimate(known: ValidationProfile | None) -> None:
    summary = JobSummary(NAMES, known)
    for row in answers(300, 0.9):
        summary.add(row)
    assert summary.estimate is None
    assert list(summary.lines()) == []
    values = json.loads(summary.to_json())
    assert (values["estimated_accuracy"], values["validation_accuracy"]) == (None, None)


def test_a_part_keeps_its_summary_and_a_damaged_one_is_an_error() -> None:
    kept = summary_of_rows(answers(3, 1.0)).to_dict()
    assert summary_of(replace(MANIFEST, summary=kept)).to_dict() == kept
    with pytest.raises(UserError, match="'validation'"):
        summary_of(MANIFEST)


def test_parts_on_a_provider_without_a_threshold_leave_no_estimate() -> None:
    without = summary_of_rows(answers(300, 0.9), replace(profile(), threshold=None))
    known = summary_of_rows(answers(300, 0.9))
    for parts in ((known, without), (without, known)):
        joined = JobSummary()
        for part in parts:
            joined.join(part)
        assert joined.scored == 600
        assert joined.estimate is None


def test_a_summary_may_replace_a_summary_alone() -> None:
    assert is_summary(BytesIO(summary_of_rows([]).to_json()))
    assert is_summary(BytesIO(b""))
    for other in (b"{}", b"path,label", b"[1]", b"\x89PNG"):
        assert not is_summary(BytesIO(other))
