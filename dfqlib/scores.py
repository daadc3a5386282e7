"""Top-1 with its doubt: the standard error of finitely many images, and comparisons on the same images."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np


class Score(float):
    """Top-1 in per cent, with the images behind it: ``correct`` (N,) bool, and ``top5`` in per cent.

    NaN for a network that computes no finite logits or was given up; ``diverged`` then says why.
    """

    correct: np.ndarray
    top5: float
    diverged: str

    def __new__(cls, correct: Sequence[bool] | np.ndarray, top5: float = math.nan, diverged: str = "") -> Self:
        correct = np.asarray(correct, bool)
        score = super().__new__(cls, math.nan if diverged else 100 * int(correct.sum()) / len(correct))
        score.correct, score.top5, score.diverged = correct, top5, diverged
        return score

    def __getnewargs__(self) -> Any:  # for checkpoints, which hold no arrays
        return self.correct.tolist(), self.top5, self.diverged

    def __getstate__(self) -> None:
        return None

    @property
    def standard_error(self) -> float:
        """In points, of the top-1 on all images from which these were drawn: sqrt(p (100 - p) / N)."""
        return math.sqrt(self * (100 - self) / len(self.correct))


@dataclass(frozen=True)
class Difference:
    """The difference of two accuracies in points, with its standard error, on the same ``images`` images."""

    points: float
    standard_error: float
    images: int

    @property
    def low(self) -> float:
        """The lower end of the 95 % interval."""
        return self.points - 1.96 * self.standard_error

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval."""
        return self.points + 1.96 * self.standard_error

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.points):
            return "unknown: a network diverged"
        interval = f"95 % interval {self.low:+.2f} to {self.high:+.2f}"
        return f"{self.points:+.2f} points ({interval}, the same {self.images:,} images)"


def paired_difference(first: Score, second: Score) -> Difference:
    """``first`` minus ``second``, of two networks on the same images.

    Only the images on which one of them alone is right count: with b of them for the first, c for the second, of N, the
    difference is (b - c) / N and its standard error sqrt(b + c - (b - c)^2 / N) / N. ValueError for scores on different
    numbers of images. Source: McNemar (1947); the interval: Agresti, Categorical Data Analysis (2013), section 11.1.
    """
    count = len(first.correct)
    if math.isnan(first - second):
        return Difference(math.nan, math.nan, count)
    if count != len(second.correct):
        raise ValueError(f"scores on {count} and {len(second.correct)} images cannot be compared in pairs.")
    won, lost = int((first.correct & ~second.correct).sum()), int((second.correct & ~first.correct).sum())
    error = math.sqrt(won + lost - (won - lost) ** 2 / count) / count
    return Difference(100 * (won - lost) / count, 100 * error, count)


def pack(correct: np.ndarray) -> str:
    """``correct`` (N,) bool as text, eight images in a byte; ``unpack(text, N)`` reads it."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The ``correct`` (``count``,) bool of :func:`pack`."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)
