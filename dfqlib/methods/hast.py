"""HAST (Li et al., CVPR 2023): images that the teacher finds hard, which TexQ's calibration centres can guide.

The fine-tuning on them is in :mod:`dfqlib.methods.saft`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.device import channels_last
from dfqlib.errors import check_range
from dfqlib.finetuning.streams import pool_after_training
from dfqlib.generators.optimise_images import synthesise
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.loss_terms import add_up
from dfqlib.losses import bns_loss, difficulty
from dfqlib.methods import gdfq
from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs
from dfqlib.models.teacher import Teacher
from dfqlib.schedules import GeneratorSchedule, HardImageSchedule
from dfqlib.speed.precision import run

# Per data set: beta, the weight of the hard samples' cross-entropy, and gamma, how much more harder samples count. On
# CIFAR-100 they are SynQ's, since one set of images serves both methods; HAST's are those of CIFAR-10.
PUBLISHED = {"cifar10": (10.0, 2.0), "cifar100": (0.1, 0.5), "imagenet": (0.1, 0.5)}


@dataclass(frozen=True)
class Centres:
    """TexQ's calibration centres: one image per class, and its statistics at the deeper batch norms.

    ``images`` (classes, C, H, W); ``statistics``: per batch norm, by name, the means and standard deviations over space
    (classes, C) of its input.
    """

    images: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]]


def deeper_half(layers: Sequence[BatchNormInput]) -> Sequence[BatchNormInput]:
    """The second half of ``layers``, in order of execution, with the middle one of an odd number."""
    return layers[len(layers) // 2 :]


def centre_gap(layers: Sequence[BatchNormInput], labels: Tensor, centres: Centres) -> Tensor:
    """MSE of each sample's means plus that of its standard deviations to those of its class's centre; labels (B,).

    Mean over the deeper layers. Source: TexQ, calibration centres.
    """
    gaps = []
    for layer in deeper_half(layers):
        (mean, std), (centre_mean, centre_std) = layer.sample_mean_std(), centres.statistics[layer.name]
        gaps.append(F.mse_loss(mean, centre_mean[labels]) + F.mse_loss(std, centre_std[labels]))
    return torch.stack(gaps).mean()


def hast_loss(
    teacher_logits: Tensor,
    labels: Tensor,
    layers: Sequence[BatchNormInput],
    beta: float = 10.0,
    gamma: float = 2.0,
    centres: Centres | None = None,
) -> Tensor:
    """L_BNS + beta mean((1 - p_y)^gamma CE(T(x), y)), where hard samples count most; with ``centres`` TexQ's loss.

    ``teacher_logits`` (B, classes); ``labels`` (B,) integers or (B, classes) shares. TexQ's is 0.4 L_BNS + beta hard CE
    + 0.02 :func:`centre_gap`: its three weights 0.4, 1, 0.02, read in this order. Source: HAST, hard sample synthesis.
    """
    cross_entropy = F.cross_entropy(teacher_logits, labels, reduction="none")
    # A root has no slope at 0: where the teacher is sure, the difficulty is held above 0.
    weights = difficulty(teacher_logits, labels).clamp(min=1e-8).pow(gamma)
    bns_weight = 1.0 if centres is None else 0.4
    terms = {"L_BNS": bns_weight * bns_loss(layers), "hard CE": beta * (weights * cross_entropy).mean()}
    if centres is not None:
        terms["gap to the centres"] = 0.02 * centre_gap(layers, labels, centres)
    return add_up(terms)


def hard_images(
    teacher: Teacher,
    schedule: HardImageSchedule,
    beta: float = 10.0,
    gamma: float = 2.0,
    crops: Callable[[Tensor], Tensor] | None = None,
    centres: Centres | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    label: str = "hard images",
    start: Tensor | None = None,
) -> SyntheticImages:
    """Images from N(0, 1) with uniform ``labels``, each batch optimised on its own by :func:`hast_loss`.

    ``start`` (N, 3, H, W), with labels, takes the place of the noise: other images are made to fit further.

    ``crops`` changes the images before the teacher sees them in every second iteration, as published for ImageNet with
    :class:`dfqlib.data.crops.RandomCrops`. Drawn on the CPU, so a seed gives the same start on every device. UserError
    for beta or gamma out of range; Diverged if the loss diverges. Source: HAST, hard sample synthesis; the defaults are
    for CIFAR-10.
    """
    check_range("beta", beta, 0, 10**6)
    check_range("gamma", gamma, 0, 100)
    shape, random, made = teacher.entry.image_shape, torch.Generator().manual_seed(seed), []
    if labels is None:
        labels = torch.randint(teacher.entry.classes, (schedule.images,), generator=random)
    labels = labels.to(teacher.device)
    batches = labels.split(schedule.synthesis_batch)
    with BatchNormInputs(teacher.folded) as norms:

        def loss(labels: Tensor, calls: Iterator[int], images: Tensor) -> Tensor:
            logits = run(teacher.folded, crops(images) if crops and next(calls) % 2 == 0 else images)
            return hast_loss(logits, labels, norms.layers, beta, gamma, centres)

        noise = (torch.randn(len(batch), *shape, generator=random).to(teacher.device) for batch in batches)
        starts = noise if start is None else start.split(schedule.synthesis_batch)
        for number, (batch, images) in enumerate(zip(batches, starts, strict=True), 1):
            of_batch, named = partial(loss, batch, itertools.count(1)), f"{label}, batch {number} of {len(batches)}"
            made.append(synthesise(channels_last(images), of_batch, schedule, named))
    return SyntheticImages(torch.cat([m.images for m in made]), labels, [curve for m in made for curve in m.losses])


def images_of_generator(teacher: Teacher, count: int, iterations: int, seed: int = 0) -> SyntheticImages:
    """``count`` images to be :func:`refined`, of GDFQ's conditional generator after ``iterations`` of 100 images.

    Of more than 64 pixels, 16 images fit in memory, which are GDFQ's batch for ImageNet.
    """
    batch = 100 if teacher.entry.image_shape[-1] <= 64 else 16
    schedule = GeneratorSchedule(generator_iterations=iterations, batch=batch, generator_lr=4e-3, decay="cosine")
    return pool_after_training(gdfq.make_stream(teacher, schedule, seed=seed, conditional=True), count)


def refined(
    teacher: Teacher, some: SyntheticImages, iterations: int, label: str = "refining", mixed: int = 0, seed: int = 0
) -> SyntheticImages:
    """``some`` labelled images, such as a generator's, after ``iterations`` more of Adam at 0.05 by :func:`hast_loss`.

    beta is 1 and gamma 0.5. Mixed labels (N, classes) become their largest class. No paper of the kit has this step;
    GENIE (Jeon et al., CVPR 2023) trains a generator and its latent vectors together to the same end.

    ``mixed`` times they are refined anew for :func:`mixed_labels`, drawn from ``seed``, with gamma 0: all N (1 + mixed)
    images are returned, each with its first label. A teacher is surer of images of one class than of real ones.
    """
    labels = some.labels if some.labels.ndim == 1 else some.labels.argmax(1)
    schedule = HardImageSchedule(synthesis_iterations=iterations, synthesis_lr=0.05, synthesis_patience=iterations)
    random = torch.Generator().manual_seed(seed)
    made = [hard_images(teacher, schedule, 1.0, 0.5, labels=labels, label=label, start=some.images)]
    for number in range(mixed):
        targets, told = mixed_labels(labels, teacher.entry.classes, random), f"{label}, mixed {number + 1} of {mixed}"
        made.append(hard_images(teacher, schedule, 1.0, 0.0, labels=targets, label=told, start=some.images))
    images, losses = torch.cat([each.images for each in made]), [curve for each in made for curve in each.losses]
    return SyntheticImages(images, labels.repeat(1 + mixed), losses)


def mixed_labels(labels: Tensor, classes: int, random: torch.Generator) -> Tensor:
    """Shares (N, classes): of U(0.3, 1) for each of ``labels`` (N,), the rest for another class, drawn on the CPU.

    The kit's, after the superposed classes of Qimera.
    """
    share = 0.3 + 0.7 * torch.rand(len(labels), 1, generator=random)
    others = labels.cpu() + torch.randint(1, classes, (len(labels),), generator=random)
    first, second = (F.one_hot(each % classes, classes) for each in (labels.cpu(), others))
    return (share * first + (1 - share) * second).to(labels.device)


def calibration_centres(teacher: Teacher, schedule: HardImageSchedule, seed: int = 0) -> Centres:
    """One image for each class, fitted to the batch-norm statistics and to its class: L_BNS + CE.

    Source: TexQ (Chen et al., NeurIPS 2023), calibration centres; SaFT's code takes 1500 iterations.
    """
    labels = torch.arange(teacher.entry.classes)
    made = hard_images(teacher, schedule, 1.0, 0.0, seed=seed, labels=labels, label="calibration centres")
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with BatchNormInputs(teacher.folded) as norms, torch.no_grad():
        for images in made.images.split(schedule.synthesis_batch):
            teacher.folded(images)
            for layer in deeper_half(norms.layers):
                parts.setdefault(layer.name, []).append(layer.sample_mean_std())
    statistics = {name: tuple(map(torch.cat, zip(*each, strict=True))) for name, each in parts.items()}
    return Centres(made.images, statistics)
