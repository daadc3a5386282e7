"""Grad-CAM: which parts of an image a class's score depends on.

Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", ICCV 2017; SynQ
(class activation map alignment) and SaFT align the maps of teacher and student.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grad_cam(activations: Tensor, gradient: Tensor, size: tuple[int, int], cam: str = "gradcam") -> Tensor:
    """Maps (B, H, W) from 0 to 1: relu(sum_k w_k A_k), resized to ``size`` (H, W), each scaled by its own range.

    w_k is the mean over space, at least 0, of the score's ``gradient`` by the ``activations`` (B, C, h, w); constant
    gradients may be given as (B, C, 1, 1). With ``cam="gradcam++"`` each positive g counts g^2 / (2 g^2 + g^3 sum A_k)
    times (Chattopadhay et al., "Grad-CAM++", WACV 2018). A constant map is 0.
    """
    if cam == "gradcam++":
        gradient, total = gradient.relu(), activations.detach().sum((2, 3), keepdim=True)
        gradient = (gradient / (2 + gradient * total)).nan_to_num(0, 0, 0)
    weights = gradient.mean((2, 3)).clamp(min=0)
    maps = torch.einsum("bchw,bc->bhw", activations, weights).relu().unsqueeze(1)
    maps = F.interpolate(maps, size, mode="bilinear", align_corners=False).squeeze(1)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)


def map_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Correlation (B,) over pixels of two sets of maps (B, H, W): 1 for equal maps; 0 where one is constant."""
    first, second = (maps.flatten(1) - maps.flatten(1).mean(1, keepdim=True) for maps in (first, second))
    return F.cosine_similarity(first, second, dim=1)
