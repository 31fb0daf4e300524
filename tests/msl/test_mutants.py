"""Every mutant is caught as it says, every kernel as it is has no findings; the list is printed with the results."""

from __future__ import annotations

import pytest

from tests.msl.findings import Kind
from tests.msl.mutants import Mutant, Subject, main, outcome, subjects

SUBJECTS = subjects()
FEWEST = 10
"""Mutants of a kernel."""


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.kernel)
def test_kernel_as_it_is(subject):
    got = outcome(subject)
    assert not got.kinds, got.text
    assert len({mutant.name for mutant in subject.mutants}) == len(subject.mutants) >= FEWEST


@pytest.mark.parametrize(
    ("subject", "mutant"),
    [pytest.param(s, m, id=f"{s.kernel}-{m.name}") for s in SUBJECTS for m in s.mutants],
)
def test_mutant_is_caught(subject, mutant, record_property):
    got = outcome(subject, mutant)
    kinds = ", ".join(sorted(kind.value for kind in got.kinds)) or "NOT CAUGHT"
    record_property("mutant", f"{subject.kernel}: {mutant.name}: {kinds}")
    assert mutant.caught in got.kinds, got


@pytest.fixture
def only(monkeypatch):
    """Makes a subject the only one."""
    return lambda subject: monkeypatch.setattr("tests.msl.mutants.subjects", lambda: [subject])


def example() -> Subject:
    return next(subject for subject in SUBJECTS if subject.kernel == "chosen_rms")


def test_text_that_is_not_there_or_there_twice():
    for old in ("no such text", "lane"):
        with pytest.raises(LookupError, match="times, not once"):
            outcome(example(), Mutant("stale", old, "", Kind.RACE))


def test_check_that_does_not_run_the_kernel():
    with pytest.raises(LookupError, match="does not run it"):
        outcome(Subject("chosen_rms", lambda: None, ()))


def test_table_tells_what_was_not_caught(only, capsys):
    harmless = Mutant("harmless", "float all = 0.0f;", "float all = 0.0f + 0.0f;", Kind.RACE)
    only(Subject("chosen_rms", example().check, (harmless,)))
    assert main([]) == 1
    assert "harmless: NOT CAUGHT (expected: race)" in capsys.readouterr().out
    caught = next(mutant for mutant in example().mutants if mutant.name == "no barrier")
    only(Subject("chosen_rms", example().check, (caught,)))
    assert main(["chosen_rms"]) == 0
    assert "no barrier: race" in capsys.readouterr().out
    assert main(["another"]) == 1
