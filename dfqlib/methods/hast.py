"""HAST (Li et al., CVPR 2023): images that the teacher finds hard, made without a generator.

TexQ's calibration centres can guide them. The fine-tuning that HAST, SynQ and SaFT share is in :mod:`dfqlib.saft`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.device import channels_last
from dfqlib.errors import check_range
from dfqlib.generators.optimise_images import synthesise
from dfqlib.loss_terms import add_up
from dfqlib.losses import bns_loss, difficulty
from dfqlib.models.batch_norm_statistics import BatchNormInput, BatchNormInputs
from dfqlib.models.teacher import Teacher


def hast_loss(
    teacher_logits: Tensor,
    labels: Tensor,
    layers: Sequence[BatchNormInput],
    beta: float = 10.0,
    gamma: float = 2.0,
    bns_weight: float = 1.0,
) -> Tensor:
    """L_BNS + beta mean((1 - p_y)^gamma CE(T(x), y)): images with the right statistics, hard samples counting most.

    ``teacher_logits`` (B, classes); ``labels`` (B,) integers. ``gamma`` = 0 is plain cross-entropy.
    Source: HAST, hard sample synthesis.
    """
    cross_entropy = F.cross_entropy(teacher_logits, labels, reduction="none")
    # A root of 0 has no slope: where the teacher is sure, the difficulty is held above 0.
    weights = difficulty(teacher_logits, labels).clamp(min=1e-8).pow(gamma)
    hard = (weights * cross_entropy).mean()
    return add_up({"L_BNS": bns_weight * bns_loss(layers), "hard CE": beta * hard})


# Per data set: beta, the weight of the hard samples' cross-entropy, and gamma, how much harder samples count.
PUBLISHED = {"cifar10": (10.0, 2.0), "cifar100": (0.1, 0.5)}


@dataclass(frozen=True)
class HardImages:
    """Images (N, 3, H, W), normalised, labels (N,), and the losses of each batch they were made in."""

    images: Tensor
    labels: Tensor
    losses: list[list[float]]


@dataclass(frozen=True)
class Centres:
    """TexQ's calibration centres: one image per class, and what enters the deeper half of the batch norms for it.

    ``images`` (classes, 3, H, W); ``statistics``: for each of these batch norms, by name, the channel means and
    standard deviations (classes, C) of the images over space.
    """

    images: Tensor
    statistics: dict[str, tuple[Tensor, Tensor]]


def hard_images(
    teacher: Teacher,
    count: int = 5120,
    beta: float = 10.0,
    gamma: float = 2.0,
    batch: int = 256,
    iterations: int = 1000,
    learning_rate: float = 0.5,
    patience: int = 50,
    min_learning_rate: float = 1e-4,
    crops: Callable[[Tensor], Tensor] | None = None,
    centres: Centres | None = None,
    seed: int = 0,
) -> HardImages:
    """``count`` images from N(0, 1) with uniform labels, made to fit the batch-norm statistics and to be hard.

    Each ``batch`` is optimised on its own (:func:`dfqlib.losses.hast_loss`). ``crops`` changes the images before the
    teacher sees them in every second iteration, as published for ImageNet with :class:`dfqlib.crops.RandomCrops`. With
    ``centres`` the loss is 0.4 L_BNS + beta hard + 0.02 :func:`centre_gap`; TexQ's three weights 0.4, 1, 0.02 are read
    in this order. Drawn on the CPU, so a seed gives the same start on every device. UserError for settings out of
    range; Diverged if the loss diverges. Source: HAST, hard sample synthesis; the defaults are for CIFAR-10.
    """
    check_range("count", count, 1, 10**7)
    check_range("batch", batch, 2, 2**20)
    check_range("beta", beta, 0, 10**6)
    check_range("gamma", gamma, 0, 100)
    random = torch.Generator().manual_seed(seed)
    made, losses = [], []
    labels = torch.randint(teacher.entry.classes, (count,), generator=random).to(teacher.device)
    for number, part in enumerate(labels.split(batch), 1):
        start = torch.randn(len(part), 3, *[teacher.entry.input_size] * 2, generator=random)
        with BatchNormInputs(teacher.folded) as norms:
            loss = _Loss(teacher, norms, part, beta, gamma, crops, centres)
            label = f"hard images, batch {number} of {-(-count // batch)}"
            images, curve = _optimise(
                start, teacher, loss, learning_rate, iterations, patience, min_learning_rate, label
            )
        made.append(images)
        losses.append(curve)
    return HardImages(torch.cat(made), labels, losses)


def calibration_centres(
    teacher: Teacher,
    iterations: int = 1500,
    learning_rate: float = 0.5,
    patience: int = 50,
    min_learning_rate: float = 1e-4,
    seed: int = 0,
) -> Centres:
    """One image for each class, fitted to the batch-norm statistics and to its class: L_BNS + CE.

    Source: TexQ (Chen et al., NeurIPS 2023), calibration centres, as SaFT's code has them.
    """
    classes = torch.arange(teacher.entry.classes, device=teacher.device)
    start = torch.randn(len(classes), 3, *[teacher.entry.input_size] * 2, generator=torch.Generator().manual_seed(seed))
    with BatchNormInputs(teacher.folded) as norms:
        loss = _Loss(teacher, norms, classes, beta=1.0, gamma=0.0)
        images, _ = _optimise(
            start, teacher, loss, learning_rate, iterations, patience, min_learning_rate, "calibration centres"
        )
        with torch.no_grad():
            teacher.folded(images)
            statistics = {layer.name: layer.sample_mean_std() for layer in deeper_half(norms.layers)}
    return Centres(images, statistics)


def deeper_half(layers: Sequence[BatchNormInput]) -> Sequence[BatchNormInput]:
    """The second half of ``layers``, in execution order; the middle one of an odd number belongs to it."""
    return layers[len(layers) // 2 :]


def centre_gap(layers: Sequence[BatchNormInput], labels: Tensor, centres: Centres) -> Tensor:
    """Gap of each sample's means and standard deviations to those of its class's centre, mean over the deeper layers.

    ``layers`` as for :func:`dfqlib.losses.bns_loss`; labels (B,). Each gap is a mean squared error over samples and
    channels; those of means and deviations add up. Source: TexQ, calibration centres.
    """
    gaps = []
    for layer in deeper_half(layers):
        (mean, std), (centre_mean, centre_std) = layer.sample_mean_std(), centres.statistics[layer.name]
        gaps.append(F.mse_loss(mean, centre_mean[labels]) + F.mse_loss(std, centre_std[labels]))
    return torch.stack(gaps).mean()


class _Loss:
    """The loss of one batch of images, as :func:`dfqlib.synthesis.synthesise` calls it."""

    def __init__(
        self,
        teacher: Teacher,
        norms: BatchNormInputs,
        labels: Tensor,
        beta: float,
        gamma: float,
        crops: Callable[[Tensor], Tensor] | None = None,
        centres: Centres | None = None,
    ) -> None:
        self.teacher, self.norms, self.labels = teacher, norms, labels
        self.beta, self.gamma, self.crops, self.centres = beta, gamma, crops, centres
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        seen = self.crops(images) if self.crops and self.calls % 2 == 0 else images
        logits = self.teacher.folded(seen)
        bns_weight = 1.0 if self.centres is None else 0.4
        loss = hast_loss(logits, self.labels, self.norms.layers, self.beta, self.gamma, bns_weight)
        if self.centres is not None:
            gap = 0.02 * centre_gap(self.norms.layers, self.labels, self.centres)
            loss = add_up({"": loss, "gap to the centres": gap})
        return loss


def _optimise(start: Tensor, teacher: Teacher, loss: _Loss, *settings: float | str) -> tuple[Tensor, list[float]]:
    """:func:`dfqlib.synthesis.synthesise` on the teacher's device and in its memory format."""
    return synthesise(channels_last(start.to(teacher.device)), loss, *settings)
