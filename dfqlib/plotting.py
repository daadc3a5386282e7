"""One look for all figures: told apart by lightness, marker and dash, so that greyscale loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# The first four go from dark to light, which is their order in greyscale too; the last two lie between.
COLOURS = ("#14213d", "#c1440e", "#2a9d8f", "#e0a100", "#7b2d8b", "#8d99ae")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
COLOUR_MAP = "cividis"  # lightness rises steadily
IMAGES_PER_ROW = 16


def style() -> None:
    """Set the look of every figure that follows; call once at the top of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        font_scale=0.85,
        rc={
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=DASHES),
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
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
            "savefig.dpi": 150,
            "svg.hashsalt": "dfqlib",  # the same figure gives the same file
        },
    )


def show_images(images: Tensor, labels: Sequence[object] | None = None, title: str = "", columns: int = 0) -> Figure:
    """A grid of ``images`` (N, 3, H, W) uint8, in rows of ``columns`` (16 unless given), with labels above them."""
    count = len(images)
    columns = min(count, columns or IMAGES_PER_ROW)
    rows = -(-count // columns)
    size = 8 / columns
    figure, grid = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(8, rows * (size + (0.2 if labels is not None else 0)) + (0.3 if title else 0)),
    )
    for axes in grid.flat:
        axes.axis("off")
    for index, (axes, image) in enumerate(zip(grid.flat, images.cpu(), strict=False)):
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        if labels is not None:
            axes.set_title(str(labels[index]), fontsize="x-small", loc="center", pad=2)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    return figure


def plot_curves(axes: Axes, curves: Mapping[str, Sequence[float]], x: Sequence[float] | None = None) -> None:
    """Draw each named curve over ``x`` (0, 1, 2, ... unless given), with about ten markers however long it is."""
    for name, values in curves.items():
        positions = np.arange(len(values)) if x is None else x
        axes.plot(positions, values, label=name, markevery=max(1, len(values) // 10))
    if len(curves) > 1:
        axes.legend()
