"""What ONNX files of ResNet-20's students hold, answer and take: ``python -m benchmarks.deploy``.

Writes ``deploy.csv`` and ``deploy.md``. ``--runtime PYTHON`` also runs the files in another ONNX Runtime.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from onnx import TensorProto
from torch import Tensor, fx

from benchmarks import readme
from benchmarks.rows import markdown as github_table
from benchmarks.steps import RESULTS, provenance
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import embedded_test
from dfqlib.deploy.export import OPSET, export_onnx, run_onnx, strip
from dfqlib.deploy.latency import in_torch, milliseconds
from dfqlib.deploy.store import save_student
from dfqlib.device import channels_last, seed_everything
from dfqlib.files import write_text
from dfqlib.methods.zeroq import distil_images
from dfqlib.models.evaluate import predict
from dfqlib.models.teacher import Teacher, load_teacher
from dfqlib.quantizers.calibrate import compensated
from dfqlib.quantizers.finalise import finalise
from dfqlib.schedules import ImageSchedule

ELSEWHERE = """import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = numpy.load(sys.argv[2])
logits = [session.run(None, {"images": images[i : i + 125]})[0] for i in range(0, len(images), 125)]
numpy.save(sys.argv[3], numpy.concatenate(logits))
print(onnxruntime.__version__)"""


def answers(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The classes (N,) that ``run`` gives ``images``, 125 at a time."""
    return torch.cat([run(some) for some in images.split(125)]).argmax(1)


def inside(path: Path, folder: Path) -> tuple[str, int]:
    """Convolutions and matrix products of the graph that ONNX Runtime makes of a file, and its float weights."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    kinds = pd.Series([n.op_type for n in graph.node if any(k in n.op_type for k in ("Conv", "Gemm", "MatMul"))])
    floats = [w for w in graph.initializer if w.data_type == TensorProto.FLOAT and len(w.dims) > 1]
    return ", ".join(f"{count} {kind}" for kind, count in kinds.value_counts().items()), len(floats)


def elsewhere(python: str, path: Path, images: Tensor, folder: Path) -> tuple[str, Tensor]:
    """The version of another interpreter's ONNX Runtime, and the classes (N,) that it gives ``images``."""
    np.save(folder / "images.npy", images.numpy())
    call = [python, "-c", ELSEWHERE, path, folder / "images.npy", folder / "logits.npy"]
    version = subprocess.run(call, check=True, capture_output=True, text=True).stdout.strip()
    return version, torch.from_numpy(np.load(folder / "logits.npy")).argmax(1)


def measure(teacher: Teacher, students: dict[str, fx.GraphModule], options: argparse.Namespace) -> pd.DataFrame:
    """A row for the float network and for each student."""
    test, rows, runs = embedded_test(teacher.entry.dataset), [], []
    images = teacher.normalise(test.pixels).contiguous()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batch = [{0: torch.export.Dim("batch")}]
        made = torch.onnx.export(
            teacher.network, (images[:2],), dynamo=True, opset_version=OPSET, verbose=False, dynamic_shapes=batch
        )
        strip(made.model)
        made.save(folder / "FP32.onnx")
        for bits, student in {"FP32": None, **students}.items():
            path = folder / f"{bits}.onnx"
            row = {"bits": bits}
            if student is not None:
                final = finalise(student)
                export_onnx(student, path, images[:250])
                save_student(student, folder / "kept.safetensors", teacher)
                row["kept"] = (folder / "kept.safetensors").stat().st_size
                # In float64 a student's sums are exact, as a runtime's integers are.
                ours = predict(final.double(), test, lambda pixels: teacher.normalise(pixels).double()).argmax(1)
                row["student"] = 100 * (ours == test.labels).double().mean().item()
            runs.append(run_onnx(path, options.threads))
            theirs = answers(runs[-1], images)
            row |= {"bytes": path.stat().st_size, "file": 100 * (theirs == test.labels).double().mean().item()}
            row["of_float"] = row["bytes"] / (folder / "FP32.onnx").stat().st_size
            row["operations"], row["float_weights"] = inside(path, folder)
            if student is not None:
                row["agree"] = 100 * (ours == theirs).double().mean().item()
                if options.runtime:
                    version, old = elsewhere(options.runtime, path, images, folder)
                    row |= {"other_runtime": version, "other_agree": 100 * (ours == old).double().mean().item()}
            rows.append(row)
        ways = [(rows[0], "float_ms", teacher.network)]
        for row, student in zip(rows[1:], students.values(), strict=True):
            ways += [(row, IN_TORCH[name], way) for name, way in in_torch(student).items()]
        with torch.inference_mode():
            spent = milliseconds([way for *_, way in ways], channels_last(images[:32]), 20)
        for (row, column, _), found in zip(ways, spent, strict=True):
            row[column] = found
        for count, rounds in ((1, 400), (32, 40)):
            for row, spent in zip(rows, milliseconds(runs, images[:count].contiguous(), rounds), strict=True):
                row[f"batch_{count}_ms"] = spent
    return pd.DataFrame(rows).assign(runtime=onnxruntime.__version__, images=len(test))


IN_TORCH = {"fake-quantized": "fake_ms", "in int8 here": "low_bits_ms"}
COLUMNS = {
    "bits": "",
    "bytes": "file, bytes",
    "of_float": "of float",
    "kept": "kept student, bytes",
    "student": "student, %",
    "file": "file, %",
    "agree": "same class, %",
    "other_agree": "same class, other runtime, %",
    "batch_1_ms": "1 image, ms",
    "batch_32_ms": "32 images, ms",
    "float_ms": "float in torch, 32 images, ms",
    "fake_ms": "fake-quantized, ms",
    "low_bits_ms": "in int8 in torch, ms",
    "operations": "operations, optimised",
    "float_weights": "float weights",
}


TIMES = [key for key in COLUMNS if key.endswith("_ms")]


def markdown(table: pd.DataFrame) -> str:
    """Two tables, of files and of times, as people read it, with what its columns are."""
    first, columns = table.iloc[0], {key: title for key, title in COLUMNS.items() if key in table}
    percent = [key for key in ("student", "file", "agree", "other_agree") if key in table]
    shown = table.assign(
        **{
            key: table[key].map("{:.3f}".format, na_action="ignore")
            for key in table
            if key.endswith(("_ms", "of_float"))
        },
        **{key: table[key].map("{:,.0f}".format, na_action="ignore") for key in ("bytes", "kept")},
        **{key: table[key].map("{:.2f}".format, na_action="ignore") for key in percent},
    ).astype(object)
    shown = shown.mask(shown.isna(), "").astype(str)
    of_files = [key for key in columns if key not in (*TIMES, "operations", "float_weights")]
    tables = [
        github_table([[columns[key] for key in keys], *shown[keys].to_numpy().tolist()], 1)
        for keys in (of_files, [key for key in columns if key not in of_files[1:]])
    ]
    about = f"{first.model}, {first.images:,} test images in the package, ONNX Runtime {first.runtime}"
    if "other_runtime" in table:
        about += f", other runtime {table.other_runtime.dropna().iloc[0]}"
    about += f". {first.hardware}, torch {first.torch}, commit "
    text = (
        "Student: top-1 of the finalised student in torch; file: of the ONNX file in ONNX Runtime; same class: for how "
        "many images the two agree. Milliseconds: medians, the files in turns. Operations: convolutions and matrix "
        "products of the graph that ONNX Runtime makes of the file, QLinearConv and QGemm are integer ones; float "
        "weights are those left in that graph."
    )
    parts = ["# Files of students", f"{about}{first.commit[:12]}, {first.date[:10]}.", *map(str.rstrip, tables), text]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deploy", description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W4A8", "W4A4"], help="default: W8A8 W4A8 W4A4")
    parser.add_argument("--runtime", metavar="PYTHON", help="an interpreter with another ONNX Runtime")
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime and torch (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for deploy.csv and deploy.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seed_everything(0)
    teacher = load_teacher("resnet20_cifar10")
    pool = distil_images(teacher, ImageSchedule(images=32, synthesis_iterations=200, synthesis_patience=40)).images
    own = {"sites": "integer", "weights": "symmetric", "input_range": teacher.entry.input_range}
    students = {bits: compensated(teacher.network, BitWidths.parse(bits), pool, **own) for bits in options.bits}
    table = measure(teacher, students, options).assign(**provenance(teacher.device, teacher.name))
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "deploy.csv", index=False, float_format="%.6g")
    write_text(options.out / "deploy.md", markdown(table))
    print(markdown(table))
    if options.out.resolve() == RESULTS:
        readme.show_students(table)


if __name__ == "__main__":
    main()
