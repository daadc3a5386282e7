"""Tensors recorded from the official implementations, and the network that they were computed with."""

import functools
from pathlib import Path

import numpy as np
import torch
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs


@functools.cache
def recorded_losses() -> dict[str, Tensor]:
    """Inputs and values of the official losses, by name."""
    file = Path(__file__).parent / "data" / "losses.npz"
    return {name: torch.from_numpy(array) for name, array in np.load(file).items()}


def recorded_network() -> nn.Module:
    """The ResNet-20 behind the recorded losses, in eval mode."""
    network, recorded = get_model("resnet20_cifar10").eval(), recorded_losses().items()
    state = {name.removeprefix("state/"): value for name, value in recorded if name.startswith("state/")}
    network.load_state_dict(state, strict=False)
    return network


@functools.cache
def recorded_forward() -> tuple[Tensor, list[BatchNormInput]]:
    """The network's logits and batch-norm inputs for the recorded images."""
    network = recorded_network()
    with BatchNormInputs(network) as norms, torch.no_grad():
        return network(recorded_losses()["images"]), norms.layers
