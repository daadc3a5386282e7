"""The network that a command line names, as a teacher."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from dfqlib.device import pick_device
from dfqlib.errors import UserError, check_choice, check_range, first_line
from dfqlib.models.teacher import Teacher, load_teacher, load_weights
from dfqlib.models.zoo import ModelEntry


def named_teacher(
    model: str,
    weights: str = "",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    size: str = "",
    logits: str = "",
    device: str = "auto",
) -> Teacher:
    """The teacher that ``model`` names: "module:function", which makes the network, "torchvision/NAME" or the like.

    ``weights`` is a file as :func:`.teacher.read_weights` reads it. Without one, torchvision and timm give their
    pretrained weights, the kit's networks have theirs, and a function's network keeps those it has. ``mean`` and
    ``std`` are for pixels scaled to [0, 1], ``size`` is "32", or "96x64", height by width; the libraries know them.
    UserError for whatever is not there, is missing or does not fit.
    """
    library, _, name = model.partition("/")
    on = pick_device(device)
    if library == "dfqlib":
        if mean or std or size:
            raise UserError(f"mean, std and size of model={model!r} are known; leave them out.")
        return load_teacher(name, weights or None, on)
    network, known = _network(model, pretrained=not weights)
    if weights:
        load_weights(network, os.path.expanduser(weights), model)
    given = {"mean": tuple(mean), "std": tuple(std), "size": _size(size) if size else None}
    known |= {key: value for key, value in given.items() if value}
    if missing := [key for key in given if key not in known]:
        raise UserError(
            f"{' and '.join(missing)} of model={model!r} must be given; for pixels from 0 to 1: mean 0, std 1."
        )
    short = model if library in LIBRARIES else model.partition(":")[2]
    options = {"name": short, "input_size": known["size"], "device": on, "logits": logits or None}
    return Teacher.from_module(network, None, known["mean"], known["std"], **options)


def network_of(entry: ModelEntry, model: str = "", logits: str = "") -> nn.Module | None:
    """The network of a teacher with ``entry`` without its weights; None where neither it nor ``model`` says which.

    ``model`` and ``logits`` are those of :func:`named_teacher`.
    """
    if not model and entry.name.partition("/")[0] not in LIBRARIES:
        return None
    network, _ = _network(model or entry.name, pretrained=False)
    options = {"input_size": entry.input_size, "logits": logits or None}
    return Teacher.from_module(network, entry.classes, entry.mean, entry.std, **options).network


def _network(model: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network that ``model`` names, and what its library knows of its input."""
    library, _, name = model.partition("/")
    return LIBRARIES[library](name, pretrained) if library in LIBRARIES else (_made(model), {})


def _made(text: str) -> nn.Module:
    """What the function that ``text`` names, as ``module:function``, returns; UserError where that is no network."""
    module, _, function = text.partition(":")
    held = f"model={text!r} is no module:function that makes a network"
    try:
        network = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{held} ({type(error).__name__}: {first_line(error)}).") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{held}: it returns a {type(network).__name__}.")
    return network


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    models = importlib.import_module("torchvision.models")
    check_choice("model", f"torchvision/{name}", [f"torchvision/{each}" for each in models.list_models(models)])
    best = models.get_model_weights(name).DEFAULT
    network = _downloaded("torchvision", name, models.get_model, name, weights=best if pretrained else None)
    preset = best.transforms()
    return network, {"mean": tuple(preset.mean), "std": tuple(preset.std), "size": preset.crop_size[0]}


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise UserError("model='timm/..' needs timm, which is not installed: pip install 'dfqlib[networks]'.") from None
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"{name[:6]}*")[:5])
        raise UserError(f"model={f'timm/{name}'!r} is unknown to timm {timm.__version__}; it has: {near}, ...")
    network = _downloaded("timm", name, timm.create_model, name, pretrained=pretrained)
    known = network.pretrained_cfg
    return network, {"mean": tuple(known["mean"]), "std": tuple(known["std"]), "size": tuple(known["input_size"][1:])}


LIBRARIES = {"torchvision": _torchvision, "timm": _timm}  # by what is before the slash in a network's name


def _downloaded(library: str, name: str, make: Any, *arguments: Any, **options: Any) -> nn.Module:
    try:
        return make(*arguments, **options)
    except (OSError, RuntimeError) as error:
        told = f"model={f'{library}/{name}'!r}: its weights could not be downloaded ({first_line(error)})"
        raise UserError(f"{told}; allowed: --weights a file that holds them.") from None


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(each) for each in text.lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise UserError(
            f"size={text!r} is no size; allowed: pixels such as 224, or height x width such as 96x64."
        ) from None
    for side in (height, width):
        check_range("size", side, 1, 4096)
    return height if height == width else (height, width)
