"""Let a notebook's reader explore: one layer before and after fake quantization, and controls for a figure."""

import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor, fx

from dfqlib.bits import check_width
from dfqlib.errors import check_choice
from dfqlib.quantizers.fake_quantize import fake_quantize, fake_quantize_per_channel
from dfqlib.quantizers.layers import FakeQuantize
from dfqlib.quantizers.trace import weight_layers


@torch.no_grad()
def before_and_after(student: fx.GraphModule, layer: str, bits: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of ``layer`` (O, ...) or, for a ReLU, its activations (B, ...): in float, and fake-quantized.

    student: calibrated; the layers before ``layer`` compute as they do in it. layer: as named by
    :func:`dfqlib.quantizers.describe.describe`. images (B, 3, H, W), normalised, matter to activations only.
    Raises UserError for an unknown layer and for bits outside 2 to 8.
    """
    check_width("bits", bits)
    relus = {module.name: module for module in student.modules() if isinstance(module, FakeQuantize)}
    if check_choice("layer", layer, [*weight_layers(student), *relus]) not in relus:
        weight = student.get_submodule(layer).weight.detach()
        return weight, fake_quantize_per_channel(weight, bits)
    relu, seen = relus[layer], []
    with relu.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())):
        student(images)
    return seen[0], fake_quantize(seen[0], *relu.range(), bits)


def rounding_error(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean squared difference of two tensors of one shape, and how far below the variance of ``before`` it is, in dB.

    The second is infinite if the tensors are equal; each bit is worth about 6 dB.
    """
    error = (after - before).square().mean().item()
    return error, 10 * math.log10(before.var(correction=0).item() / error) if error else math.inf


def controls(draw: Callable[..., Figure], **choices: Sequence[Any] | Mapping[str, Any]) -> ipywidgets.VBox:
    """A control for each argument of ``draw`` above the figure that it returns, drawn anew at every change.

    choices: allowed values of an argument, or a mapping from label to value. Integers get a slider, all else a list;
    both start at the argument's default. Needs an interactive kernel; elsewhere, show the figure itself.
    """
    made, style = {}, {"description_width": "initial"}  # ipywidgets' own width cuts names off
    for name, allowed in choices.items():
        options = list(allowed.items() if isinstance(allowed, Mapping) else allowed)
        default = inspect.signature(draw).parameters[name].default
        about = {"options": options, "value": default, "description": name.replace("_", " "), "style": style}
        if all(isinstance(option, int) for option in options):
            made[name] = ipywidgets.SelectionSlider(**about, continuous_update=False)
        else:
            made[name] = ipywidgets.Dropdown(**about, layout={"width": "max-content"})
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
    row = ipywidgets.HBox(list(made.values()), layout={"flex_flow": "row wrap", "grid_gap": "0 1.5em"})
    return ipywidgets.VBox([row, picture])
