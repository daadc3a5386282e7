"""Channel statistics of tensors, and the tensors that enter a network's batch norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dfqlib.errors import UserError

Layer = tuple[str, Tensor, nn.Module]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class BatchNormInputs:
    """Collects what enters each batch norm of ``network``, while open as a context manager.

    ``layers`` holds (name, input (B, C, ...), module) of the latest forward pass, in the order the batch norms ran, so
    it does not depend on the order in which a network registers its layers. The inputs are not detached: a loss on them
    reaches the images. On exit the hooks are gone and ``layers`` is empty. :class:`UserError` if the network has no
    batch norm with running statistics, for then there is nothing to compare with.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.layers: list[Layer] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._norms = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None
        }
        if not self._norms:
            raise UserError(
                f"network={type(network).__name__} has no batch norm with running statistics; "
                "data-free methods read the training data's statistics there."
            )

    def __enter__(self) -> BatchNormInputs:
        self._handles.append(self.network.register_forward_pre_hook(self._start))
        for name, norm in self._norms.items():
            self._handles.append(norm.register_forward_pre_hook(self._collector(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.layers = []

    def _start(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.layers = []  # a new list: one taken from the pass before keeps its tensors

    def _collector(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.layers.append((name, inputs[0], norm))

        return collect


class _MeanVariance(torch.autograd.Function):
    """Mean and variance over ``dims``, kept as size 1, with the gradient in one pass over the tensor.

    torch.var_mean on a CPU takes seven times as long (Welford's update is not vectorised over strided dimensions), and
    its gradient is put together from five elementwise passes.
    """

    @staticmethod
    def forward(ctx, x: Tensor, dims: Sequence[int], correction: int) -> tuple[Tensor, Tensor]:
        ctx.count = math.prod(x.shape[dim] for dim in dims)
        ctx.degrees = ctx.count - correction
        if x.device.type == "cpu":
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


def batch_mean_var(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of ``x`` (B, C, ...) over everything but channels: what a batch norm computes."""
    dims = (0, *range(2, x.dim()))
    mean, variance = _MeanVariance.apply(x, dims, 0)
    return mean.flatten(), variance.flatten()


def sample_mean_std(x: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (B, C) of each sample and channel of ``x`` (B, C, h, w, ...) over space.

    The variance is unbiased, with ``epsilon`` added under the root (ZeroQ, section 3.1, as its code computes it).
    ValueError if there are fewer than two positions, for then a sample has no spread of its own.
    """
    if math.prod(x.shape[2:]) < 2:
        raise ValueError(f"x of shape {tuple(x.shape)} has no spread over space; allowed: (B, C, h, w), h * w >= 2.")
    mean, variance = _MeanVariance.apply(x, tuple(range(2, x.dim())), 1)
    return mean.flatten(1), (variance + epsilon).sqrt().flatten(1)


def pooled_mean_var(mean: Tensor, variance: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) of N groups together, from their own (N, C) each and their weights (N,)."""
    shares = (weights / weights.sum()).unsqueeze(1)
    together = (shares * mean).sum(0)
    return together, (shares * (variance + (mean - together).square())).sum(0)


def weighted_mean_var(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`batch_mean_var`, with sample i of ``x`` (B, C, ...) counting ``weights[i]`` times, (B,)."""
    x = x if x.dim() > 2 else x.unsqueeze(2)
    mean, variance = _MeanVariance.apply(x, tuple(range(2, x.dim())), 0)
    return pooled_mean_var(mean.flatten(1), variance.flatten(1), weights)
