"""Channel statistics of tensors, and the inputs of a network's batch norms."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfqlib.errors import UserError
from dfqlib.speed.fold_batch_norms import FoldedNorm, undo_affine_statistics
from dfqlib.speed.precision import full
from dfqlib.speed.switches import uses

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FoldedNorm)
EPSILON = 1e-6  # under the root of every standard deviation of ZeroQ's loss


class BatchNormInput(NamedTuple):
    """The input (B, C, ...) of the batch norm ``name``, and the module that keeps the training data's statistics.

    Where the batch norm is folded into the convolution before it, ``tensor`` is its output; the methods still give the
    statistics of its input.
    """

    name: str
    tensor: Tensor
    norm: nn.Module

    def mean_var(self) -> tuple[Tensor, Tensor]:
        """:func:`batch_mean_var` of the input: (C,) each."""
        return undo_affine_statistics(*batch_mean_var(self.tensor), *self.affine)

    def sample_mean_std(self) -> tuple[Tensor, Tensor]:
        """:func:`sample_mean_std` of the input: (B, C) each."""
        mean, variance = undo_affine_statistics(*sample_mean_var(self.tensor), *self.affine)
        return mean, (variance + EPSILON).sqrt()

    @property
    def affine(self) -> tuple[Tensor, Tensor]:
        """Gain and shift (C,) of the affine map from the batch norm's input to ``tensor``."""
        if isinstance(self.norm, FoldedNorm):
            return self.norm.gain, self.norm.shift
        return torch.ones_like(self.norm.running_mean), torch.zeros_like(self.norm.running_mean)


def batch_norms(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of the batch norms of ``network`` that have running statistics."""
    norms = ((name, module) for name, module in network.named_modules() if isinstance(module, BATCH_NORMS))
    return [(name, norm) for name, norm in norms if norm.running_mean is not None]


class BatchNormInputs:
    """Collects the input of each batch norm of ``network``, while open as a context manager.

    ``layers`` holds a :class:`BatchNormInput` for each call in the latest forward pass, in execution order; the second
    call of "norm" is named "norm:2". Their tensors are not detached: a loss on them reaches the images. On exit the
    hooks are removed and ``layers`` is empty. ``keep`` says what is held in place of each, and so of its tensor.
    :class:`UserError` if the network has no batch norm with running statistics.
    """

    def __init__(self, network: nn.Module, keep: Callable[[BatchNormInput], Any] = lambda layer: layer) -> None:
        self.network, self.keep = network, keep
        self.layers: list[Any] = []
        self._norms = batch_norms(network)
        if not self._norms:
            held = f"network={type(network).__name__} has no batch norm with running statistics"
            raise UserError(f"{held}; data-free methods read the training data's statistics there.")

    def __enter__(self) -> Self:
        self._handles = [self.network.register_forward_pre_hook(self._start)]
        for name, norm in self._norms:
            hook = functools.partial(self._collect, name)
            self._handles.append(norm.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.layers = []

    def _start(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.layers = []  # a new list: a caller may still hold the one of the pass before
        self._calls: Counter[str] = Counter()

    def _collect(self, name: str, norm: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        self._calls[name] += 1
        call = name if self._calls[name] == 1 else f"{name}:{self._calls[name]}"
        self.layers.append(self.keep(BatchNormInput(call, full(inputs[0] if inputs else named["input"]), norm)))


class _MeanVariance(torch.autograd.Function):
    """:func:`_mean_var` with the gradient in one pass over the tensor.

    On a CPU torch.var_mean takes seven times as long (Welford's update is not vectorised over strided dimensions), and
    its gradient takes five elementwise passes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dims: Sequence[int], correction: int) -> tuple[Tensor, Tensor]:
        ctx.count = math.prod(x.shape[dim] for dim in dims)
        ctx.degrees = ctx.count - correction
        if x.device.type == "cpu" and dims == (0, *range(2, x.dim())) and not correction:
            # What a batch norm computes, by its own kernel: a third of the time of the general case below.
            statistics = torch.batch_norm_update_stats(x, None, None, 0.0)
            mean, variance = (each.view(1, -1, *[1] * (x.dim() - 2)) for each in statistics)
        elif x.device.type == "cpu":
            mean = x.mean(dims, keepdim=True)
            variance = (x - mean).square_().sum(dims, keepdim=True) / ctx.degrees
        else:
            variance, mean = torch.var_mean(x, dim=dims, correction=correction, keepdim=True)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, None, None]:
        x, mean = ctx.saved_tensors
        # d mean / dx = 1 / n and d variance / dx = 2 (x - mean) / degrees, gathered into gain * x + offset.
        gain = grad_variance * (2 / ctx.degrees)
        return torch.addcmul(grad_mean / ctx.count - gain * mean, gain, x), None, None


def _mean_var(x: Tensor, dims: Sequence[int], correction: int) -> tuple[Tensor, Tensor]:
    """Mean and variance over ``dims``, kept as size 1."""
    if uses("fused_statistics"):
        return _MeanVariance.apply(x, dims, correction)
    variance, mean = torch.var_mean(x, dims, correction=correction, keepdim=True)
    return mean, variance


def batch_mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of ``x`` (B, C, ...) over everything but channels: what a batch norm computes."""
    mean, variance = _mean_var(x, (0, *range(2, x.dim())), 0)
    return mean.flatten(), variance.flatten()


def sample_mean_var(x: Tensor, samples: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance (B, C) of each sample and channel of ``x`` (B, C, ...) over space.

    A single position has no spread: there each sample has :func:`batch_mean_var`, over the batch alone; and so has each
    of ``samples`` (default: B) where ``x`` has more rows than these, such as one for each position.
    """
    samples = samples or len(x)
    if math.prod(x.shape[2:]) < 2 or len(x) != samples:
        mean, variance = batch_mean_var(x)
        return mean.expand(samples, -1), variance.expand(samples, -1)
    mean, variance = _mean_var(x, tuple(range(2, x.dim())), 1)
    return mean.flatten(1), variance.flatten(1)


def sample_mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`sample_mean_var`, with the standard deviation: root of the variance + 1e-6 (ZeroQ, section 3.1)."""
    mean, variance = sample_mean_var(x)
    return mean, (variance + EPSILON).sqrt()


class _MeanSquare(torch.autograd.Function):
    """Mean of squares over space, (B, C), with the gradient in one pass: autograd's own takes five."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean((2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (gradient * (2 / math.prod(x.shape[2:])))[..., None, None]


def sample_mean_square(x: Tensor) -> Tensor:
    """Mean square (B, C) of each sample and channel of ``x`` (B, C, h, w) over space."""
    return _MeanSquare.apply(x) if uses("fused_statistics") else x.square().mean((2, 3))


def pooled_mean_var(mean: Tensor, variance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of N groups pooled, from each group's own (N, C) and the groups' weights (N,)."""
    shares = (weights / weights.sum()).unsqueeze(1)
    pooled = (shares * mean).sum(0)
    return pooled, (shares * (variance + (mean - pooled).square())).sum(0)


def weighted_mean_var(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`batch_mean_var`, with sample i of ``x`` (B, C, ...) counting ``weights[i]`` times, (B,)."""
    x = x if x.dim() > 2 else x.unsqueeze(2)
    mean, variance = _mean_var(x, tuple(range(2, x.dim())), 0)
    return pooled_mean_var(mean.flatten(1), variance.flatten(1), weights)


def sample_gaps(layers: Sequence[BatchNormInput]) -> tuple[Tensor, Tensor]:
    """Differences of each sample's channel means and standard deviations from the running ones: (B, sum of C) each.

    The channels of all ``layers`` are concatenated, so that a loss computes once for all layers.
    """
    samples = min(len(layer.tensor) for layer in layers)
    statistics = [sample_mean_var(layer.tensor, samples) for layer in layers]
    mean, variance, running_mean, running_variance = _concatenated(statistics, layers)
    return mean - running_mean, (variance + EPSILON).sqrt() - (running_variance + EPSILON).sqrt()


def batch_gaps(layers: Sequence[BatchNormInput], weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Differences of the batch's means and biased variances from the running ones, concatenated: (sum of C,) each.

    With ``weights`` (L, B), sample b counts ``weights[l, b]`` times in layer l.
    """
    if weights is None:
        statistics = [batch_mean_var(layer.tensor) for layer in layers]
    else:
        statistics = [weighted_mean_var(layer.tensor, weight) for layer, weight in zip(layers, weights, strict=True)]
    mean, variance, running_mean, running_variance = _concatenated(statistics, layers)
    return mean - running_mean, variance - running_variance


def _concatenated(statistics: Sequence[tuple[Tensor, Tensor]], layers: Sequence[BatchNormInput]) -> tuple[Tensor, ...]:
    """Mean and variance (..., sum of C) of the batch norms' inputs, and the running ones (sum of C,).

    ``statistics`` are the mean and variance (..., C) of each layer's tensor.
    """
    affine = [layer.affine for layer in layers]
    running = [(layer.norm.running_mean, layer.norm.running_var) for layer in layers]
    mean, variance, gain, shift, running_mean, running_variance = (
        torch.cat(each, -1) for pairs in (statistics, affine, running) for each in zip(*pairs, strict=True)
    )
    return *undo_affine_statistics(mean, variance, gain, shift), running_mean, running_variance


def over_channels(values: Tensor, layers: Sequence[BatchNormInput]) -> Tensor:
    """``values`` (..., L), one per layer, repeated for each of its channels: (..., sum of C)."""
    each = zip(values.unbind(-1), layers, strict=True)
    return torch.cat([value.unsqueeze(-1).expand(*value.shape, layer.tensor.shape[1]) for value, layer in each], -1)


def by_layer(values: Tensor, layers: Sequence[BatchNormInput]) -> Sequence[Tensor]:
    """``values`` (..., sum of C) of concatenated channels, split by layer: (..., C) each."""
    return values.split([layer.tensor.shape[1] for layer in layers], -1)
