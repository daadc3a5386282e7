"""A network in, a file that runs out: every step from synthetic images to ONNX, without data."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, fx, nn

from dfqlib import places
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import ImageSet, read_images
from dfqlib.deploy.export import Exported, export_onnx, require
from dfqlib.deploy.latency import latency
from dfqlib.deploy.store import save_student
from dfqlib.errors import UserError
from dfqlib.files import atomic_path
from dfqlib.generators.cost import measure
from dfqlib.methods import reconstruct
from dfqlib.methods.hast import hard_images
from dfqlib.models.batch_norm_statistics import batch_norms
from dfqlib.models.evaluate import expected_drop, images_for, in_channels, same_class, top1
from dfqlib.models.named import named_teacher
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers import mixed_precision
from dfqlib.quantizers.calibrate import compensated, corrected
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.finalise import finalise
from dfqlib.quantizers.trace import trace, weight_layers
from dfqlib.schedules import HardImageSchedule
from dfqlib.scores import Score
from dfqlib.settings import Settings, setting

INTEGER = {"sites": "integer", "weights": "symmetric"}  # what integer kernels need
LAYER_BITS = 2, 4, 8  # of a layer under a budget: those that a file stores without gaps
LOWEST_BUDGET = 2.5  # at 2, small layers rounded up to whole bytes no longer fit
HELD_OUT = 4  # one image of so many is left for the comparison with the teacher
LEAST = 2 * HELD_OUT  # images: the spread of one left is not known
PROBED = 32  # images behind the sensitivity of the layers
TUNED_BATCH = 32
TIMED = 8  # images at a time
SYNTHESIS = {"synthesis_lr": 0.1, "synthesis_patience": 7}
HARDNESS = 1.0, 0.0  # beta and gamma of the images' loss: every image is to be of its class
NETWORK = "model", "weights", "mean", "std", "size", "logits"  # parameters that say which


@dataclass(frozen=True, kw_only=True)
class Request(Settings):
    """What ``python -m dfqlib quantize`` is asked for; its help says what each is."""

    model: str = ""
    weights: str = ""
    mean: list[float] = setting([], -10, 10)
    std: list[float] = setting([], 1e-6, 10)
    size: str = ""
    logits: str = ""
    bits: BitWidths = setting("W8A8")
    budget: float = setting(0.0, 0, 8)
    out: str = ""
    images: str = ""
    data: str = ""
    synthetic: int = setting(128, LEAST, 10**6)
    iterations: int = setting(100, 1, 10**6)
    tune: int = setting(0, 0, 10**6)
    seed: int = setting(0, 0, 2**32 - 1)
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "out"):
            if not getattr(self, name):
                raise UserError(f"{name} must be given.")
        if 0 < self.budget < LOWEST_BUDGET:
            raise UserError(f"budget={self.budget} is out of range; allowed: bits a weight from {LOWEST_BUDGET} to 8.")

    @property
    def mean_bits(self) -> float:
        """Bits a weight of the suggested widths: as asked for, or as all layers have, of which 8 leave no choice."""
        return self.budget or min(self.bits.weight, 6)


@dataclass(frozen=True)
class Quantized:
    """A student with all that its page tells."""

    teacher: Teacher
    student: fx.GraphModule  # finalised
    bits: BitWidths
    exported: Exported
    held_out: int
    agreement: Score  # with the teacher, on images that were not used
    expected_drop: tuple[float, float]
    sensitivity: pd.DataFrame
    suggested: mixed_precision.Assignment
    true: tuple[ImageSet, Score, Score] | None  # images, and the top-1 of teacher and student on them
    milliseconds: dict[str, float]  # of an image, of so many at a time
    timed: int
    seconds: float


def quantize(request: Request, say: Callable[[str], None] = print) -> Quantized:
    """Check everything, then synthesise, calibrate, tune, export and measure; files go to ``request.out``.

    UserError, before any work, for what is missing or does not fit.
    """
    require("onnxscript", "onnxruntime")
    out = _folder(request.out)
    teacher = named_teacher(**{each: getattr(request, each) for each in NETWORK}, device=request.device)
    entry = teacher.entry
    quantize_model(teacher.network, request.bits, **INTEGER)  # refuses what it cannot
    own = _own_images(teacher, request) if request.images else None
    if own is None and not batch_norms(teacher.network):
        held = f"{entry.name} has no batch norms, whose statistics synthetic images are made from"
        raise UserError(f"model={request.model!r}: {held}; allowed: --images FOLDER, a few images of your own.")
    if test := images_for(entry, request.data) if request.data else None:
        top1(teacher.network, test.select(slice(1)), teacher)  # refuses other classes
    began = time.perf_counter()
    say(f"{entry.name}: {teacher.source}; {' x '.join(map(str, entry.image_shape))} values, {entry.classes} classes.")
    pool = _synthetic_images(teacher, request, say) if own is None else own
    pool = pool.clamp(*(end.to(pool) for end in entry.input_range))
    with atomic_path(out / "images.npy") as temporary:
        np.save(temporary, pool.cpu().numpy())  # for other tools, whose calibration takes normalised images
    held, fit = pool.split([len(pool) // HELD_OUT, len(pool) - len(pool) // HELD_OUT])
    sensitivity = mixed_precision.sensitivity(teacher.network, fit[:PROBED], LAYER_BITS, INTEGER["weights"])
    suggested = suggest(teacher.network, sensitivity, request.mean_bits)
    bits = BitWidths(suggested.bits, request.bits.activation) if request.budget else request.bits
    student = calibrate(teacher, bits, fit, trains=bool(request.tune))
    if request.tune:
        tune(teacher, student, fit, request.tune, seed=request.seed)
    save_student(student, out / "student.safetensors", teacher)
    final = finalise(student)
    with torch.no_grad():
        theirs, ours = teacher.network(held), final(held)
    compared = same_class(theirs, ours), expected_drop(theirs, ours)
    true = test and (test, *(top1(each, test, teacher) for each in (teacher.network, final)))
    exported = export_onnx(student.cpu(), out / f"{entry.name.replace('/', '_')}.onnx", held.cpu())
    timed = held[:TIMED]
    spent = latency(teacher.network, student, exported.path, timed), len(timed)
    seconds = time.perf_counter() - began
    return Quantized(
        teacher, final, bits, exported, len(held), *compared, sensitivity, suggested, true, *spent, seconds
    )


def calibrate(teacher: Teacher, bits: BitWidths, images: Tensor, trains: bool = False) -> fx.GraphModule:
    """A student for integer kernels, :func:`.calibrate.compensated` unless it ``trains`` afterwards."""
    make = corrected if trains else compensated
    return make(teacher.network, bits, images, input_range=teacher.entry.input_range, **INTEGER)


def tune(teacher: Teacher, student: fx.GraphModule, images: Tensor, iterations: int, seed: int = 0) -> None:
    """Let ``student`` learn what the teacher gives (:mod:`dfqlib.methods.reconstruct`), in place."""
    students = {"student": reconstruct.make_student(student)}
    history = reconstruct.reconstruct(teacher, students, images, iterations, TUNED_BATCH, seed=seed, label="tuning")
    if history.diverged:
        raise UserError(f"tune={iterations}: {history.diverged['student']}")


def suggest(network: nn.Module, sensitivity: pd.DataFrame, mean_bits: float) -> mixed_precision.Assignment:
    """The width of each layer that loses least by ``sensitivity`` at so many bits a weight on average."""
    sizes = mixed_precision.layer_sizes(network, list(sensitivity.columns))
    budget = max(mean_bits / 8 * sizes[8].sum(), sizes.min(axis=1).sum())  # small layers fill whole bytes
    return mixed_precision.pareto_frontier(sensitivity, sizes).best_under(budget)


def _folder(out: str) -> Path:
    folder = places.expand(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out!r} cannot be made ({error.strerror}).") from None
    if any(folder.iterdir()) and not (folder / "student.safetensors").exists():
        raise UserError(f"out={out!r} holds files that are not from here; allowed: a new folder, an empty one.")
    return folder


def _synthetic_images(teacher: Teacher, request: Request, say: Callable[[str], None]) -> Tensor:
    """Images (N, C, H, W) by HAST's loss, in batches for which there is memory; ``say`` gets their cost first."""

    def made(images: int, batch: int, iterations: int) -> Tensor:
        spans = {"images": images, "synthesis_batch": max(2, batch), "synthesis_iterations": iterations}
        schedule = HardImageSchedule(**spans, **SYNTHESIS)
        return hard_images(teacher, schedule, *HARDNESS, seed=request.seed, label="synthetic images").images

    cost = measure(lambda images: made(images, images, 1), request.synthetic, teacher.device)
    passes = PROBED * len(weight_layers(trace(teacher.network))) * len(LAYER_BITS) / 3  # without gradients
    steps = request.synthetic * request.iterations + passes + 3 * TUNED_BATCH * request.tune
    say(
        f"{request.synthetic} synthetic images, {cost.batch} at once, {request.iterations} iterations; then ranges, "
        f"sensitivity{f', {request.tune} iterations of tuning' * bool(request.tune)} and export: "
        f"about {_minutes(steps * cost.seconds)}, {cost.bytes / 1e9:.1f} GB of {cost.free / 1e9:.1f} GB free."
    )
    return made(request.synthetic, cost.batch, request.iterations)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"


def _own_images(teacher: Teacher, request: Request) -> Tensor:
    """All images below the request's folder as the network takes them, (N, C, H, W), in an order drawn by its seed.

    Thus those held out are of all folders.
    """
    pixels = read_images(request.images, teacher.entry.input_size)
    if len(pixels) < LEAST:
        raise UserError(f"images={request.images!r} holds {len(pixels)} images; allowed: {LEAST} or more.")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(request.seed))
    return teacher.normalise(in_channels(pixels[order], teacher.entry))
