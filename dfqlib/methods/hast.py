"""HAST (Li et al., CVPR 2023): images that the teacher finds hard, made without a generator.

TexQ's calibration centres can guide them. The fine-tuning that HAST, SynQ and SaFT share is in
:mod:`dfqlib.methods.saft`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.device import channels_last
from dfqlib.errors import check_range
from dfqlib.generators.optimise_images import synthesise
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.loss_terms import add_up
from dfqlib.losses import bns_loss, difficulty
from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs
from dfqlib.models.teacher import Teacher
from dfqlib.schedules import HardImageSchedule, ImageSchedule

# Per data set: beta, the weight of the hard samples' cross-entropy, and gamma, how much more harder samples count.
PUBLISHED = {"cifar10": (10.0, 2.0), "cifar100": (0.1, 0.5)}


@dataclass(frozen=True)
class Centres:
    """TexQ's calibration centres: one image per class, and what enters the deeper half of the batch norms for it.

    ``images`` (classes, 3, H, W); ``statistics``: for each of these batch norms, by name, the channel means and
    standard deviations (classes, C) of the images over space.
    """

    images: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]]


def deeper_half(layers: Sequence[BatchNormInput]) -> Sequence[BatchNormInput]:
    """The second half of ``layers``, in order of execution, with the middle one of an odd number."""
    return layers[len(layers) // 2 :]


def centre_gap(layers: Sequence[BatchNormInput], labels: Tensor, centres: Centres) -> Tensor:
    """Gap of each sample's means and standard deviations to those of its class's centre, mean over the deeper layers.

    ``layers`` as for :func:`dfqlib.losses.bns_loss`; labels (B,). The mean squared errors, over samples and channels,
    of means and of deviations are added. Source: TexQ, calibration centres.
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
    bns_weight: float = 1.0,
    centres: Centres | None = None,
) -> Tensor:
    """L_BNS + beta mean((1 - p_y)^gamma CE(T(x), y)): images with the right statistics; hard samples count most.

    ``teacher_logits`` (B, classes); ``labels`` (B,) integers. ``gamma`` = 0 is plain cross-entropy. ``centres`` add
    0.02 :func:`centre_gap`. Source: HAST, hard sample synthesis.
    """
    cross_entropy = F.cross_entropy(teacher_logits, labels, reduction="none")
    # A root has no slope at 0: where the teacher is sure, the difficulty is held above 0.
    weights = difficulty(teacher_logits, labels).clamp(min=1e-8).pow(gamma)
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
) -> SyntheticImages:
    """Images from N(0, 1) with uniform labels, optimised to fit the batch-norm statistics and to be hard.

    Each batch is optimised on its own by :func:`hast_loss`. ``crops`` changes the images before the teacher sees them
    in every second iteration, as published for ImageNet with :class:`dfqlib.data.crops.RandomCrops`. With ``centres``
    the loss is 0.4 L_BNS + beta hard CE + 0.02 :func:`centre_gap`: TexQ's three weights 0.4, 1, 0.02, read in this
    order. Drawn on the CPU, so a seed gives the same start on every device. UserError for settings out of range;
    Diverged if the loss diverges. Source: HAST, hard sample synthesis; the defaults are for CIFAR-10.
    """
    check_range("beta", beta, 0, 10**6)
    check_range("gamma", gamma, 0, 100)
    guided = {} if centres is None else {"centres": centres, "bns_weight": 0.4}
    loss = partial(hast_loss, beta=beta, gamma=gamma, **guided)
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(teacher.entry.classes, (schedule.images,), generator=random).to(teacher.device)
    batches, made = labels.split(schedule.synthesis_batch), []
    for number, batch in enumerate(batches, 1):
        label = f"hard images, batch {number} of {len(batches)}"
        made.append(_optimise(teacher, batch, random, schedule, loss, label, crops))
    return SyntheticImages(torch.cat([m.images for m in made]), labels, [curve for m in made for curve in m.losses])


def calibration_centres(teacher: Teacher, schedule: ImageSchedule, seed: int = 0) -> Centres:
    """One image for each class, fitted to the batch-norm statistics and to its class: L_BNS + CE.

    Source: TexQ (Chen et al., NeurIPS 2023), calibration centres; SaFT's code takes 1500 iterations.
    """
    classes, random = torch.arange(teacher.entry.classes, device=teacher.device), torch.Generator().manual_seed(seed)
    loss = partial(hast_loss, beta=1.0, gamma=0.0)
    images = _optimise(teacher, classes, random, schedule, loss, "calibration centres").images
    with BatchNormInputs(teacher.folded) as norms, torch.no_grad():
        teacher.folded(images)
        return Centres(images, {layer.name: layer.sample_mean_std() for layer in deeper_half(norms.layers)})


def _optimise(
    teacher: Teacher,
    labels: Tensor,
    random: torch.Generator,
    schedule: ImageSchedule,
    loss: Callable[..., Tensor],
    label: str,
    crops: Callable[[Tensor], Tensor] | None = None,
) -> SyntheticImages:
    """One batch of images for ``labels``, from noise drawn from ``random``, by a ``loss`` such as :func:`hast_loss`."""
    start = torch.randn(len(labels), 3, *[teacher.entry.input_size] * 2, generator=random).to(teacher.device)
    calls = itertools.count(1)
    with BatchNormInputs(teacher.folded) as norms:

        def of_images(images: Tensor) -> Tensor:
            logits = teacher.folded(crops(images) if crops and next(calls) % 2 == 0 else images)
            return loss(logits, labels, norms.layers)

        return synthesise(channels_last(start), of_images, schedule, label)
