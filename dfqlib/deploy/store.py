"""Students in files of their own: weights as packed integers, and a header that says what they are."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from dfqlib.bits import BitWidths
from dfqlib.device import channels_last
from dfqlib.errors import UserError
from dfqlib.files import atomic_path
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import ModelEntry, build
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.finalise import finalise
from dfqlib.quantizers.layers import FakeQuantize, QuantizedLayer, by_output_channel, integer_weight
from dfqlib.quantizers.observers import CommonRange, RunningMinMax
from dfqlib.quantizers.sites import folds

FORMAT = 1  # raised when an older kit could misread a file
KEY = "dfqlib student"  # of the header among a file's metadata


@dataclass(frozen=True)
class Header:
    """What a kept student is: of which teacher, on which normalised input, at which widths."""

    entry: ModelEntry
    source: str  # of the teacher's weights
    sha256: str
    weight_bits: dict[str, int | None]  # by layer
    activation_bits: dict[str, int]  # by site
    sites: str
    weights: str
    final: bool  # whether batch norms are folded
    format: int = FORMAT

    @property
    def bits(self) -> BitWidths:
        """One width for all layers where they agree, else one for each; the input's has no say."""
        activation = {site: width for site, width in self.activation_bits.items() if site != "input"}
        alike = ((each, set(each.values())) for each in (self.weight_bits, activation))
        return BitWidths(*(next(iter(widths), None) if len(widths) < 2 else each for each, widths in alike))


def save_student(student: fx.GraphModule, path: str | Path, teacher: Teacher) -> None:
    """Write a calibrated ``student`` of ``teacher`` to ``path``, as safetensors, whether it is finalised or not.

    Weights are integers of their width, packed without gaps, with a scale and a zero point for each channel; the rest
    is as it is in memory. A student that :func:`load_student` reads is not for training: its weights are those levels.
    UserError for a student without activation ranges.
    """
    quantizers = dict(_of(student, FakeQuantize))
    layers = dict(_of(student, QuantizedLayer))
    # A student without batch norms to fold may still not be finalised, and one without quantizers may be.
    final = all(each.final for each in quantizers.values())
    final = final and not any(folds(student, node) for node in student.graph.nodes)
    header = Header(
        teacher.entry,
        teacher.source,
        teacher.sha256,
        {name: layer.weight_bits for name, layer in layers.items()},
        {quantizer.name: quantizer.bits for quantizer in quantizers.values()},
        "integer" if any(isinstance(each.observer, CommonRange) for each in quantizers.values()) else "papers",
        "symmetric" if any(layer.symmetric for layer in layers.values()) else "asymmetric",
        final,
    )
    tensors = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in _state(student).items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {KEY: json.dumps(asdict(header))})


def read_header(path: str | Path) -> Header:
    """What the student in ``path`` is; UserError for a file that is missing, truncated, no student or a newer kit's."""
    return _read(path)[0]


def load_student(
    path: str | Path, network: Teacher | nn.Module | None = None, bits: BitWidths | str | None = None
) -> fx.GraphModule:
    """The student that :func:`save_student` wrote to ``path``, on the CPU, with the same outputs bit for bit.

    ``network`` has its teacher's architecture, with any weights, or is its teacher; None builds the architecture if the
    teacher is one that :func:`.zoo.entry_of` knows. UserError, naming what differs, for another network, a teacher
    with other weights, other widths than ``bits`` if given, and all that :func:`read_header` refuses.
    """
    (header, tensors), told = _read(path), f"student={str(path)!r}"
    if bits is not None and BitWidths.parse(bits) != header.bits:
        raise UserError(f"{told} has bits={header.bits}, not {BitWidths.parse(bits)}.")
    if isinstance(network, Teacher):
        if network.sha256 != header.sha256:
            digests = f"whose sha256 begins with {header.sha256[:12]}, not of {network.source} ({network.sha256[:12]})"
            raise UserError(f"{told} is of {header.source}, {digests}.")
        network = network.network
    if network is None:
        try:
            network = build(header.entry.name)
        except UserError:
            known = f"{told} is of {header.entry.name!r}, which is no network of the kit; give its network."
            raise UserError(known) from None
    student = _rebuild(network, header)
    expected = _state(student)
    for key in expected | tensors:
        shapes = [tuple(each[key].shape) if key in each else None for each in (expected, tensors)]
        if shapes[0] != shapes[1]:
            theirs, ours = ("lacks it" if shape is None else f"has it with shape {shape}" for shape in shapes)
            name = header.entry.name
            raise UserError(f"{told} is of {name}, another network: at {key}, this one {theirs}, the file {ours}.")
    _fill(student, tensors)
    return student


def pack(levels: Tensor, bits: int) -> Tensor:
    """Signed integers of ``bits`` each (any shape) one after the other: uint8 (bytes,), which :func:`unpack` reads."""
    unsigned = (levels.cpu().to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    return torch.from_numpy(np.packbits(np.unpackbits(unsigned.reshape(-1, 1).numpy(), axis=1)[:, 8 - bits :]))


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The levels, int16 (``shape``), of :func:`pack`."""
    digits = np.unpackbits(packed.numpy(), count=bits * shape.numel()).reshape(-1, bits)
    return (
        torch.from_numpy(np.packbits(np.pad(digits, ((0, 0), (8 - bits, 0))))).short().sub(2 ** (bits - 1)).view(shape)
    )


def _of(student: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The modules of one kind in ``student``, with their names."""
    return ((name, module) for name, module in student.named_modules() if isinstance(module, kind))


@torch.no_grad()
def _state(student: fx.GraphModule) -> dict[str, Tensor]:
    """What a file holds of ``student``, by name."""
    state = {key: value for key, value in student.state_dict().items() if not key.startswith("fake_quantize.")}
    state |= {f"{name}.range": torch.stack(quantizer.range()) for name, quantizer in _of(student, FakeQuantize)}
    for name, layer in _of(student, QuantizedLayer):
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias  # as it is used, which may be rounded
        for key in ("share", "grid", "parametrizations.bias.original") + ("weight",) * (layer.weight_bits is not None):
            state.pop(f"{name}.{key}", None)
        if layer.weight_bits is not None:
            levels, *grid = integer_weight(layer)
            state |= {f"{name}.levels": pack(levels, layer.weight_bits), f"{name}.grid": torch.stack(grid)}
    return state


@torch.no_grad()
def _fill(student: fx.GraphModule, tensors: dict[str, Tensor]) -> None:
    """Give ``student`` the values of :func:`_state`."""
    for name, quantizer in _of(student, FakeQuantize):
        for observer in filter(lambda each: isinstance(each, RunningMinMax), quantizer.observer.modules()):
            low, high = tensors[f"{name}.range"]
            observer.low.copy_(low), observer.high.copy_(high)
    for name, layer in _of(student, QuantizedLayer):
        if layer.weight_bits is not None:
            rows = by_output_channel(layer, layer.weight)
            levels = by_output_channel(layer, unpack(tensors[f"{name}.levels"], layer.weight_bits, layer.weight.shape))
            layer.grid = tensors[f"{name}.grid"]
            scale, zero = (each.view(-1, *[1] * (rows.dim() - 1)) for each in layer.grid)
            layer.weight.copy_(by_output_channel(layer, (levels + zero) / scale))
    for key, value in student.state_dict().items():
        if key in tensors and not key.endswith(".grid"):
            value.copy_(tensors[key])


def _rebuild(network: nn.Module, header: Header) -> fx.GraphModule:
    """A student of ``network`` as the header describes it, with values that mean nothing."""
    widths = BitWidths(8, 8 if header.activation_bits else None)
    student = quantize_model(network, widths, "minmax", header.sites, header.weights)
    for _, quantizer in _of(student, FakeQuantize):
        quantizer.bits = header.activation_bits.get(quantizer.name)
        for buffer in quantizer.buffers():
            buffer.fill_(1)
    for node in student.graph.nodes:
        if node.op == "call_module" and getattr(student.get_submodule(node.target), "bits", 0) is None:
            node.replace_all_uses_with(node.args[0])
            student.graph.erase_node(node)
    student.delete_all_unused_submodules()
    student.recompile()
    student = finalise(student) if header.final else student
    for name, layer in _of(student, QuantizedLayer):
        layer.weight_bits = header.weight_bits.get(name, 8)
    return channels_last(student)


def _read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    path = Path(path)
    told = f"student={str(path)!r}"
    if not path.is_file():
        raise UserError(f"{told} is not a file.")
    try:
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get(KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{told} is truncated or no safetensors file ({error}).") from None
    if written is None:
        raise UserError(f"{told} holds no student: its header has no {KEY!r}.")
    fields = json.loads(written)
    if fields["format"] > FORMAT:
        raise UserError(
            f"{told} has format {fields['format']}, of a newer dfqlib; this one reads formats up to {FORMAT}."
        )
    entry = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["entry"].items()}
    return Header(**fields | {"entry": ModelEntry(**entry)}), tensors
