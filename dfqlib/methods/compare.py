"""One teacher, one budget: every source of images combined with every way to use them.

The papers compare methods, each a source of images with a use of its own. Here the two are separate: any use makes
quantized students from the images of any source.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.checkpoint import load_checkpoint, save_checkpoint
from dfqlib.data import image_sets
from dfqlib.errors import check_choice
from dfqlib.finetuning.loop import Checkpoint, Student, finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import GeneratorStream, ImageStream, Stream
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.methods import dsg, gdfq, hast, qimera, saft, zeroq
from dfqlib.models.evaluate import images_per_pass
from dfqlib.models.teacher import Teacher
from dfqlib.progress import track
from dfqlib.quantizers import calibrate
from dfqlib.schedules import (
    AlignmentWeights,
    Budget,
    DiverseImageSchedule,
    GeneratorSchedule,
    HardImageSchedule,
    ImageSchedule,
)

OBSERVED = 0.1  # share of a fine-tuning in which students only see images, to learn their activation ranges


def tuning_schedule(budget: Budget) -> GeneratorSchedule:
    """GDFQ's schedule within ``budget``, with learning rates that decay by a cosine."""
    observed = max(1, round(OBSERVED * budget.tuning_iterations))
    return replace(
        GeneratorSchedule.of(budget),
        iterations=budget.tuning_iterations,
        observe_iterations=observed,
        train_from=observed,
        decay="cosine",
        generator_iterations=budget.synthesis_iterations,
    )


def make_pool(
    source: str, teacher: Teacher, budget: Budget, seed: int = 0, checkpoint: Checkpoint | None = None
) -> tuple[SyntheticImages, float]:
    """At most ``budget.images`` labelled images of ``source``, a key of :data:`SOURCES`, and the seconds they took.

    Images of a source without labels get the teacher's top class. A finished ``checkpoint`` is read instead. UserError
    for another source, for real images of a data set of which the package has none, and for a checkpoint of other
    settings; Diverged if a loss is no longer finite.
    """
    check_choice("source", source, SOURCES)
    settings = Budget.of(budget).values() | {"source": source, "seed": seed}
    if checkpoint is not None and (made := load_checkpoint(checkpoint.path, settings, checkpoint.anew)):
        return SyntheticImages(made["images"].to(teacher.device), made["labels"].to(teacher.device)), made["seconds"]
    began = time.perf_counter()
    pool = SOURCES[source](teacher, budget, seed)
    if pool.labels is None:
        pool = replace(pool, labels=top_class(teacher, pool.images))
    seconds = time.perf_counter() - began
    if checkpoint is not None:
        save_checkpoint(checkpoint.path, settings, {"images": pool.images, "labels": pool.labels, "seconds": seconds})
    return pool, seconds


@torch.no_grad()
def top_class(teacher: Teacher, images: Tensor) -> Tensor:
    """The class (N,) that the teacher predicts for each of ``images`` (N, 3, H, W)."""
    return torch.cat([teacher.network(part).argmax(1) for part in images.split(images_per_pass(images.shape[-1]))])


def _noise(teacher: Teacher, budget: Budget, seed: int) -> SyntheticImages:
    shape = budget.images, 3, teacher.entry.input_size, teacher.entry.input_size
    return SyntheticImages(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(teacher.device))


def _real(teacher: Teacher, budget: Budget, seed: int, per_class: int) -> SyntheticImages:
    """``per_class`` of the package's training images of each class, drawn by ``seed``, as far as the budget goes."""
    few = image_sets.balanced_subset(image_sets.few_shot(teacher.entry.dataset), per_class, "few-shot", seed)
    drawn = torch.randperm(len(few.labels), generator=torch.Generator().manual_seed(seed))[: budget.images]
    return SyntheticImages(teacher.normalise(few.pixels[drawn]), few.labels[drawn].to(teacher.device))


def _hast(teacher: Teacher, budget: Budget, seed: int) -> SyntheticImages:
    beta, gamma = hast.PUBLISHED.get(teacher.entry.dataset, hast.PUBLISHED["cifar10"])
    return hast.hard_images(teacher, HardImageSchedule.of(budget), beta, gamma, seed=seed)


def _qimera(teacher: Teacher, budget: Budget, seed: int) -> SyntheticImages:
    setting = qimera.published_setting(teacher.name, BitWidths(4, 4))
    return _generated(qimera.make_stream(teacher, tuning_schedule(budget), setting, seed=seed), budget)


def _generated(stream: GeneratorStream, budget: Budget) -> SyntheticImages:
    """Images of the stream's generator after its training, and the labels they were asked for."""
    for _ in track(range(budget.synthesis_iterations), "training a generator"):
        stream.next_batch()
    losses = stream.read_losses()
    batches = [stream.next_batch() for _ in range(-(-budget.images // budget.batch))]
    images = torch.cat([batch.images for batch in batches])[: budget.images]
    labels = torch.cat([batch.labels for batch in batches])[: budget.images]
    if labels.ndim == 2 and (labels.amax(1) == 1).all():  # nothing is mixed
        labels = labels.argmax(1)
    return SyntheticImages(images, labels, [losses])


#: Where images come from. ``few-shot`` is one real training image per class, ``real`` ten.
SOURCES: Mapping[str, Callable[[Teacher, Budget, int], SyntheticImages]] = {
    "noise": _noise,
    "zeroq": lambda teacher, budget, seed: zeroq.distil_images(teacher, ImageSchedule.of(budget), seed=seed),
    "dsg": lambda teacher, budget, seed: dsg.synthesise_diverse(
        teacher, dsg.noise_gaps(teacher, seed=seed), DiverseImageSchedule.of(budget), seed=seed
    ),
    "gdfq": lambda teacher, budget, seed: _generated(
        gdfq.make_stream(teacher, tuning_schedule(budget), seed=seed), budget
    ),
    "qimera": _qimera,
    "hast": _hast,
    "few-shot": partial(_real, per_class=1),
    "real": partial(_real, per_class=10),
}


def _tune_gdfq(
    teacher: Teacher, pool: SyntheticImages, bits: Sequence[BitWidths], budget: Budget, seed: int
) -> tuple[Stream, dict[str, Student]]:
    """Cross-entropy and distillation on the pool."""
    schedule = tuning_schedule(budget)
    stream = ImageStream(teacher.folded, pool.images, pool.labels, budget.batch, seed=seed)
    return stream, {str(width): gdfq.make_student(teacher, width, schedule) for width in bits}


def _tune_saft(
    teacher: Teacher, pool: SyntheticImages, bits: Sequence[BitWidths], budget: Budget, seed: int
) -> tuple[Stream, dict[str, Student]]:
    """Distillation with selective cross-entropy, attention and saliency, on the pool and on harder copies of it."""
    labels = pool.labels if pool.labels.ndim == 1 else pool.labels.argmax(1)
    weights = AlignmentWeights()
    probe = NetworkProbe(teacher.network, weights.saliency_of)
    stream = saft.WithTeacherView(ImageStream(teacher.network, pool.images, labels, budget.batch, seed=seed), probe)
    options = weights, budget.student_lr, "cosine"
    return stream, {str(width): saft.make_student(teacher, probe, width, *options) for width in bits}


TUNINGS = {"gdfq": _tune_gdfq, "saft": _tune_saft}
#: What is done with the images. ``ranges``: one pass sets the activation ranges, nothing is trained (ZeroQ, DSG).
USES = ("ranges", *TUNINGS)


def make_students(
    use: str,
    teacher: Teacher,
    pool: SyntheticImages,
    bits: Sequence[BitWidths],
    budget: Budget,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> tuple[dict[str, nn.Module], float]:
    """Quantized copies of the teacher, by the names of ``bits`` such as ``"W4A4"``, and the seconds they took.

    ``use``, one of :data:`USES`, makes them of the ``pool``. With a ``checkpoint`` a stopped fine-tuning is continued.
    UserError for another use; Diverged if a loss is no longer finite.
    """
    if check_choice("use", use, USES) == "ranges":
        began = time.perf_counter()
        students = {str(width): calibrate.calibrated(teacher.network, width, pool.images) for width in bits}
        return students, time.perf_counter() - began
    stream, students = TUNINGS[use](teacher, pool, bits, budget, seed)
    schedule = tuning_schedule(budget)
    history = finetune(stream, students, schedule, label=f"fine-tuning as {use}", checkpoint=checkpoint)
    return {name: student.network for name, student in students.items()}, history.seconds


def variance_shares(table: pd.DataFrame) -> dict[str, float]:
    """How much of the variance of ``table`` (sources x uses) each explains, in per cent: two-way analysis of variance.

    ``source`` is the variance of the row means, ``use`` that of the column means, ``both`` the rest: how much a source
    suits a use. Zeros if all cells are equal.
    """
    whole = table.to_numpy().mean()
    by_source, by_use = table.mean(axis=1) - whole, table.mean(axis=0) - whole
    left = table.sub(by_source, axis=0).sub(by_use, axis=1) - whole
    parts = {"source": (by_source**2).mean(), "use": (by_use**2).mean(), "both": (left**2).to_numpy().mean()}
    total = sum(parts.values())
    return {name: 100 * float(part / total) if total > 0 else 0.0 for name, part in parts.items()}
