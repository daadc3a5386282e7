"""What optimising images takes, measured on one image before it starts: the memory decides on the batch."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

MOST = 256  # images in a batch: more gain nothing
PEAK = 1.5  # memory at its highest, over what the backward pass needs of the forward pass
SHARE = 0.5  # of the free memory that a batch may take


class Cost(NamedTuple):
    """Batches of ``batch`` images; ``seconds`` for one step of one image; ``bytes`` of a batch, of those ``free``."""

    batch: int
    seconds: float
    bytes: int
    free: int


def measure(step: Callable[[int], Any], count: int, device: torch.device) -> Cost:
    """The cost of ``count`` images, of which ``step(n)`` does one step, with gradients, of n."""
    held: dict[int, int] = {}  # bytes by address, since a tensor may be kept several times

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept = []
    for images in (1, 2):  # the second also keeps the weights
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step(images)
        kept.append(sum(held.values()))
    each, free = max(1, int(PEAK * (kept[1] - kept[0]))), free_bytes(device)
    batch = max(1, min(count, MOST, int(SHARE * free / each)))
    batch = -(-count // -(-count // batch))  # of equal size
    began = time.perf_counter()
    step(batch)
    return Cost(batch, (time.perf_counter() - began) / batch, each * batch, free)


def free_bytes(device: torch.device) -> int:
    """Memory that this process can still have on ``device``, within the limits of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    from distributed.system import MEMORY_LIMIT  # here: it takes a second

    return int(min(psutil.virtual_memory().available, MEMORY_LIMIT - psutil.Process().memory_info().rss))
