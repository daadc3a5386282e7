"""A student as a file that other programs run: ONNX, or torch's ``.pt2``, checked right after it is written."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from dfqlib.deploy.lower import IntegerLayer, lower
from dfqlib.errors import UserError, check_choice
from dfqlib.files import atomic_path
from dfqlib.quantizers.finalise import finalise

OPSET = 21  # the first with quantization of every width; ONNX Runtime 1.20 reads it
FORMATS = "onnx", "pt2"
FOUR_BITS = "table", "int4"


@dataclass(frozen=True)
class Exported:
    """A file, its size, and how far it agrees with the finalised student on ``images`` images."""

    path: Path
    bytes: int
    images: int
    agreement: float  # per cent of the images that both give the same class
    difference: float  # largest, of any logit

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes / 1e6:.3f} MB; the same class as the student for {self.agreement:.2f} % of "
            f"{self.images:,} images, logits within {self.difference:.2g}"
        )


@torch.no_grad()
def export_onnx(
    student: fx.GraphModule, path: str | Path, images: Tensor, format: str = "onnx", four_bits: str = "table"
) -> Exported:
    """Write a calibrated ``student``, as :func:`.finalise.finalise` leaves it, to ``path``; run the file and compare.

    ``images`` (N, C, H, W), normalised as the file's input will be, give the input's shape and are what both are
    compared on, and the comparison is printed. The file takes batches of any size, "images" to "logits". ``format``
    "pt2" writes torch's exported program instead, for ``torch.export.load`` after ``import dfqlib.deploy.lower``.

    For integer kernels throughout, the student needs ``sites="integer"`` and ``weights="symmetric"``. Weights of at
    most four bits lie two in a byte (of two bits, four). ``four_bits`` "table" unpacks them by a table of 256 rows,
    which every runtime does once, when it loads the file; "int4" stores ONNX's INT4 and a cast to int8, which ONNX
    Runtime 1.20 lacks. UserError if a package of the extra ``deploy`` is missing, or for what cannot be exported.
    """
    check_choice("four_bits", four_bits, FOUR_BITS)
    if check_choice("format", format, FORMATS) == "onnx":
        require("onnxscript", "onnxruntime")
    final, path = finalise(student), Path(path)
    lowered = lower(final)
    example = images[:1].expand(2, *images.shape[1:]).contiguous()
    try:
        program = torch.export.export(lowered, (example,), dynamic_shapes=[{0: torch.export.Dim("batch")}])
        if format == "onnx":
            names = {"input_names": ["images"], "output_names": ["logits"]}
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
    except Exception as error:  # whatever torch's exporters raise for what they do not know
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the student cannot be exported to {format}: {type(error).__name__}: {reason}") from error
    with atomic_path(path) as temporary:
        if format == "onnx":
            strip(made.model)
            graph = made.model.graph
            for name, layer in lowered.named_modules():
                # Of layers with equal levels, such as one that is called twice, the exporter keeps one.
                levels = f"{name}.levels"
                if isinstance(layer, IntegerLayer) and layer.levels_bits <= 4 and levels in graph.initializers:
                    _pack(graph, levels, layer.levels_bits, four_bits)
            made.save(temporary)
        else:
            torch.export.save(program, temporary)
    theirs = (run_onnx(path) if format == "onnx" else torch.export.load(path).module())(images)
    ours = final.double()(images.double())  # in which a student's sums are exact, as a runtime's integers are
    same = 100 * (ours.argmax(1) == theirs.argmax(1)).double().mean().item()
    exported = Exported(path, path.stat().st_size, len(images), same, (ours - theirs).abs().max().item())
    print(exported)
    return exported


def run_onnx(path: str | Path, threads: int = 0) -> Callable[[Tensor], Tensor]:
    """The network in an ONNX file, on this CPU: images (N, C, H, W) to logits (N, classes).

    ``threads`` 0 takes as many as ONNX Runtime finds best.
    """
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: torch.from_numpy(session.run(None, {given.name: images.contiguous().cpu().numpy()})[0])


def require(*packages: str) -> None:
    """UserError, naming it, for one of ``packages`` that is not installed."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(
                f"exporting needs {package}, which is not installed: pip install 'dfqlib[deploy]'."
            ) from None


def strip(model: Any) -> None:
    """Take out of an onnx_ir ``model`` what only debugging reads: a tenth of a small file."""
    graph = model.graph
    graph.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = value.type = None  # the runtime infers them
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _pack(graph: Any, name: str, bits: int, four_bits: str) -> None:
    """Store the int8 initializer ``name`` of an onnx_ir ``graph`` in fewer bits, with the nodes that unpack it."""
    import onnx_ir as ir

    def constant(name: str, array: np.ndarray, dtype: Any = None) -> Any:
        if name not in graph.initializers:
            tensor = ir.tensor(array, dtype=dtype, name=name)
            graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            )
        return graph.initializers[name]

    value = graph.initializers[name]
    levels = value.const_value.numpy()
    width = 2 if bits == 2 and four_bits == "table" else 4
    if levels.size % (8 // width):
        return  # a few numbers
    if four_bits == "int4":
        nodes = [ir.node("Cast", [constant(f"{name}.int4", levels, ir.DataType.INT4)], {"to": ir.DataType.INT8})]
    else:
        shifts = np.arange(0, 8, width)
        table = ((np.arange(256)[:, None] >> shifts) % 2**width - 2 ** (width - 1)).astype(np.int8)
        packed = ((levels.reshape(-1, len(shifts)).astype(int) + 2 ** (width - 1)) << shifts).sum(1).astype(np.uint8)
        rows = ir.node("Cast", [constant(f"{name}.packed", packed)], {"to": ir.DataType.INT32})
        pairs = ir.node("Gather", [constant(f"levels_of_{width}_bits", table), *rows.outputs])
        shape = constant(f"{name}.shape", np.array(levels.shape, np.int64))
        nodes = [rows, pairs, ir.node("Reshape", [*pairs.outputs, shape])]
    for node in nodes:
        node.outputs[0].name = f"{name}.{node.op_type}"
    value.replace_all_uses_with(nodes[-1].outputs[0])
    del graph.initializers[name]
    graph.insert_before(graph[0], nodes)
