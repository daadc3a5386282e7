"""What a run shows, as sentences made from its numbers: scores and their differences, with 95 % intervals."""

import math
from collections import defaultdict
from collections.abc import Mapping

from IPython.display import Markdown

from dfqlib.notebook.run import Run
from dfqlib.papers import profiles
from dfqlib.scores import Difference, Score


def with_interval(score: Score) -> str:
    """``"93.00 % (95 % interval 91.88 to 94.12)"``, over the choice of test images."""
    low, high = (min(max(score + sign * 1.96 * score.standard_error, 0), 100) for sign in (-1, 1))
    return "diverged" if score.diverged else f"{score:.2f} % (95 % interval {low:.2f} to {high:.2f})"


def told_apart(differences: Mapping[str, Difference]) -> str:
    """Which of the named differences are clearly above 0, which below, and which neither, as one clause."""
    groups = defaultdict(list)
    for name, found in differences.items():
        if math.isnan(found.points):
            groups["diverged"].append(name)
            continue
        verdict = f"clearly {'higher' if found.points > 0 else 'lower'}" if found.clear else "no clear difference"
        groups[verdict].append(f"{name} {found.points:+.2f} ({found.low:+.2f} to {found.high:+.2f})")
    return "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in groups.items())


def findings(run: Run, *sentences: str) -> Markdown:
    """The sentences as a Markdown list, and what their intervals cover; empty sentences are left out."""
    repeats = run.parameters.get("repeats", 1)
    images = f" on {len(run.data):,} images of {run.data.name}" if run.data is not None else ""
    scope = f"Measured with {'one seed' if repeats == 1 else f'{repeats} seeds'}{images}; "
    scope += "each 95 % interval covers the choice of test images, not that of the seed."
    if profiles.load()[0][run.parameters["profile"]].rehearsal:
        scope += " The profile smoke only tests that all cells run: its numbers mean nothing."
    return Markdown("\n".join(f"- {sentence}" for sentence in (*sentences, scope) if sentence))
