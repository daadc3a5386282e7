"""One teacher, one budget: every source of images against every way to use them.

The papers compare methods, each a source of images with a use of its own. Here the two are taken apart: a *pool* of
images comes from a source, and any use makes quantized students of any pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from dfqlib.methods import dsg, gdfq, hast, qimera, saft, zeroq
from dfqlib.models.evaluate import images_per_pass
from dfqlib.models.teacher import Teacher
from dfqlib.progress import track
from dfqlib.quantizers import calibrate
from dfqlib.schedules import AlignmentWeights, Budget, GeneratorSchedule

WARM_UP = 0.1  # share of a fine-tuning in which students only see images, to learn their activation ranges


def tuning_schedule(budget: Budget) -> GeneratorSchedule:
    """GDFQ's and Qimera's schedule within a budget, with learning rates that fall by a cosine."""
    observed = max(1, round(WARM_UP * budget.tuning_iterations))
    return GeneratorSchedule(
        iterations=budget.tuning_iterations,
        observe_iterations=observed,
        train_from=observed,
        batch=budget.batch,
        student_lr=budget.student_lr,
        decay="cosine",
        generator_iterations=budget.synthesis_iterations,
        generator_lr=budget.generator_lr,
        kl_weight=budget.kl_weight,
    )


@dataclass(frozen=True)
class Pool:
    """Images (N, 3, H, W), normalised; labels (N,), or (N, classes) where classes are mixed; seconds they took."""

    images: Tensor
    labels: Tensor
    seconds: float


def make_pool(
    source: str, teacher: Teacher, budget: Budget, seed: int = 0, checkpoint: Checkpoint | None = None
) -> Pool:
    """``budget.images`` images of ``source``, a key of :data:`SOURCES`; those in ``checkpoint``, if it was written.

    UserError for another source, for real images of a data set of which the package has none, and for a checkpoint of
    other settings; Diverged if a loss is no longer finite.
    """
    check_choice("source", source, SOURCES)
    settings = {"source": source, "seed": seed} | budget.values()
    if checkpoint is not None and (made := load_checkpoint(checkpoint.path, settings, checkpoint.anew)):
        return Pool(made["images"].to(teacher.device), made["labels"].to(teacher.device), made["seconds"])
    began = time.perf_counter()
    images, labels = SOURCES[source](teacher, budget, seed)
    pool = Pool(images, labels, time.perf_counter() - began)
    if checkpoint is not None:
        save_checkpoint(checkpoint.path, settings, vars(pool))
    return pool


def make_students(
    use: str,
    teacher: Teacher,
    pool: Pool,
    bits: Sequence[BitWidths],
    budget: Budget,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
) -> tuple[dict[BitWidths, nn.Module], float]:
    """A quantized copy of the teacher for each of ``bits``, made of the ``pool`` by ``use``, a key of :data:`USES`.

    And the seconds of the calibration or fine-tuning. With a ``checkpoint`` a fine-tuning that was stopped goes on.
    UserError for another use; Diverged if a loss is no longer finite.
    """
    return USES[check_choice("use", use, USES)](teacher, pool, bits, budget, seed, checkpoint)


def top_class(teacher: Teacher, images: Tensor) -> Tensor:
    """Labels (N,) for images (N, 3, H, W) that nobody asked a class of: what the teacher takes them for."""
    with torch.no_grad():
        return torch.cat([teacher.network(part).argmax(1) for part in images.split(images_per_pass(images.shape[-1]))])


def _noise(teacher: Teacher, budget: Budget, seed: int) -> tuple[Tensor, Tensor]:
    size = teacher.entry.input_size
    images = torch.randn(budget.images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    images = images.to(teacher.device)
    return images, top_class(teacher, images)


def _real(teacher: Teacher, budget: Budget, seed: int, per_class: int) -> tuple[Tensor, Tensor]:
    """As many as fit of ``per_class`` of the package's training images of each class, drawn by ``seed``."""
    few = image_sets.balanced_subset(image_sets.few_shot(teacher.entry.dataset), per_class, "few-shot", seed)
    drawn = torch.randperm(len(few.labels), generator=torch.Generator().manual_seed(seed))[: budget.images]
    images = teacher.normalise(few.pixels[drawn])
    return images, few.labels[drawn].to(images.device)


def _zeroq(teacher: Teacher, budget: Budget, seed: int) -> tuple[Tensor, Tensor]:
    images, _ = zeroq.distil_images(teacher, budget.images, budget.synthesis_iterations, budget.synthesis_lr, seed=seed)
    return images, top_class(teacher, images)


def _dsg(teacher: Teacher, budget: Budget, seed: int) -> tuple[Tensor, Tensor]:
    gaps = dsg.noise_gaps(teacher, seed=seed)
    settings = {"batch": budget.images, "iterations": budget.synthesis_iterations, "learning_rate": budget.synthesis_lr}
    images, labels, _ = dsg.synthesise_diverse(teacher, gaps, **settings, seed=seed)
    return images, labels


def _hast(teacher: Teacher, budget: Budget, seed: int) -> tuple[Tensor, Tensor]:
    beta, gamma = hast.PUBLISHED.get(teacher.entry.dataset, hast.PUBLISHED["cifar10"])
    settings = {"iterations": budget.synthesis_iterations, "learning_rate": budget.synthesis_lr, "seed": seed}
    made = hast.hard_images(teacher, budget.images, beta, gamma, batch=256, **settings)
    return made.images, made.labels


def _gdfq(teacher: Teacher, budget: Budget, seed: int) -> tuple[Tensor, Tensor]:
    return _generated(gdfq.make_stream(teacher, tuning_schedule(budget), seed=seed), budget)


def _qimera(teacher: Teacher, budget: Budget, seed: int) -> tuple[Tensor, Tensor]:
    setting = qimera.published_setting(teacher.name, BitWidths(4, 4))
    return _generated(qimera.make_stream(teacher, tuning_schedule(budget), setting, seed=seed), budget)


def _generated(stream: GeneratorStream, budget: Budget) -> tuple[Tensor, Tensor]:
    """Images of a generator that has been trained, and the labels they were asked for; Diverged if it diverged."""
    for _ in track(range(budget.synthesis_iterations), "training a generator"):
        stream.next_batch()
    stream.read_losses()
    batches = [stream.next_batch() for _ in range(-(-budget.images // budget.batch))]
    images = torch.cat([batch.images for batch in batches])[: budget.images]
    # A generator that mixes classes in some batches gives those soft labels; one kind for all can be stacked.
    classes = batches[0].teacher_logits.shape[1]
    soft = [b.labels if b.labels.ndim == 2 else nn.functional.one_hot(b.labels, classes).float() for b in batches]
    labels = torch.cat(soft)[: budget.images]
    return images, labels.argmax(1) if (labels.amax(1) == 1).all() else labels


#: Where images come from. ``few-shot`` is one real training image per class, ``real`` ten.
SOURCES: Mapping[str, Callable[[Teacher, Budget, int], tuple[Tensor, Tensor]]] = {
    "noise": _noise,
    "zeroq": _zeroq,
    "dsg": _dsg,
    "gdfq": _gdfq,
    "qimera": _qimera,
    "hast": _hast,
    "few-shot": partial(_real, per_class=1),
    "real": partial(_real, per_class=10),
}


def _ranges(
    teacher: Teacher, pool: Pool, bits: Sequence[BitWidths], *_: object
) -> tuple[dict[BitWidths, nn.Module], float]:
    """One pass of the pool sets the activation ranges, nothing is trained: ZeroQ and DSG, post-training."""
    began = time.perf_counter()
    students = {width: calibrate.calibrated(teacher.network, width, pool.images) for width in bits}
    return students, time.perf_counter() - began


def _tune_gdfq(
    teacher: Teacher, pool: Pool, bits: Sequence[BitWidths], budget: Budget, seed: int, checkpoint: Checkpoint | None
) -> tuple[dict[BitWidths, nn.Module], float]:
    """Cross-entropy and distillation on the pool."""
    stream = ImageStream(teacher.folded, pool.images, pool.labels, budget.batch, seed=seed)
    students = {width: gdfq.make_student(teacher, width, tuning_schedule(budget)) for width in bits}
    return _tuned(stream, students, budget, "GDFQ's fine-tuning", checkpoint)


def _tune_saft(
    teacher: Teacher, pool: Pool, bits: Sequence[BitWidths], budget: Budget, seed: int, checkpoint: Checkpoint | None
) -> tuple[dict[BitWidths, nn.Module], float]:
    """Distillation with selective cross-entropy, attention and saliency, on the pool and on harder copies of it."""
    labels = pool.labels if pool.labels.ndim == 1 else pool.labels.argmax(1)
    terms = AlignmentWeights()
    viewer = NetworkProbe(teacher.network, terms.saliency_of)
    stream = saft.WithTeacherView(ImageStream(teacher.network, pool.images, labels, budget.batch, seed=seed), viewer)
    students = {width: saft.make_student(teacher, viewer, width, terms, budget.student_lr, "cosine") for width in bits}
    return _tuned(stream, students, budget, "SaFT's fine-tuning", checkpoint)


def _tuned(
    stream: Stream, students: Mapping[str, Student], budget: Budget, label: str, checkpoint: Checkpoint | None
) -> tuple[dict[BitWidths, nn.Module], float]:
    spans = budget.tuning_iterations, budget.observe_iterations
    history = finetune(stream, students, *spans, label=label, checkpoint=checkpoint)
    return {width: student.network for width, student in students.items()}, history.seconds


#: What is done with the images.
USES: Mapping[str, Callable[..., tuple[dict[BitWidths, nn.Module], float]]] = {
    "ranges": _ranges,
    "gdfq": _tune_gdfq,
    "saft": _tune_saft,
}


def variance_shares(table: pd.DataFrame) -> dict[str, float]:
    """How much of the variance of ``table`` (sources x uses) each explains, in per cent: two-way analysis of variance.

    ``source`` is the variance of the row means, ``use`` that of the column means, ``both`` what is left: how much a
    source suits a use. Zeros if all cells are equal.
    """
    whole = table.to_numpy().mean()
    by_source, by_use = table.mean(axis=1) - whole, table.mean(axis=0) - whole
    left = table.sub(by_source, axis=0).sub(by_use, axis=1) - whole
    parts = {"source": (by_source**2).mean(), "use": (by_use**2).mean(), "both": (left**2).to_numpy().mean()}
    total = sum(parts.values())
    return {name: 100 * float(part / total) if total > 0 else 0.0 for name, part in parts.items()}
