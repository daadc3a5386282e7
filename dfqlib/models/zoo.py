"""Every model of the published results: its architecture and the input that its weights expect."""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from pytorchcv.models.resnet_cifar import CIFARResNet
from torch import Tensor, nn

from dfqlib.errors import UserError, check_choice, first_line

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
LIBRARIES = "torchvision", "pytorchcv"  # before the slash in the name of any of their classifiers
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelEntry:
    """A model's architecture and the input its weights expect; ``mean`` and ``std`` are for pixels scaled to [0, 1]."""

    name: str
    dataset: str
    factory: str  # "module:function"
    input_size: int | tuple[int, int]  # in pixels; height and width only where they differ
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.image_shape[1] == self.image_shape[2]:
            object.__setattr__(self, "input_size", self.image_shape[1])

    @property
    def library(self) -> str:
        """The package that defines the architecture, and has its pretrained weights: pytorchcv, torchvision, dfqlib."""
        return self.factory.partition(".")[0]

    @property
    def input_range(self) -> tuple[Tensor, Tensor]:
        """What black and white pixels become, by channel: (C, 1, 1) each."""
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return -mean / std, (1 - mean) / std

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        height, width = self.input_size if isinstance(self.input_size, tuple) else (self.input_size,) * 2
        return len(self.mean), height, width

    def normalise(self, pixels: Tensor) -> Tensor:
        """(pixels / 255 - mean) / std, per channel: uint8 (N, C, H, W) -> float32, on the same device."""
        if pixels.shape[1] != len(self.mean):
            raise UserError(
                f"images of {pixels.shape[1]} channels; {self.name} takes {len(self.mean)}, as its mean says."
            )
        mean, std = _on_device(self.mean, self.std, pixels.device)
        return pixels.float().mul(1 / (255 * std)).sub_(mean / std)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Inverse of :meth:`normalise`, rounded and clipped: float32 (N, C, H, W) -> uint8, on the same device."""
        mean, std = _on_device(self.mean, self.std, images.device)
        return ((images.detach() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@functools.cache
def _on_device(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Both as one tensor (2, 1, C, 1, 1), copied to a device once: a copy in every step would make it wait."""
    return torch.tensor([mean, std], device=device).view(2, 1, -1, 1, 1)


def _entry(name: str, dataset: str, factory: str, input_size: int = 224) -> ModelEntry:
    if dataset == "imagenet":
        return ModelEntry(name, dataset, factory, input_size, 1000, IMAGENET_MEAN, IMAGENET_STD)
    return ModelEntry(name, dataset, factory, 32, int(dataset.removeprefix("cifar")), CIFAR_MEAN, CIFAR_STD)


MODELS: dict[str, ModelEntry] = {
    entry.name: entry
    for entry in (
        _entry("resnet20_cifar10", "cifar10", "pytorchcv.models.resnet_cifar:resnet20_cifar10"),
        _entry("resnet20_cifar100", "cifar100", "pytorchcv.models.resnet_cifar:resnet20_cifar100"),
        _entry("resnet34_cifar100", "cifar100", "dfqlib.models.zoo:resnet34_cifar100"),
        _entry("resnet18", "imagenet", "pytorchcv.models.resnet:resnet18"),
        _entry("resnet50", "imagenet", "pytorchcv.models.resnet:resnet50"),
        _entry("inceptionv3", "imagenet", "pytorchcv.models.inceptionv3:inceptionv3", 299),
        _entry("mobilenetv2_w1", "imagenet", "pytorchcv.models.mobilenetv2:mobilenetv2_w1"),
        _entry("shufflenet_g1_w1", "imagenet", "pytorchcv.models.shufflenet:shufflenet_g1_w1"),
        _entry("sqnxt23_w2", "imagenet", "pytorchcv.models.squeezenext:sqnxt23_w2"),
        _entry("torchvision/resnet18", "imagenet", "torchvision.models:resnet18"),
    )
}


def entry_of(name: str) -> ModelEntry:
    """That of ``MODELS``, or of "torchvision/NAME" or "pytorchcv/NAME", any of their classifiers of ImageNet."""
    library, _, architecture = name.partition("/")
    if name in MODELS or library not in LIBRARIES:
        return MODELS[check_choice("model", name, MODELS)]
    return (_of_torchvision if library == "torchvision" else _of_pytorchcv)(name, architecture)


def _of_torchvision(name: str, architecture: str) -> ModelEntry:
    models = importlib.import_module("torchvision.models")
    check_choice("model", name, [f"torchvision/{each}" for each in models.list_models(models)])
    preset = torchvision_weights(architecture).transforms()
    classes, norm = 1000, (tuple(preset.mean), tuple(preset.std))
    return ModelEntry(name, "imagenet", f"torchvision.models:{architecture}", preset.crop_size[0], classes, *norm)


def _of_pytorchcv(name: str, architecture: str) -> ModelEntry:
    models = importlib.import_module("pytorchcv.model_provider")._models
    function = models[check_choice("model", name, [f"pytorchcv/{each}" for each in models]).partition("/")[2]]
    try:
        with torch.device("meta"):  # the network tells its size without memory for its weights
            network = function()
    except ImportError as error:
        raise UserError(f"model={name!r}: {first_line(error)}.") from None
    if (classes := getattr(network, "num_classes", None)) != 1000:
        raise UserError(f"model={name!r} is no classifier of ImageNet: it has {classes or 'no'} classes.")
    return _entry(name, "imagenet", f"{function.__module__}:{architecture}", network.in_size[0])


def torchvision_weights(architecture: str) -> Any:
    """The weights of a network of torchvision that its own papers had, or else the only ones."""
    found = importlib.import_module("torchvision.models").get_model_weights(architecture)
    return getattr(found, "IMAGENET1K_V1", found.DEFAULT)


def resnet34_cifar100() -> nn.Module:
    """ResNet-34 with a 3x3 stem and no pooling before the first stage, for 32 x 32 images; 21.3 M parameters.

    The few-shot setting of SaFT names a ResNet-34 on CIFAR-100; pytorchcv has its blocks but not this network.
    """
    channels = [[64] * 3, [128] * 4, [256] * 6, [512] * 3]
    network = CIFARResNet(channels=channels, init_block_channels=64, bottleneck=False, num_classes=100)
    # Four stages leave 4 x 4 positions where pytorchcv's pool of 8 x 8 expects three stages.
    network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    return network


def build(name: str) -> nn.Module:
    """The untrained network of :func:`entry_of`, in training mode, with its library's random initialisation."""
    module, _, function = entry_of(name).factory.partition(":")
    # Imported when needed: torchvision, and with it the whole of pytorchcv, takes seconds.
    return getattr(importlib.import_module(module), function)()
