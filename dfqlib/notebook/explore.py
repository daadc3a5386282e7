"""What a notebook lets its reader explore: one layer before and after fake quantization, and controls for a figure."""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, fx

from dfqlib.errors import check_choice
from dfqlib.quantizers.fake_quantize import fake_quantize, fake_quantize_per_channel
from dfqlib.quantizers.layers import FakeQuantize
from dfqlib.quantizers.trace import weight_layers

if TYPE_CHECKING:
    from ipywidgets import VBox


@torch.no_grad()
def before_and_after(student: fx.GraphModule, layer: str, bits: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of ``layer`` (O, ...) or, for a ReLU, its activations (B, ...): in float, and fake-quantized.

    student: calibrated, so that a ReLU has the range its activations are quantized over; the layers before it compute
    as they do in ``student``. layer: as :func:`dfqlib.quantize.describe` names it. images (B, 3, H, W), normalised,
    matter to activations only. Raises UserError for an unknown layer and for bits outside 2 to 8.
    """
    relus = {module.name: module for module in student.modules() if isinstance(module, FakeQuantize)}
    if check_choice("layer", layer, [*weight_layers(student), *relus]) not in relus:
        weight = student.get_submodule(layer).weight.detach()
        return weight, fake_quantize_per_channel(weight, bits)
    relu, seen = relus[layer], []
    hook = relu.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    try:
        student(images)
    finally:
        hook.remove()
    return seen[0], fake_quantize(seen[0], relu.observer.low, relu.observer.high, bits)


def rounding_error(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean squared difference of two tensors of one shape, and how far it lies below the variance of ``before``, in dB.

    The second is infinite where nothing differs; each bit is worth about 6 dB.
    """
    error = (after - before).square().mean().item()
    return error, 10 * math.log10(before.var(correction=0).item() / error) if error else math.inf


def controls(draw: Callable[..., Figure], **choices: Sequence[Any] | Mapping[str, Any]) -> VBox:
    """A control for each argument of ``draw`` above the figure that it returns, drawn anew at every change.

    choices: what an argument may be; whole numbers get a slider, all else, and a mapping from label to value, a list
    to choose from. Every control starts at the default of ``draw``. Needs a kernel that somebody looks on at: where
    there is none, show the figure itself. Raises UserError for a default that is not among the choices.
    """
    import ipywidgets

    made = {}
    for name, allowed in choices.items():
        values = list(allowed.values() if isinstance(allowed, Mapping) else allowed)
        start = check_choice(name, inspect.signature(draw).parameters[name].default, values)
        options = list(allowed.items()) if isinstance(allowed, Mapping) else values
        settings = {"options": options, "value": start, "description": name.replace("_", " ")}
        settings |= {"style": {"description_width": "initial"}}  # ipywidgets' own width cuts names off
        if all(isinstance(option, int) for option in options):
            made[name] = ipywidgets.SelectionSlider(continuous_update=False, **settings)
        else:
            made[name] = ipywidgets.Dropdown(layout={"width": "max-content"}, **settings)
    # A picture, not an Output widget: nbclient waits for ever for a cell that fills one of these.
    picture = ipywidgets.Image(format="png")

    def show(_: object = None) -> None:
        figure, png = draw(**{name: control.value for name, control in made.items()}), io.BytesIO()
        figure.savefig(png, format="png", bbox_inches="tight")
        plt.close(figure)  # or the notebook would show it a second time
        picture.value = png.getvalue()

    for control in made.values():
        control.observe(show, names="value")
    show()
    row = {"flex_flow": "row wrap", "grid_gap": "0 1.5em"}
    return ipywidgets.VBox([ipywidgets.HBox(list(made.values()), layout=row), picture])
