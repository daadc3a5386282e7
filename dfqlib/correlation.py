"""How alike the samples of a batch are: their similarity matrix, its eigenpairs, and DSG's loss on them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BROADENING = 1e-3  # gaps between eigenvalues below this are treated as if they were about this wide
MAGNITUDE_WEIGHT = 1e-4  # of the eigenvalues' gap beside the eigenvectors' product


def similarity(samples: Tensor) -> Tensor:
    """Cosine of every two ``samples`` (B, ...), each taken as one vector: (B, B), 1 on the diagonal."""
    directions = F.normalize(samples.flatten(1), dim=1)
    return directions @ directions.T


def mean_similarity(samples: Tensor) -> float:
    """Mean cosine of two different ``samples`` (B, ...), B at least 2: 1 if all point the same way."""
    count = len(samples)
    return ((similarity(samples).sum() - count) / (count * (count - 1))).item()


class _Eigenpairs(torch.autograd.Function):
    """torch.linalg.eigh with a gradient that stays finite.

    The gradient of eigenvectors holds 1 / (l_j - l_i), which is infinite where two samples are the same or a generator
    does not yet tell them apart. d / (d^2 + BROADENING^2) in its place is the same for gaps well above BROADENING and
    at most 1 / (2 BROADENING) everywhere.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        # Apple's backend has no eigh; the matrix is as small as the batch.
        on = matrix.cpu() if matrix.device.type == "mps" else matrix
        values, vectors = (part.to(matrix.device) for part in torch.linalg.eigh(on))
        # An eigenvector is known up to its sign only.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = torch.where(largest < 0, -vectors, vectors)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, grad_vectors: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        gaps = values.unsqueeze(0) - values.unsqueeze(1)
        inner = vectors.T @ grad_vectors * (gaps / (gaps.square() + BROADENING**2))
        gradient = vectors @ (inner + torch.diag(grad_values)) @ vectors.T
        return (gradient + gradient.T) / 2


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (B,), from the least to the greatest, and eigenvectors, the columns of (B, B), of a symmetric matrix.

    Each eigenvector has length 1, and its entry of greatest magnitude is positive. The gradient is finite also where
    eigenvalues coincide.
    """
    return _Eigenpairs.apply(matrix)


def spatial_correlation_loss(images: Tensor, noise: Tensor) -> Tensor:
    """1e-4 MSE(l, m) + |sum_k n_k (-<u_k, v_k>)|: the images are to be as little alike as Gaussian noise is.

    l, u: eigenvalues and eigenvectors of the similarity matrix of ``images`` (B, 3, H, W), in the order and with the
    signs of :func:`eigenpairs`; m, v: those of ``noise``, of the same shape; n: m scaled to 0..1. No gradient reaches
    ``noise``. B is at least 2. Source: DSG (TPAMI 2023), spatial correlation; the published code takes the eigenpairs
    of ``torch.eig``, in no order, which newer torch does not have.
    """
    values, vectors = eigenpairs(similarity(images))
    with torch.no_grad():
        wanted, directions = eigenpairs(similarity(noise))
        weights = (wanted - wanted[0]) / (wanted[-1] - wanted[0]).clamp(min=1e-12)
    products = (vectors * directions).sum(0)
    return MAGNITUDE_WEIGHT * F.mse_loss(values, wanted) + (weights * -products).sum().abs()
