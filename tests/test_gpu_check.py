"""The check of a GPU survives lines that fail, and reports them; its lines themselves need minutes."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

from benchmarks.gpu_check import LINES

SCRIPT = REPOSITORY / "benchmarks" / "gpu_check.sh"


def check(tmp_path: Path, program: str, *arguments: str) -> tuple[int, list[str]]:
    """Run the script with this program in place of Python; return its exit code and the table's rows."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    interpreter.chmod(0o755)
    done = subprocess.run(
        [SCRIPT, "--lines", "versions nan", *arguments],
        env={"PYTHON": str(interpreter), "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, [
        line for line in done.stdout.splitlines() if re.match(r"\| (versions|nan)", line)
    ]


@pytest.mark.parametrize(
    ("program", "code", "result", "last"),
    [
        ("echo first; echo 7 %s of 100%", 0, "ok", "7 %s of 100%"),
        ("echo no GPU; exit 77", 0, "skipped", "no GPU"),
        ("echo Traceback; echo 'ValueError: a | b' >&2; exit 1", 1, "FAIL", "ValueError: a / b"),
        ("exit 1", 1, "FAIL", ""),
        ("echo slow; exit 124", 1, "FAIL", "slow"),
    ],
)
def test_a_line_that_fails_stops_no_other_and_has_its_last_line_in_the_table(
    program: str, code: int, result: str, last: str, tmp_path: Path
) -> None:
    exit_code, rows = check(tmp_path, program)
    assert exit_code == code
    assert [row.split(" | ")[:2] for row in rows] == [["| versions", result], ["| nan", result]]
    assert all(last in row for row in rows)


def test_each_line_has_a_time_limit_and_all_have_10_minutes() -> None:
    listed = re.search(r"^all='(.*)'$", SCRIPT.read_text(), re.MULTILINE)
    assert listed
    limits = dict(entry.split(":") for entry in listed[1].split())
    assert list(limits) == list(LINES)
    assert sum(map(int, limits.values())) == 570
