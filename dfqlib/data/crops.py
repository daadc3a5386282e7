"""Random resized crops with flips of batches of images."""

from collections.abc import Callable

import torch
from torch import Tensor


class RandomCrops:
    """Crops each image of (B, 3, H, W) to a random part of its area, resizes it to ``size`` and flips half of them.

    ``scale`` is the range of the part; the aspect ratio is 3:4 to 4:3. ``then`` is applied to the batch of crops, as
    SynQ's low-pass filter is. Gradients pass. The random numbers are the object's own, drawn on the CPU and seeded with
    ``seed``, so they do not depend on other draws.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.5, 1.0),
        seed: int = 0,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        from torchvision.transforms import v2  # here, as it takes seconds to import

        self.transform = v2.Compose([v2.RandomResizedCrop(size, scale, antialias=True), v2.RandomHorizontalFlip()])
        self.state, self.then = torch.Generator().manual_seed(seed).get_state(), then

    def __call__(self, images: Tensor) -> Tensor:
        # torchvision draws from torch's global generator, and would crop a whole batch alike.
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.state)
            cropped = torch.stack([self.transform(image) for image in images])
            self.state = torch.get_rng_state()
        return cropped if self.then is None else self.then(cropped)

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the random numbers."""
        return {"random": self.state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with the random numbers of :meth:`state_dict`."""
        self.state = state["random"]
