"""Rounding with compensation: each weight of a row is rounded so that it makes up for the errors of those before it.

Frantar and Alistarh, "Optimal brain compression", NeurIPS 2022, in the blocks of GPTQ (Frantar et al., ICLR 2023). What
is kept is a layer's output on images, where rounding to nearest keeps its weights.
"""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.quantizers.layers import QuantizedLayer, integer_weight, observing

DAMPING = 0.05  # of the mean of H's diagonal, added to it: few images leave H without full rank
SEEN = 20_000  # columns of inputs, at most, behind a second moment
LARGEST = 4096  # inputs in one second moment; a row of more is rounded in parts
BLOCK = 128  # weights whose errors are passed on at once


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """What the rows of weights of ``layer``, nn.Conv2d or nn.Linear, are multiplied with: (groups, K, N) of ``x``."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).T[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    seen = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    return seen.transpose(0, 1).flatten(1).unflatten(0, (layer.groups, -1))


def second_moments(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """H = mean of c c^T over the :func:`columns` c that enter ``layer`` with ``x`` (B, ...): (groups, K, K).

    Of at most 20,000 columns, evenly drawn; of each 4,096 of the K values apart.
    """
    count = columns(layer, x[:1]).shape[2] * len(x)
    stride = -(-count // SEEN) | 1  # an odd stride meets every column of an image
    moments: list[Tensor] = []
    for image in x.split(1):
        parts = columns(layer, image)[:, :, ::stride].double().split(LARGEST, 1)
        found = [part @ part.transpose(1, 2) for part in parts]
        moments = [a + b for a, b in zip(moments, found, strict=True)] if moments else found
    return [moment / len(range(0, count, stride)) for moment in moments]


def round_rows(rows: Tensor, moment: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``rows`` (G, R, K) on the grids of ``scale`` and ``zero`` (G, R), so that tr (Q - W) H (Q - W)^T is small.

    ``moment`` H (G, K, K), to whose diagonal 5 % of its mean are added. From the largest diagonal element on, w_i is
    rounded to q_i and the weights that are left move by -(w_i - q_i) / U_ii U_i, with U the upper Cholesky factor of
    H^-1, which is the best that they can do about it. Source: GPTQ, algorithm 1.
    """
    half, (groups, _, width) = 2 ** (bits - 1), rows.shape
    order = moment.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    across = order[:, None].expand_as(rows)
    moment = moment.gather(1, order[:, :, None].expand_as(moment)).gather(2, order[:, None].expand_as(moment))
    damping = (DAMPING * moment.diagonal(dim1=1, dim2=2).mean(1)).clamp(min=1e-8)
    moment = moment + damping[:, None, None] * torch.eye(width).to(moment)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True).to(rows.dtype)
    left, rounded = rows.gather(2, across), torch.empty_like(rows)
    for begin in range(0, width, BLOCK):
        end = min(begin + BLOCK, width)
        errors = rows.new_zeros(groups, rows.shape[1], end - begin)
        for i in range(begin, end):
            levels = torch.round(left[:, :, i] * scale - zero).clamp(-half, half - 1)
            rounded[:, :, i] = (levels + zero) / scale
            error = (left[:, :, i] - rounded[:, :, i]) / factor[:, i, i, None]
            left[:, :, i + 1 : end] -= error[:, :, None] * factor[:, None, i, i + 1 : end]
            errors[:, :, i - begin] = error
        left[:, :, end:] -= errors @ factor[:, begin:end, end:]
    return rounded.gather(2, order.argsort(1)[:, None].expand_as(rows))


@torch.no_grad()
def round_weights(student: fx.GraphModule, images: Tensor) -> None:
    """Round the weights of every 2D convolution and linear layer by :func:`round_rows`, and observe the activations.

    In one pass of ``images`` (B, C, H, W): each layer's inputs are those that the layers before it, already rounded,
    give. The weights then lie on their ``grid``, and no longer train. Other layers round to nearest.
    """

    def at(layer: QuantizedLayer, inputs: tuple[Tensor, ...]) -> None:
        if layer.grid is None:
            grid, moments = torch.stack(integer_weight(layer)[1:]), second_moments(layer, inputs[0])
            groups = len(moments[0])
            parts = layer.weight.flatten(1).unflatten(0, (groups, -1)).split(LARGEST, 2)
            scale, zero = grid.unflatten(1, (groups, -1))
            done = [round_rows(*each, scale, zero, layer.weight_bits) for each in zip(parts, moments, strict=True)]
            layer.weight = nn.Parameter(torch.cat(done, 2).reshape(layer.weight.shape))
            layer.grid = grid

    hooks = [
        layer.register_forward_pre_hook(at)
        for layer in student.modules()
        if isinstance(layer, QuantizedLayer) and isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight_bits
    ]
    with observing(student):
        student(images)
    for hook in hooks:
        hook.remove()
