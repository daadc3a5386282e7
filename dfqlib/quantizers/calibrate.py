"""Set a student's activation ranges from one pass of images."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from dfqlib.bits import BitWidths
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.layers import observing


@torch.no_grad()
def calibrated(network: nn.Module, bits: BitWidths, images: Tensor, observer: str = "minmax") -> fx.GraphModule:
    """A quantized copy of ``network`` with the activation ranges of one pass of ``images`` (B, 3, H, W), normalised.

    Each layer sees what the layers before it, quantized already, make of the images. Bits and observer as in
    :func:`dfqlib.quantizers.convert.quantize_model`; nothing is trained. Source: ZeroQ, section 3.
    """
    student = quantize_model(network, bits, observer)
    with observing(student):
        student(images)
    return student
