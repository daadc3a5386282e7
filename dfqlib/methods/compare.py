"""One teacher, one budget: every paper's source of images combined with every paper's use of them."""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.checkpoint import load_checkpoint, save_checkpoint
from dfqlib.data import image_sets
from dfqlib.errors import check_choice
from dfqlib.finetuning.loop import Checkpoint, finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import GeneratorStream, ImageStream, pool_after_training
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.methods import dsg, gdfq, hast, qimera, saft, zeroq
from dfqlib.models.evaluate import images_per_pass
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers import calibrate
from dfqlib.schedules import (
    CALIBRATIONS,
    SOURCES,
    USES,
    AlignmentWeights,
    Budget,
    CalibratedSchedule,
    DiverseImageSchedule,
    GeneratorSchedule,
    HardImageSchedule,
    ImageSchedule,
)

OBSERVED = 0.1  # share of a fine-tuning in which students only see images, to learn their activation ranges


def tuning_schedule(budget: Budget) -> GeneratorSchedule:
    """GDFQ's schedule within ``budget``, with learning rates that decay by a cosine."""
    observed = max(1, round(OBSERVED * budget.tuning_iterations))
    spans = {"iterations": budget.tuning_iterations, "observe_iterations": observed, "train_from": observed}
    spans["generator_iterations"] = budget.synthesis_iterations
    return replace(GeneratorSchedule.of(budget), **spans, decay="cosine")


REAL_SOURCES = ["few-shot", "real"]  # all others need no data


def _images(source: str, teacher: Teacher, budget: Budget, seed: int) -> SyntheticImages:
    """At most ``budget.images`` of a source, labelled if it has labels."""
    shape, random = teacher.entry.image_shape, torch.Generator().manual_seed(seed)
    match source:
        case "noise":
            return SyntheticImages(torch.randn(budget.images, *shape, generator=random).to(teacher.device))
        case "zeroq":
            return zeroq.distil_images(teacher, ImageSchedule.of(budget), seed)
        case "dsg":
            gaps = dsg.noise_gaps(teacher, seed=seed)
            return dsg.synthesise_diverse(teacher, gaps, DiverseImageSchedule.of(budget), seed=seed)
        case "gdfq":
            return _generated(gdfq.make_stream(teacher, tuning_schedule(budget), seed=seed), budget)
        case "qimera":
            setting = qimera.published_setting(teacher.name, BitWidths(4, 4))
            return _generated(qimera.make_stream(teacher, tuning_schedule(budget), setting, seed=seed), budget)
        case "hast":
            beta, gamma = hast.PUBLISHED.get(teacher.entry.dataset, hast.PUBLISHED["cifar10"])
            return hast.hard_images(teacher, HardImageSchedule.of(budget), beta, gamma, seed=seed)
    per_class = {"few-shot": 1, "real": 10}[source]
    few = image_sets.balanced_subset(image_sets.few_shot(teacher.entry.dataset), per_class, "few-shot", seed)
    drawn = torch.randperm(len(few.labels), generator=random)[: budget.images]
    return SyntheticImages(teacher.normalise(few.pixels[drawn]), few.labels[drawn].to(teacher.device))


def _generated(stream: GeneratorStream, budget: Budget) -> SyntheticImages:
    """Images of the stream's generator after its training, and the labels they were asked for."""
    pool = pool_after_training(stream, budget.images)
    if pool.labels.ndim == 2 and (pool.labels.amax(1) == 1).all():  # nothing is mixed
        pool = replace(pool, labels=pool.labels.argmax(1))
    return pool


def make_pool(
    source: str, teacher: Teacher, budget: Budget, seed: int = 0, checkpoint: Checkpoint | None = None
) -> tuple[SyntheticImages, float]:
    """At most ``budget.images`` labelled images of ``source``, one of :data:`SOURCES`, and the seconds they took.

    Images of a source without labels get the teacher's top class. A finished ``checkpoint`` is read instead. UserError
    for another source, for real images of a data set of which the package has none, and for a checkpoint of other
    settings; Diverged if a loss is no longer finite.
    """
    check_choice("source", source, SOURCES)
    settings = Budget.of(budget).values() | {"source": source, "seed": seed}
    if checkpoint is not None and (made := load_checkpoint(checkpoint.path, settings, checkpoint.anew)):
        return SyntheticImages(made["images"].to(teacher.device), made["labels"].to(teacher.device)), made["seconds"]
    began = time.perf_counter()
    pool = _images(source, teacher, budget, seed)
    if pool.labels is None:
        parts = pool.images.split(images_per_pass(pool.images.shape[-1]))
        with torch.no_grad():
            pool = replace(pool, labels=torch.cat([teacher.network(part).argmax(1) for part in parts]))
    seconds = time.perf_counter() - began
    if checkpoint is not None:
        save_checkpoint(checkpoint.path, settings, {"images": pool.images, "labels": pool.labels, "seconds": seconds})
    return pool, seconds


def make_students(
    use: str,
    teacher: Teacher,
    pool: SyntheticImages,
    bits: Sequence[BitWidths],
    budget: Budget,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    calibration: str = "published",
) -> tuple[dict[str, nn.Module], float]:
    """Quantized copies of the teacher, by the names of ``bits`` such as ``"W4A4"``, and the seconds they took.

    ``use``, one of :data:`USES`, makes them of the ``pool``, with a ``calibration`` of :data:`CALIBRATIONS`. Students
    that are tuned train on equally many batches under both. With a ``checkpoint`` a stopped fine-tuning is continued.
    UserError for another name. The logits of a student that diverged are not finite.
    """
    check_choice("use", use, USES)
    check_choice("calibration", calibration, CALIBRATIONS)
    began, schedule = time.perf_counter(), tuning_schedule(budget)
    corrected: dict[str, nn.Module] = {}
    if calibration == "corrected":
        corrected = {str(width): calibrate.corrected(teacher.network, width, pool.images) for width in bits}
        schedule = CalibratedSchedule(
            iterations=schedule.iterations, train_from=schedule.train_from, batch=budget.batch
        )
    if use == "ranges":
        students = corrected or {str(w): calibrate.calibrated(teacher.network, w, pool.images) for w in bits}
        return students, time.perf_counter() - began
    calibrating = time.perf_counter() - began if corrected else 0.0
    if use == "gdfq":
        stream = ImageStream(teacher.folded, pool.images, pool.labels, budget.batch, seed=seed)
        make = partial(gdfq.make_student, schedule=tuning_schedule(budget))
    else:
        weights, labels = AlignmentWeights(), pool.labels if pool.labels.ndim == 1 else pool.labels.argmax(1)
        probe = NetworkProbe(teacher.network, weights.saliency_of)
        stream = saft.WithTeacherView(ImageStream(teacher.network, pool.images, labels, budget.batch, seed=seed), probe)
        make = partial(saft.make_student, probe=probe, weights=weights, lr=budget.student_lr, decay="cosine")
    tuned = {str(width): make(teacher, bits=width, network=corrected.get(str(width))) for width in bits}
    history = finetune(stream, tuned, schedule, label=f"fine-tuning as {use}", checkpoint=checkpoint)
    return {name: student.network for name, student in tuned.items()}, calibrating + history.seconds


def variance_shares(means: pd.Series) -> dict[str, float]:
    """Analysis of variance of ``means``, one for each combination of its index's levels, such as source and use.

    The share, in per cent, that each level explains by the variance of its own means; ``"interactions"``: the rest.
    Zeros if all are equal.
    """
    apart, shares = means - means.mean(), {}
    for level in means.index.names:
        effect = means.groupby(level=level).transform("mean") - means.mean()
        apart, shares[level] = apart - effect, (effect**2).mean()
    shares["interactions"] = (apart**2).mean()
    total = sum(shares.values())
    return {name: 100 * float(part / total) if total > 0 else 0.0 for name, part in shares.items()}
