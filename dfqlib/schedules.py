"""How learning rates fall."""

from __future__ import annotations

import math

from dfqlib.errors import check_choice

DECAYS = ("step", "late_step", "cosine", "constant")


def decay_factor(decay: str, progress: float) -> float:
    """What the learning rate is multiplied by at ``progress`` (0 to 1) of its run.

    ``"step"``: 0.1 at a quarter, a half and three quarters, which is epochs 100, 200, 300 of the published 400;
    ``"late_step"``: 0.1 at two fifths and at four fifths, which is epochs 20 and 40 of SaFT's 50;
    ``"cosine"``: half a cosine from 1 to 0, under a linear rise from 0.1 over the first tenth, without which the loss
    of students of many bits first rises; ``"constant"``: 1.
    """
    check_choice("decay", decay, DECAYS)
    if decay == "step":
        return 0.1 ** sum(progress >= quarter for quarter in (0.25, 0.5, 0.75))
    if decay == "late_step":
        return 0.1 ** sum(progress >= fifth for fifth in (0.4, 0.8))
    if decay == "cosine":
        return min(1, 0.1 + 9 * progress) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
