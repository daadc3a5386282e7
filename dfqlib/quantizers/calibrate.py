"""Calibration: what a student takes from images, or from its own weights, before it is trained, and after."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dfqlib.bits import BitWidths
from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs, batch_norms
from dfqlib.quantizers.convert import Range, quantize_model
from dfqlib.quantizers.layers import QuantizedLayer, by_output_channel, observing
from dfqlib.quantizers.observers import least_squares_shares
from dfqlib.quantizers.round_weights import round_weights


def calibrated(
    network: nn.Module,
    bits: BitWidths,
    images: Tensor,
    observer: str = "minmax",
    input_range: Range | None = None,
    **options: Any,
) -> fx.GraphModule:
    """A quantized copy of ``network`` with activation ranges from one pass of ``images`` (B, C, H, W), normalised.

    Each layer sees the images as the layers before it, already quantized, pass them on; nothing is trained. Observers
    and ``options`` as in :func:`.convert.quantize_model`. Source: ZeroQ, section 3.

    With ``input_range`` the images are clipped to what pixels can be. Synthetic images are often beyond it, test images
    never; the papers do not clip, and their ranges, and so their numbers, are those without.
    """
    student = quantize_model(network, bits, observer, input_range=input_range, **options)
    _observe(student, _clipped(images, input_range))
    return student


@torch.no_grad()
def _observe(student: fx.GraphModule, images: Tensor) -> None:
    with observing(student):
        student(images)


def corrected(
    network: nn.Module,
    bits: BitWidths,
    images: Tensor,
    fit_weights: bool = False,
    input_range: Range | None = None,
    observe: Callable[[fx.GraphModule, Tensor], None] = _observe,
    **options: Any,
) -> fx.GraphModule:
    """:func:`calibrated` by least squared error, then :func:`correct_batch_norms` on the same images.

    With ``fit_weights`` also :func:`fit_weight_ranges`, before ``observe`` lets the activations be observed that they
    lead to: it pays at two bits and not always at more.
    """
    student = quantize_model(network, bits, "least_squares", input_range=input_range, **options)
    images = _clipped(images, input_range)
    if fit_weights:
        fit_weight_ranges(student)
    observe(student, images)
    correct_batch_norms(student, network, images)
    return student


def compensated(
    network: nn.Module, bits: BitWidths, images: Tensor, input_range: Range | None = None, **options: Any
) -> fx.GraphModule:
    """:func:`corrected` with ``fit_weights`` and :func:`.round_weights.round_weights` on the same images.

    For a student that is not trained: its weights are levels, and stay what they are.
    """
    return corrected(network, bits, images, True, input_range, round_weights, **options)


def _clipped(images: Tensor, input_range: Range | None) -> Tensor:
    return images.clamp(*(torch.as_tensor(end).to(images) for end in input_range)) if input_range else images


@torch.no_grad()
def fit_weight_ranges(student: nn.Module) -> None:
    """Give each output channel of every quantized layer the share of its min and max with the least squared error.

    The shares stay as they are while the weights train. Source: as :func:`.observers.least_squares_shares`.
    """
    for layer in student.modules():
        if isinstance(layer, QuantizedLayer) and layer.weight_bits is not None:
            rows = by_output_channel(layer, layer.weight).flatten(1)
            layer.share = least_squares_shares(rows, layer.weight_bits, layer.symmetric)


@torch.no_grad()
def correct_batch_norms(student: nn.Module, network: nn.Module, images: Tensor) -> None:
    """Move the running statistics of the ``student``'s batch norms by what quantization changes in their inputs.

    On one batch of ``images`` (B, 3, H, W), with m, v the means and variances that enter a batch norm of the student,
    m_T, v_T those of its ``network``, and mu, sigma^2 the network's running statistics:

        running mean <- mu + m - m_T        running variance <- sigma^2 min(10, max(0.1, v / v_T))

    layer by layer in execution order, so that each sees the corrected ones before it; one that runs several times moves
    by the mean over its calls. Source: the bias correction of
    Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV 2019, taken to mean and
    variance at the batch norm. Re-estimating the statistics outright (Sun et al., "Hybrid 8-bit floating point", 2019)
    would make them those of synthetic images. Without batch norms there is nothing to move.
    """
    if not (batch_norms(network) and batch_norms(student)):
        return
    with BatchNormInputs(network, lambda layer: (layer.name, (layer.norm, *layer.mean_var()))) as inputs:
        network(images)
        of_network = dict(inputs.layers)
    moves: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def move(layer: BatchNormInput) -> None:
        if layer.name not in of_network:
            return
        norm, (mean, variance), (original, mean_t, variance_t) = layer.norm, layer.mean_var(), of_network[layer.name]
        ratio = (variance + norm.eps) / (variance_t + norm.eps)  # a channel may be constant
        moves[norm].append((original.running_mean + mean - mean_t, original.running_var * ratio.clamp(0.1, 10)))
        for running, values in zip((norm.running_mean, norm.running_var), zip(*moves[norm], strict=True), strict=True):
            running.copy_(torch.stack(values).mean(0))

    with BatchNormInputs(student, move):
        student(images)
