"""The number format of convolutions and large products: float32, or bfloat16 where the hardware is good at it.

Everything else stays in float32: statistics of batch norms, quantization, losses, what networks return, optimizers.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dfqlib.device import pick_device

_used = "float32"


def resolve(precision: str, device: str | torch.device = "auto") -> str:
    """``precision``, or what ``"auto"`` is on ``device``: bfloat16 where it has units for that, else float32.

    UserError for a device that is not available.
    """
    if precision != "auto":
        return precision
    where = pick_device(device)
    if where.type == "cuda":
        good = torch.cuda.get_device_capability(where) >= (8, 0)
    else:
        good = where.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return "bfloat16" if good else "float32"


def use(precision: str, device: str | torch.device = "auto") -> str:
    """Have :func:`run` compute in ``precision`` from now on, in the whole process; what it is on ``device``."""
    global _used
    _used = resolve(precision, device)
    return _used


def used() -> str:
    """The precision in use."""
    return _used


def run(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
    """What ``function``, such as a network, makes of ``inputs`` in the precision in use; it comes out in float32.

    Within it activations stay in bfloat16 from layer to layer.
    """
    if _used == "float32":
        return function(*inputs, **options)
    # torch would keep its copy of a tensor that learns until the context ends, which may be after an optimizer's step.
    with torch.autocast(inputs[0].device.type, torch.bfloat16, cache_enabled=False):
        found = function(*inputs, **options)
    return tree_map_only(Tensor, full, found)


def full(x: Tensor) -> Tensor:
    """``x``, in float32 if it is in bfloat16: for what has to be exact within a network that :func:`run` runs."""
    return x.float() if x.dtype == torch.bfloat16 else x


if __name__ == "__main__":
    print(resolve("auto", sys.argv[1]))
