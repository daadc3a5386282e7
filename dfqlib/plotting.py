"""One style for all figures: curves differ in lightness, marker and dash, so that greyscale loses nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:  # the report draws figures without torch
    from torch import Tensor

# Each has a contrast of 3:1 with white. The first four go from dark to light, in greyscale too; the last two between.
COLOURS = ("#14213d", "#a32f0b", "#0c8075", "#bd8a00", "#54206a", "#75839d")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
COLOUR_MAP = "cividis"  # lightness rises steadily


def style() -> None:
    """Set the style of all following figures; call once at the top of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        font_scale=0.85,
        rc={
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=DASHES),
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "axes.titley": 1.0,  # measured against ticks on top, which no figure has, it takes half the time to draw
            "axes.edgecolor": "0.3",
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.figsize": (8, 3.6),
            "figure.dpi": 100,
            "grid.color": "0.88",
            "image.cmap": COLOUR_MAP,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "savefig.dpi": 130,
            "svg.hashsalt": "dfqlib",  # the same figure gives the same file
        },
    )


def show_images(pixels: "Tensor", labels: Sequence[object] | None = None, title: str = "", columns: int = 16) -> Figure:
    """A grid of ``pixels`` (N, 3, H, W) uint8, in rows of ``columns``, with labels above them."""
    count, _, height, width = pixels.shape
    columns = min(count, columns)
    rows = -(-count // columns)
    gap = max(1, height // 16)  # white between images
    top = gap if labels is None else gap + height // 3
    # One picture: an axes for every image takes seconds to lay out.
    sheet = np.full((rows * (height + top), columns * (width + gap), 3), 255, np.uint8)
    figure, axes = plt.subplots(figsize=(8, 8 * sheet.shape[0] / sheet.shape[1] + (0.3 if title else 0)))
    for index, image in enumerate(pixels.cpu().permute(0, 2, 3, 1).numpy()):
        y, x = index // columns * (height + top) + top, index % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
        if labels is not None:
            axes.text(x + width / 2, y - gap / 2, str(labels[index]), ha="center", va="bottom", fontsize="x-small")
    axes.imshow(sheet, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title)
    return figure


def plot_curves(axes: Axes, curves: Mapping[str, Sequence[float]], x: Sequence[float] | None = None) -> None:
    """Draw each named curve over ``x`` (0, 1, 2, ... unless given), with about ten markers if it is long, else all.

    Ticks are whole numbers where all of ``x`` are.
    """
    if all(float(at).is_integer() for at in x or ()):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    for name, values in curves.items():
        positions = np.arange(len(values)) if x is None else x
        axes.plot(positions, values, label=name, markevery=1 if len(values) <= 60 else len(values) // 10)
    if len(curves) > 1:
        axes.legend()


def reference_line(axes: Axes, value: float, name: str) -> None:
    """A dotted horizontal line at ``value``, in front of the curves, with its name outside, beside the right end."""
    axes.axhline(value, color="0.3", linewidth=1.2, linestyle=":", marker="", zorder=3)
    axes.text(1.01, value, name, transform=axes.get_yaxis_transform(), va="center", fontsize="x-small")


def describe(figure: Figure, name: str) -> str:
    """What a figure shows, for those who cannot see it: ``name``, and each panel's title, axes and legend."""
    panels = []
    for axes in figure.axes:
        against = " against ".join(filter(None, (axes.get_ylabel(), axes.get_xlabel())))
        legend = axes.get_legend()
        names = _names(legend) if legend else ""
        panels.append(": ".join(filter(None, (axes.get_title("left") or axes.get_title(), against, names))))
    texts = (name.replace("_", " "), figure.get_suptitle(), *panels, *map(_names, figure.legends))
    return "; ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text))


def _names(legend: Legend) -> str:
    return ", ".join(text.get_text() for text in legend.get_texts())


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the words that half of them share, such as ``features``, as long as they stay unique.

    Words with a number are kept: ``features.stage1.unit2.body.conv1.conv`` becomes ``stage1.unit2.conv1``.
    """
    split = [name.split(".") for name in names]
    words = Counter(word for parts in split for word in set(parts) if not any(letter.isdigit() for letter in word))
    for word, count in words.most_common():
        shorter = [[part for part in parts if part != word] for parts in split]
        if 2 * count >= len(names) and all(shorter) and len({tuple(parts) for parts in shorter}) == len(set(names)):
            split = shorter
    return [".".join(parts) for parts in split]
