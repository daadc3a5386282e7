"""Tensors recorded from the official implementations, and the network that they were computed with."""

import functools
from pathlib import Path

import numpy as np
import torch
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs

GENERATOR_NAMES = {  # our module: its name in the official code for 32 x 32, and for 224 x 224
    "embedding": ("label_emb", None),
    "mapping": ("fc_reducer", None),
    "body.linear": ("l1.0", "l1.0"),
    "body.norm0": ("conv_blocks0.0", "conv_blocks0_0"),
    "body.conv1": ("conv_blocks1.0", "conv_blocks1_0"),
    "body.norm1": ("conv_blocks1.1", "conv_blocks1_1"),
    "body.conv2": ("conv_blocks2.0", "conv_blocks2_0"),
    "body.norm2": ("conv_blocks2.1", "conv_blocks2_1"),
    "body.conv3": ("conv_blocks2.3", "conv_blocks2_3"),
    "body.norm3": ("conv_blocks2.5", "conv_blocks2_5"),
}
GENERATOR_PARAMETERS = {"gain": "weights.weight", "shift": "biases.weight"}


@functools.cache
def recorded(name: str) -> dict[str, Tensor]:
    """The tensors of one file, by name."""
    file = Path(__file__).parent / "data" / f"{name}.npz"
    return {name: torch.from_numpy(array) for name, array in np.load(file).items()}


def recorded_losses() -> dict[str, Tensor]:
    """Inputs and values of the official losses, by name."""
    return recorded("losses")


def load_official(generator: nn.Module, tensors: dict[str, Tensor], prefix: str, column: int = 0) -> None:
    """Give a generator the official one's recorded weights, every one of which must have its partner."""
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    own = {}
    for name, value in generator.state_dict().items():
        module, _, parameter = name.rpartition(".")
        official = f"{GENERATOR_NAMES[module][column]}.{GENERATOR_PARAMETERS.get(parameter, parameter)}"
        own[name] = value if parameter == "num_batches_tracked" else state.pop(official)
    assert not state
    generator.load_state_dict(own)


def recorded_network() -> nn.Module:
    """The ResNet-20 behind the recorded losses, in eval mode."""
    network, tensors = get_model("resnet20_cifar10").eval(), recorded_losses().items()
    state = {name.removeprefix("state/"): value for name, value in tensors if name.startswith("state/")}
    network.load_state_dict(state, strict=False)
    return network


@functools.cache
def recorded_forward() -> tuple[Tensor, list[BatchNormInput]]:
    """The network's logits and batch-norm inputs for the recorded images."""
    network = recorded_network()
    with BatchNormInputs(network) as norms, torch.no_grad():
        return network(recorded_losses()["images"]), norms.layers
