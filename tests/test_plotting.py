import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb

from dfqlib import plotting


@pytest.fixture(autouse=True)
def plain_look():
    with plt.rc_context():
        plotting.style()
        yield
        plt.close("all")


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_colour_stands_out_from_white_and_from_the_others_in_greyscale():
    shades = [luminance(colour) for colour in plotting.COLOURS]
    assert all(1.05 / (shade + 0.05) >= 3 for shade in shades)
    lightness = [116 * shade ** (1 / 3) - 16 for shade in shades]  # L*, from 0 to 100, in equal steps for the eye
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(lightness[:4])), "dark to light"
    assert all(later - earlier >= 5 for earlier, later in itertools.pairwise(sorted(lightness)))


def test_curves_differ_in_colour_marker_and_dash():
    axes = plt.figure().subplots()
    plotting.plot_curves(axes, {name: [1, 2, 3] for name in "abcdef"})
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines]
    assert len(set(looks)) == len({marker for _, marker, _ in looks}) == 6
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list("abcdef")


def test_a_figure_is_described_by_its_titles_axes_and_legends():
    figure, (left, right) = plt.subplots(1, 2)
    plotting.plot_curves(left, {"W4A4": [1, 2], "W3A3": [2, 3]})
    left.set(title="Loss", xlabel="iteration", ylabel="KL")
    right.set_axis_off()
    assert plotting.describe(figure, "fine_tuning") == "fine tuning; Loss: KL against iteration: W4A4, W3A3"
    figure.legend(["cat", "dog"])
    assert plotting.describe(figure, "fine_tuning").endswith("W4A4, W3A3; cat, dog")


@pytest.mark.parametrize(("count", "columns", "rows", "per_row"), [(32, 16, 2, 16), (5, 16, 1, 5), (7, 3, 3, 3)])
def test_images_are_in_rows_with_their_labels(count, columns, rows, per_row):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, 3, 4, 4)
    (axes,) = plotting.show_images(images, labels=range(count), title="synthetic", columns=columns).axes
    assert [text.get_text() for text in axes.texts] == [str(index) for index in range(count)]
    tiles = axes.images[0].get_array()
    tiles = tiles.reshape(rows, len(tiles) // rows, per_row, -1, 3).swapaxes(1, 2).reshape(rows * per_row, -1)
    assert [(tile == index).sum() for index, tile in enumerate(tiles[:count])] == [3 * 4 * 4] * count


def test_layers_are_counted_in_whole_numbers_and_a_reference_line_is_named():
    figure, axes = plt.subplots()
    plotting.plot_curves(axes, {"gap": [1.0, 2.0, 3.0]}, range(1, 4))
    plotting.reference_line(axes, 2.5, "teacher")
    figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert [text.get_text() for text in axes.texts] == ["teacher"] and axes.lines[-1].get_ydata()[0] == 2.5


def test_short_names_keep_what_tells_layers_apart():
    names = ["features.init.conv", "features.stage1.unit1.body.conv1.conv", "features.stage1.unit2.body.conv1.conv"]
    assert plotting.short_names([*names, "output"]) == ["init", "stage1.unit1.conv1", "stage1.unit2.conv1", "output"]
    assert plotting.short_names(["a.conv", "a.bn", "conv"]) == ["a.conv", "a.bn", "conv"]
