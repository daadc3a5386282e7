"""Accelerations, each of which can be turned off by name.

``$DFQ_WITHOUT``, a comma-separated list, turns some off for a whole process; :func:`without` for a few lines. The plain
computation is beside each use. Nothing here imports torch, so that planning can ask what is off.
"""

import contextlib
import functools
import os
from collections.abc import Iterator

from dfqlib.errors import check_choice

OFF_VARIABLE = "DFQ_WITHOUT"
ACCELERATIONS = {
    "channels_last": "images and weights are stored with the channels of a pixel next to each other",
    "folded_batch_norms": "synthesis runs a teacher whose batch norms are folded into its convolutions",
    "folded_upsampling": "nearest x2 with the 3x3 convolution after it is one transposed convolution",
    "fused_optimizers": "Adam and SGD take a step over all weights in one kernel",
    "fused_rounding": "fake quantization makes one new tensor, and its gradient none",
    "fused_statistics": "mean, variance and mean square, and their gradients, each take as few passes as they can",
    "scaled_weights": "a student's frozen batch norms scale its quantized weights instead of its activations",
}
_off: set[str] = set()


@functools.cache
def off_from_start() -> frozenset[str]:
    """What ``$DFQ_WITHOUT`` turns off; UserError for a name that is none of :data:`ACCELERATIONS`."""
    names = os.environ.get(OFF_VARIABLE, "").replace(",", " ").split()
    return frozenset(check_choice(OFF_VARIABLE, name, ACCELERATIONS) for name in names)


def uses(name: str) -> bool:
    """Whether the acceleration ``name`` is on."""
    return name not in _off and name not in off_from_start()


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Inside, these accelerations are off, in the whole process; UserError for an unknown name."""
    added = {check_choice("acceleration", name, ACCELERATIONS) for name in names} - _off
    _off.update(added)
    try:
        yield
    finally:
        _off.difference_update(added)
