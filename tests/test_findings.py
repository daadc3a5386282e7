"""What a run shows, in sentences: which differences are clear, and what the intervals cover."""

from dfqlib.notebook.findings import findings, told_apart, with_interval
from dfqlib.notebook.run import Run
from dfqlib.scores import Score, paired_difference

EIGHTY = Score([True] * 80 + [False] * 20)


def test_differences_are_told_apart_by_their_intervals():
    better, same = Score([True] * 95 + [False] * 5), Score([True] * 79 + [False] * 20 + [True])
    given_up = Score([False] * 100, diverged="its loss is not finite")
    scores = {"a": better, "b": same, "c": given_up}
    told = told_apart({name: paired_difference(score, EIGHTY) for name, score in scores.items()})
    higher, unclear, diverged = told.split("; ")
    assert higher.startswith("clearly higher: a +15.00 (") and unclear.startswith("no clear difference: b +0.00 (")
    assert diverged == "diverged: c"
    assert told_apart({"d": paired_difference(EIGHTY, better)}).startswith("clearly lower: d -15.00 (")


def test_a_score_is_told_with_its_interval_or_as_diverged():
    assert with_interval(EIGHTY) == "80.00 % (95 % interval 72.16 to 87.84)"
    assert with_interval(Score([False], diverged="its loss is not finite")) == "diverged"


def test_findings_say_how_many_seeds_there_are_and_that_a_rehearsal_means_nothing():
    one = findings(Run("gdfq", {"profile": "quick", "seed": 0}), "First.", "", "Second.").data
    first, second, scope = one.splitlines()
    assert (first, second) == ("- First.", "- Second.") and "one seed" in scope and "nothing" not in scope
    assert "3 seeds" in findings(Run("compare", {"profile": "quick", "seed": 0, "repeats": 3})).data
    assert "mean nothing" in findings(Run("gdfq", {"profile": "smoke", "seed": 0})).data
