"""The page about a quantized network: README.md in its folder, with one figure."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from dfqlib import plotting
from dfqlib.deploy.quantize import Quantized, Request
from dfqlib.device import code_version, processor
from dfqlib.files import atomic_path, write_text
from dfqlib.quantizers.describe import describe, model_bytes
from dfqlib.quantizers.mixed_precision import Assignment
from dfqlib.report.tables import markdown
from dfqlib.scores import paired_difference

PREDICTION = (
    "A prediction, not a measurement: the mean, over the held-out images, of p(the teacher's class) - p(the student's "
    "class), p being the teacher's own probabilities. Synthetic images are easy ones, of which the teacher is sure, so "
    "that it is too low at few bits: notebook 08 has a network that loses several points where it says 0."
)


def write_page(made: Quantized, request: Request, command: str) -> Path:
    """Write README.md, which tells all of ``made``, and its figure into the request's folder."""
    folder, name = made.exported.path.parent, made.teacher.name
    plotting.style()
    figure = sensitivity_figure(made.sensitivity, made.suggested)
    with atomic_path(folder / "sensitivity.png") as path:
        figure.savefig(path, format="png")
    plt.close(figure)
    used = made.bits.weight == made.suggested.bits
    mean_bits = f"{request.mean_bits:g} bits a weight on average"
    advice = f"The student has them (`--budget {request.budget:g}`)." if used else (
        f"`--budget {request.mean_bits:g}` uses them, or any other number of bits."
    )  # fmt: skip
    sections = [
        f"# {name} at {request.bits if not request.budget else f'{mean_bits}, A{request.bits.activation}'}\n",
        f"{made.teacher.source}. Made in {made.seconds:.0f} s by dfqlib {code_version()}:\n",
        f"```sh\n{command}\n```\n",
        "## Accuracy\n",
        "\n".join(f"- {line}" for line in accuracy(made, request)) + "\n",
        "## Size\n",
        markdown(sizes(made)),
        "## Time\n",
        f"Of an image, {made.timed} at a time, on one thread of {processor()}; all but ONNX Runtime in torch.\n",
        markdown(times(made)),
        "## The file\n",
        f"[`{made.exported.path.name}`]({made.exported.path.name}) takes \"images\", float32 (N, "
        f"{', '.join(map(str, made.teacher.entry.image_shape))}), which are (pixels / 255 - mean) / std with mean "
        f"{_numbers(made.teacher.entry.mean)} and std {_numbers(made.teacher.entry.std)}, and gives \"logits\" (N, "
        f"{made.teacher.entry.classes}). In ONNX Runtime:\n",
        f'```python\nsession = onnxruntime.InferenceSession("{made.exported.path.name}")\n'
        '(logits,) = session.run(None, {"images": images})\n```\n',
        "## A width for each layer\n",
        "What the teacher's outputs change by, as a KL divergence in nats, if the weights of one layer alone are "
        f"rounded, and the widths that lose least at {mean_bits}. {advice}\n",
        "![Sensitivity of each layer](sensitivity.png)\n",
        markdown(widths(made.sensitivity, made.suggested)),
        "## Layers and activations\n",
        markdown(layers(made)),
    ]  # fmt: skip
    write_text(folder / "README.md", "\n".join(sections))
    return folder / "README.md"


def accuracy(made: Quantized, request: Request) -> list[str]:
    """What is known of the student's accuracy, in sentences."""
    images = f"{made.held_out} {'of your' if request.images else 'synthetic'} images that were not used"
    points, error = made.expected_drop
    same = int(made.agreement.correct.sum())
    unseen = ""
    if same == made.held_out:  # the upper end of the 95 % interval, by the rule of three
        unseen = f" Of so few, a change in up to {min(100, 300 / same):.1f} % of images can go unseen."
    lines = [
        f"Agreement with the teacher: the same class for {same} of {images} ({made.agreement:.1f} %).{unseen}",
        f"Predicted loss of accuracy: {points:.2f} ± {error:.2f} points. {PREDICTION}",
        f"ONNX Runtime and the student: the same class for {made.exported.agreement:.1f} % of these images.",
    ]
    if made.true is None:
        return [*lines, "True accuracy: not measured; `--data FOLDER` measures it on labelled images."]
    test, of_teacher, of_student = made.true
    found = (f"{score:.2f} ± {score.standard_error:.2f} %" for score in (of_teacher, of_student))
    told = "True accuracy: {} in float, {} quantized".format(*found)
    return [f"{told}; {paired_difference(of_student, of_teacher)} of {test.source}.", *lines]


def sizes(made: Quantized) -> pd.DataFrame:
    """Bytes of the network in float32 and of both files, and their ratio."""
    in_float = model_bytes(made.teacher.network)
    files = [made.exported.path, made.exported.path.with_name("student.safetensors")]
    rows = [("parameters in float32", in_float)] + [(f"`{file.name}`", file.stat().st_size) for file in files]
    return pd.DataFrame([(name, f"{size:,}", f"{size / in_float:.2f}") for name, size in rows],
                        columns=["file", "bytes", "of float"])  # fmt: skip


def times(made: Quantized) -> pd.DataFrame:
    """Milliseconds of an image in each way."""
    rows = [(name, f"{spent:.2f}") for name, spent in made.milliseconds.items()]
    return pd.DataFrame(rows, columns=["kind", "ms"])


def widths(sensitivity: pd.DataFrame, suggested: Assignment) -> pd.DataFrame:
    """The sensitivity of each layer at each width, and the width that is suggested."""
    shown = sensitivity.map("{:.2g}".format).rename(columns="{} bits".format).reset_index()
    return shown.assign(suggested=[suggested.bits[layer] for layer in sensitivity.index])


def layers(made: Quantized) -> pd.DataFrame:
    """:func:`.describe.describe` of the student, as text."""
    table = describe(made.student).drop(columns=["bytes", "float_bytes"]).iloc[:-2]
    shown = table.map(
        lambda value: "" if pd.isna(value) else f"{value:.3g}" if isinstance(value, float) else str(value)
    )
    return shown.rename(columns=lambda name: name.replace("_", " "))


def sensitivity_figure(sensitivity: pd.DataFrame, suggested: Assignment) -> Figure:
    """Each layer's sensitivity at each width, with a ring around the width that is suggested."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    curves = {f"{width} bits": sensitivity[width].tolist() for width in sensitivity}
    positions = range(1, len(sensitivity) + 1)
    plotting.plot_curves(axes, curves, positions)
    chosen = [sensitivity.loc[layer, width] for layer, width in suggested.bits.items()]
    axes.scatter(positions, chosen, s=110, facecolors="none", edgecolors="0.3", label="suggested", zorder=3)
    axes.set(yscale="log", xlabel="layer, in order of execution", ylabel="sensitivity / nats (log scale)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
