"""Set a student's activation ranges from one batch of images."""

import torch
from torch import Tensor, fx, nn

from dfqlib.bits import BitWidths
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.layers import observing


@torch.no_grad()
def calibrated(network: nn.Module, bits: BitWidths, images: Tensor, observer: str = "minmax") -> fx.GraphModule:
    """A quantized copy of ``network`` with activation ranges from one pass of ``images`` (B, 3, H, W), normalised.

    Each layer sees the images as the layers before it, already quantized, pass them on; nothing is trained. Observers
    as in :func:`dfqlib.quantizers.convert.quantize_model`. Source: ZeroQ, section 3.
    """
    student = quantize_model(network, bits, observer)
    with observing(student):
        student(images)
    return student
