"""What every maker of images returns."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class SyntheticImages:
    """Images (N, 3, H, W), normalised; labels (N,), or (N, classes) where classes are mixed; None without labels.

    ``losses`` holds one list for each batch of images optimised on its own: the loss before each iteration.
    """

    images: Tensor
    labels: Tensor | None = None
    losses: list[list[float]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)
