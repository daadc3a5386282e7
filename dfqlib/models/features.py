"""Penultimate features of a network, margins, and distances to class boundaries."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfqlib.errors import UserError
from dfqlib.models.evaluate import images_per_pass


def classifier(network: nn.Module) -> nn.Module:
    """The layer that computes the logits: the last Linear or 1x1 Conv2d of ``network``; UserError if it has none."""
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not layers or (isinstance(layers[-1], nn.Conv2d) and layers[-1].kernel_size != (1, 1)):
        raise UserError(f"network={type(network).__name__} does not end in a linear layer or a 1x1 convolution.")
    return layers[-1]


@torch.no_grad()
def penultimate(network: nn.Module, images: Tensor, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """The classifier's input (N, features) and the logits (N, classes) of ``images``, ``batch`` at a time."""
    batch = batch or images_per_pass(images.shape[-1])
    features: list[Tensor] = []
    hook = classifier(network).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].flatten(1)))
    try:
        logits = [network(part) for part in images.split(batch)]
    finally:
        hook.remove()
    return torch.cat(features), torch.cat(logits)


def top_two_margin(logits: Tensor) -> Tensor:
    """Gap (N,) between the two largest probabilities of ``logits`` (N, classes): 0 on a class boundary."""
    first, second = logits.softmax(1).topk(2, dim=1).values.unbind(1)
    return first - second


def boundary_distance(network: nn.Module, features: Tensor) -> Tensor:
    """Smallest distance (N,) that penultimate ``features`` (N, features) must move to change the predicted class.

    Classes meet on hyperplanes there, so with i the predicted class the Euclidean distance is exactly
    min over j of ((w_i - w_j) f + b_i - b_j) / |w_i - w_j|.
    """
    layer = classifier(network)
    weight = layer.weight.detach().flatten(1)
    logits = nn.functional.linear(features, weight, layer.bias)
    predicted = logits.argmax(1, keepdim=True)
    gaps = logits.gather(1, predicted) - logits
    distances = gaps / torch.cdist(weight, weight)[predicted.squeeze(1)]
    return distances.scatter(1, predicted, torch.inf).min(1).values


def principal_plane(features: Tensor) -> Callable[[Tensor], Tensor]:
    """PCA: the projection (N, D) -> (N, 2) on the two directions of largest variance of ``features`` (M, D).

    The largest entry of each direction is positive.
    """
    mean = features.mean(0)
    directions = torch.linalg.svd(features - mean, full_matrices=False).Vh[:2]
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return lambda points: (points - mean) @ directions.T
