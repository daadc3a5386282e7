"""What every maker of images hands over."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SyntheticImages:
    """Images (N, 3, H, W), normalised; labels (N,), or (N, classes) where classes are mixed; None if nobody asked.

    ``losses`` holds the loss before each iteration, for each batch of images that was optimised on its own.
    """

    images: Tensor
    labels: Tensor | None = None
    losses: list[list[float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)
