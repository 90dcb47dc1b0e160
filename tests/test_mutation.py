"""The last mutation run is about the code as it is, and each survivor is argued."""

from tests.mutation import digest, explained, mutants


def test_the_last_mutation_run_is_about_this_code():
    """The rule, the windows and the classification are those in which faults were planted last."""
    assert explained()["digest"] == digest(), "run `python -m tests.mutation`, and explain what survives"


def test_each_survivor_is_a_mutant_and_is_argued():
    """What survived is named as it is planted, once, and says why no test can tell."""
    rows = explained()["survivors"]
    names = [row["mutant"] for row in rows]
    assert sorted(set(names)) == sorted(names)
    assert set(names) - {name for _, name, _ in mutants()} == set()
    assert [row["mutant"] for row in rows if len(row["why"].split()) < 5] == []
