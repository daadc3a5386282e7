"""Grad-CAM: which parts of an image a class's score rests on.

Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", ICCV 2017, as
SynQ (class activation map alignment) and SaFT align it between teacher and student.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cam_weights(gradient: Tensor) -> Tensor:
    """The weight (B, C) of each channel: ``gradient`` (B, C, h, w) of the score, mean over space, negative ones 0."""
    return gradient.mean((2, 3)).clamp(min=0)


def grad_cam(activations: Tensor, weights: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, H, W) from 0 to 1: relu(sum_k w_k A_k), resized to ``size`` (H, W), each image's minimum and maximum.

    ``activations`` (B, C, h, w); ``weights`` (B, C). A map that is the same everywhere is 0.
    """
    maps = torch.einsum("bchw,bc->bhw", activations, weights).relu().unsqueeze(1)
    maps = F.interpolate(maps, size, mode="bilinear", align_corners=False).squeeze(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


def convolution_gradient(pooled: Tensor, features: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """The gradient (B, C, h, w) of a score at the last convolution's raw output, with no backward pass.

    ``pooled`` (B, C, 1, 1) is its gradient at ``features`` (B, C, h, w), what the last ReLU gives: W[c, k] / (h w). On
    the way back it passes the ReLU where features are positive, and gamma_k / sqrt(var_k + eps) of the batch norm.
    """
    gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return pooled * gain[None, :, None, None] * (features > 0)


def map_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation (B,) over the pixels of two sets of maps (B, H, W): 1 for the same map; 0 where one is constant."""
    first, second = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (first, second))
    return F.cosine_similarity(first, second, dim=1)
