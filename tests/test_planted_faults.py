"""A planted fault replaces a text that its file has once, and names tests that exist."""

import pytest
from conftest import REPOSITORY

from benchmarks.planted_faults import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_every_fault_can_be_planted_and_has_tests(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert (REPOSITORY / fault.file).read_text().count(fault.old) == 1
    assert fault.tests()
