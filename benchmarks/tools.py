"""What other tools make of the same network, teacher and images: ``python -m benchmarks.tools``.

Writes ``tools.csv``, a row as soon as it is measured, and from all rows ``tools.md``. Each tool runs in a process of
its own, so that one that fails costs its row alone. Needs Linux, for the peak memory, and the packages in
``benchmarks/requirements.txt``.
"""

import argparse
import importlib.metadata
import inspect
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks.imagenet import lite0, make_images, split
from benchmarks.measure import kilobytes, reset_process
from benchmarks.rows import add, in_process, markdown
from dfqlib import __version__, files
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import ImageSet, few_shot, load_test, some
from dfqlib.device import code_version, describe_hardware, seed_everything
from dfqlib.models.evaluate import score, top1
from dfqlib.models.teacher import Teacher, load_teacher

RESULTS = Path(__file__).resolve().parent / "results"
TABLE, PAGE = RESULTS / "tools.csv", RESULTS / "tools.md"
KEY = ["network", "tool", "bits", "images"]
SECONDS = 3600  # for one tool
Predict = Callable[[Tensor], Tensor]
NETWORKS = {"resnet20_cifar10": (32, 500), "efficientnet_lite0": (32, 100)}  # images, and ZeroQ's iterations for them


# The body of each function is what a user writes: its lines are counted. Each writes ``file`` and returns its network.


def kit(teacher: Teacher, images: Tensor, file: Path, bits: str) -> Predict:
    from dfqlib.deploy.export import export_onnx, run_onnx
    from dfqlib.quantizers.calibrate import compensated

    options = {"sites": "integer", "weights": "symmetric", "input_range": teacher.entry.input_range}
    export_onnx(compensated(teacher.network, BitWidths.parse(bits), images, **options), file, images)
    return run_onnx(file)


def onnxruntime_static(
    teacher: Teacher, images: Tensor, file: Path, weight: str = "QInt8", activation: str = "QInt8", last: bool = True
) -> Predict:
    import onnx
    import onnxruntime
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = ({"images": batch.numpy()} for batch in images.contiguous().split(8))

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    names = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    original = file.with_name("float.onnx")
    options = names | {"opset_version": 21, "external_data": False, "verbose": False}
    torch.onnx.export(teacher.network, (images[:2],), original, dynamo=True, **options)
    quantization.shape_inference.quant_pre_process(original, original)
    types = {"weight_type": quantization.QuantType[weight], "activation_type": quantization.QuantType[activation]}
    excluded = [] if last else [node.name for node in onnx.load(original).graph.node if node.op_type == "Gemm"]
    quantization.quantize_static(original, file, Images(), per_channel=True, nodes_to_exclude=excluded, **types)
    session = onnxruntime.InferenceSession(file)
    return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])


def torchao_pt2e(teacher: Teacher, images: Tensor, file: Path) -> Predict:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    batch = ({0: torch.export.Dim("batch")},)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    exported = torch.export.export(teacher.network, (images,), dynamic_shapes=batch).module()
    prepared = prepare_pt2e(exported, quantizer)
    prepared(images)
    converted = convert_pt2e(prepared)
    torch.export.save(torch.export.export(converted, (images,), dynamic_shapes=batch), file)
    return torch.export.load(file).module()


def neural_compressor(teacher: Teacher, images: Tensor, file: Path) -> Predict:
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import convert, get_default_static_config, prepare

    batch = ({0: torch.export.Dim("batch")},)
    prepared = prepare(export(teacher.network, (images,), dynamic_shapes=batch), get_default_static_config())
    prepared(images)
    converted = convert(prepared)
    torch.export.save(torch.export.export(converted, (images,), dynamic_shapes=batch), file)
    return torch.export.load(file).module()


def nncf_quantize(teacher: Teacher, images: Tensor, file: Path) -> Predict:
    import nncf
    import openvino

    quantized = nncf.quantize(teacher.network, nncf.Dataset(images.split(8)))
    openvino.save_model(openvino.convert_model(quantized, example_input=images), file.with_suffix(".xml"))
    compiled = openvino.compile_model(file.with_suffix(".xml"))
    return lambda x: torch.from_numpy(compiled(x.contiguous().numpy())[0])


def mct_with_own_images(teacher: Teacher, images: Tensor, file: Path) -> Predict:
    import model_compression_toolkit as mct

    network = torch.nn.Sequential(teacher.network)  # a layer named "output" would be taken for the graph's end
    config = mct.data_generation.get_pytorch_data_generation_config()
    made = mct.data_generation.pytorch_data_generation_experimental(
        network, len(images), tuple(images.shape[2:]), config
    )
    batches = torch.cat([each.reshape(-1, *images.shape[1:]) for each in made]).split(8)
    return mct.ptq.pytorch_post_training_quantization(network, lambda: ([batch] for batch in batches))[0]


#: By name and width: the package whose version counts, and the function.
TOOLS: dict[tuple[str, str], tuple[str, Callable[..., Predict]]] = {
    **{("the kit", bits): ("dfqlib", partial(kit, bits=bits)) for bits in ("W8A8", "W4A8", "W4A4")},
    ("ONNX Runtime", "W8A8"): ("onnxruntime", onnxruntime_static),
    ("ONNX Runtime", "W4A8"): ("onnxruntime", partial(onnxruntime_static, weight="QInt4")),
    ("ONNX Runtime, last layer in float", "W8A8"): ("onnxruntime", partial(onnxruntime_static, last=False)),
    ("ONNX Runtime, last layer in float", "W4A8"): (
        "onnxruntime",
        partial(onnxruntime_static, last=False, weight="QInt4"),
    ),
    ("ONNX Runtime, last layer in float", "W4A4"): (
        "onnxruntime",
        partial(onnxruntime_static, last=False, weight="QInt4", activation="QInt4"),
    ),
    ("torchao PT2E", "W8A8"): ("torchao", torchao_pt2e),
    ("Intel Neural Compressor", "W8A8"): ("neural-compressor-pt", neural_compressor),
    ("NNCF", "W8A8"): ("nncf", nncf_quantize),
    ("Sony MCT", "W8A8"): ("model-compression-toolkit", mct_with_own_images),
}


def data(network: str, folder: str | None) -> tuple[Teacher, ImageSet, ImageSet]:
    """The teacher, real images to calibrate on, and those on which all are scored."""
    count = NETWORKS[network][0]
    if network == "efficientnet_lite0":
        return lite0(), *split(load_test("imagenet", folder), count)
    return load_teacher(network, device="cpu"), some(few_shot("cifar10"), count), load_test("cifar10")


def measure(network: str, folder: str | None, name: tuple[str, str], images: Tensor) -> dict[str, object]:
    """The columns of one row: what ``name`` makes of the network, calibrated on ``images``."""
    seed_everything(0)
    teacher, _, test = data(network, folder)
    use = TOOLS[name][1]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "quantized"
        before, began = reset_process(teacher.device), time.process_time()
        predict = use(teacher, images, file)
        peak = kilobytes("VmHWM") * 1024 - before
        row: dict[str, object] = {"cpu_s": time.process_time() - began, "peak_mb": peak / 1e6}
        row["bytes"] = sum(each.stat().st_size for each in Path(place).iterdir() if each.stem == file.name) or None
        with torch.no_grad():
            logits = torch.cat([predict(teacher.normalise(pixels)) for pixels in test.pixels.split(25)])
    found = score(logits, test)
    return row | {"top1": float(found), "standard_error": found.standard_error}


def lines_of(use: Callable[..., Predict]) -> int:
    """How many lines a user writes: those of the function's body that are not empty."""
    source = inspect.getsource(getattr(use, "func", use))
    return sum(bool(line.strip()) for line in source.split(") -> Predict:\n")[1].splitlines())


def page(table: pd.DataFrame) -> str:
    """A table for each network: a line for each tool, width and source of images."""
    text = ""
    for network, part in table.groupby("network", sort=False):
        first = part.iloc[0]
        text += f"{network}, {first.scored} images, float {first.float:.2f}.\n\n"
        lines = [["tool", "images", "bits", "top-1", "CPU s", "peak MB", "lines", "file, MB"]]
        for row in part.itertuples():
            if isinstance(row.why, str):
                lines.append([f"{row.tool} {row.version}", row.images, row.bits, row.why, "-", "-", "-", "-"])
                continue
            size = "-" if pd.isna(row.bytes) else f"{row.bytes / 1e6:.2f}"
            accuracy = f"{row.top1:.2f} ± {row.standard_error:.2f}"
            cells = [accuracy, f"{row.cpu_s:.0f}", f"{row.peak_mb:.0f}", str(row.lines), size]
            lines.append([f"{row.tool} {row.version}", row.images, row.bits, *cells])
        text += f"{markdown(lines, 3)}\n"
    last = table.iloc[-1]
    commits = ", ".join(dict.fromkeys(table["commit"]))
    return f"{text}{last.hardware}, torch {last.torch}, commit {commits}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools", description=__doc__.partition("\n")[0])
    parser.add_argument("--network", default="resnet20_cifar10", choices=NETWORKS)
    parser.add_argument("--data", help="folder of ImageNet's class folders, for efficientnet_lite0")
    parser.add_argument("--sources", nargs="+", default=["zeroq", "noise", "real"], choices=["zeroq", "noise", "real"])
    names = list(dict.fromkeys(name for name, _ in TOOLS))
    parser.add_argument("--tools", nargs="+", default=names, choices=names)
    arguments = parser.parse_args()
    seed_everything(0)
    torch.set_num_threads(1)
    teacher, real, test = data(arguments.network, arguments.data)
    fixed = {"float": float(top1(teacher.network, test, teacher)), "scored": len(test)}
    fixed |= {"hardware": describe_hardware(teacher.device), "torch": torch.__version__, "commit": code_version()}
    for source in arguments.sources:
        made = make_images(source, teacher, real, NETWORKS[arguments.network][1])
        images = teacher.normalise(teacher.to_pixels(made))  # as files of images hold them, and any tool reads them
        for name, (package, use) in TOOLS.items():
            own_images = use is mct_with_own_images
            if name[0] not in arguments.tools or (own_images and source != arguments.sources[0]):
                continue
            row = dict(zip(KEY, (arguments.network, *name, "its own" if own_images else source), strict=True))
            row |= {
                "version": __version__ if package == "dfqlib" else importlib.metadata.version(package),
                "lines": lines_of(use),
                "why": None,
            }
            row |= in_process(measure, arguments.network, arguments.data, name, images, seconds=SECONDS) | fixed
            files.write_text(PAGE, page(add(TABLE, pd.DataFrame([row]), KEY)))
            print(*(f"{key}: {row.get(key)}" for key in (*KEY, "top1", "cpu_s", "bytes", "why")), sep=", ", flush=True)


if __name__ == "__main__":
    main()
