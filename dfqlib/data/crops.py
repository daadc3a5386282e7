"""Random resized crops with flips, on whole batches of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


class RandomCrops:
    """Each image (of B, 3, H, W) cropped to a random part of its area, resized back, and half of the time mirrored.

    ``scale`` is the least and the largest part; the crop's sides are to each other as 3:4 to 4:3. Gradients pass. The
    random numbers are the object's own, drawn on the CPU and seeded with ``seed``: a run does not depend on who else
    draws.
    """

    def __init__(self, size: int, scale: tuple[float, float] = (0.5, 1.0), seed: int = 0) -> None:
        from torchvision.transforms import v2  # here: it takes seconds, which those without crops need not wait for

        self.transform = v2.Compose([v2.RandomResizedCrop(size, scale, antialias=True), v2.RandomHorizontalFlip()])
        self.state = torch.Generator().manual_seed(seed).get_state()

    def __call__(self, images: Tensor) -> Tensor:
        # torchvision draws from torch's global numbers, and one crop for a whole batch if it is given one.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            cropped = torch.stack([self.transform(image) for image in images])
            self.state = torch.get_rng_state()
        return cropped

    def state_dict(self) -> dict[str, Tensor]:
        """The random numbers to come."""
        return {"random": self.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the random numbers that :meth:`state_dict` gave."""
        self.state = state["random"]
