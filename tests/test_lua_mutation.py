"""The last run of `lua_mutation.py` is about the rule as it is, each survivor is argued, and samples are right."""

import random

import pytest

from .lua_checks import CHECKS, Stage
from .lua_mutation import digest, explained, mutants, names_of, rule

SAMPLE = 40


@pytest.fixture(scope="module")
def stage():
    """A server for all that is tried here."""
    with Stage() as stage:
        yield stage


def test_the_last_mutation_run_is_about_these_scripts():
    """The rule is that in which faults were planted last."""
    assert explained()["digest"] == digest(), "run `python -m tests.lua_mutation rule`, and explain what survives"


def test_each_survivor_is_a_mutant_and_is_argued():
    """What survived is named as it is planted, once, and says why no check can tell."""
    rows = explained()["survivors"]
    names = names_of(rows)
    assert sorted(set(names)) == sorted(names)
    assert set(names) - {mutant.name for mutant in rule()} == set()
    assert [row["change"] for row in rows if len(row["why"].split()) < 5] == []


def test_mutants_are_many_and_each_is_another():
    """Every script has mutants, each with a name of its own, and each with a text of its own."""
    planted = list(mutants())
    assert len({mutant.name for mutant in planted}) == len(planted) >= 300
    assert len(rule()) >= 100
    assert len({mutant.text for mutant in planted}) == len(planted)
    assert {mutant.script for mutant in planted} == {"apply.lua", "hold.lua", "swap.lua", "trim.lua"}


def test_without_a_fault_every_check_passes(stage):
    """The scripts as they ship go through every check."""
    assert len(CHECKS) > 20
    assert stage.killer({}) is None


def test_a_sample_of_mutants_is_killed_or_explained(stage):
    """Of mutants that the digest chooses, each fails a check, but for those of which it is said that none can."""
    known = set(names_of(explained()["survivors"]))
    chance = random.Random(digest())  # noqa: S311 - a sample, no secret
    chosen = chance.sample(rule(), SAMPLE)
    survivors = {mutant.name for mutant in chosen if stage.killer({mutant.script: mutant.text}) is None}
    assert survivors == {mutant.name for mutant in chosen} & known
