"""The losses of ZeroQ and GDFQ, one short function each.

``layers`` is what :class:`dfqlib.statistics.BatchNormInputs` collected in the forward pass of the teacher: for every
batch norm, in execution order, its name, the tensor that entered it, and the module with the statistics of the
training data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.statistics import Layer, batch_mean_var, sample_mean_std

EPSILON = 1e-6  # under the root of every standard deviation of ZeroQ's loss


def zeroq_statistics_loss(images: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Squared gap of each sample's channel means and standard deviations to the batch-norm statistics.

    ``images`` (B, 3, H, W) normalised, compared with mean 0 and standard deviation 1; each batch norm's input
    (B, C, h, w) with its running mean and variance. Sums over channels and layers, mean over the batch.
    Source: ZeroQ, generation of distilled data.
    """
    mean, std = sample_mean_std(images)
    total = mean.square().sum() + (1 - std).square().sum()
    for _, inputs, norm in layers:
        mean, std = sample_mean_std(inputs)
        total = total + (norm.running_mean - mean).square().sum()
        total = total + ((norm.running_var + EPSILON).sqrt() - std).square().sum()
    return total / len(images)


def bns_loss(layers: Sequence[Layer]) -> Tensor:
    """L_BNS: gap of the batch's means and variances to the batch-norm statistics, mean over channels and layers.

    Each input is (B, C, ...); its mean and biased variance over everything but channels are compared with the running
    mean and the running variance by mean squared error. Source: GDFQ, knowledge matching generator.
    """
    gaps = []
    for _, inputs, norm in layers:
        mean, variance = batch_mean_var(inputs)
        gaps.append(F.mse_loss(mean, norm.running_mean) + F.mse_loss(variance, norm.running_var))
    return torch.stack(gaps).mean()


def generator_loss(
    teacher_logits: Tensor, labels: Tensor, layers: Sequence[Layer], ce_weight: float = 1.0, bns_weight: float = 0.1
) -> Tensor:
    """L_G = CE(T(x), y) + 0.1 L_BNS: images the teacher names as asked, with the statistics it was trained on.

    ``teacher_logits`` (B, classes); ``labels`` (B,) integers or (B, classes) probabilities. A weight of 0 drops its
    term. Source: GDFQ, knowledge matching generator.
    """
    terms = []
    if ce_weight:
        terms.append(ce_weight * F.cross_entropy(teacher_logits, labels))
    if bns_weight:
        terms.append(bns_weight * bns_loss(layers))
    return torch.stack(terms).sum()


def distillation_kl(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 20.0, mean_over_classes: bool = False
) -> Tensor:
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) in nats, mean over the batch; logits are (B, classes).

    ``mean_over_classes=True`` is the published quirk: ``KLDivLoss`` with reduction "mean" divides by the number of
    classes as well, so the term is that much smaller than written. Source: GDFQ, fine-tuning with fake data.
    """
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    student = F.log_softmax(student_logits / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return temperature**2 * divergence / (teacher.shape[1] if mean_over_classes else 1)


def student_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 20.0,
    mean_over_classes: bool = False,
) -> Tensor:
    """L_S = CE(S(x), y) + alpha tau^2 KL(T || S): the student agrees with the label and with the teacher.

    Logits are (B, classes), labels (B,) integers or (B, classes) probabilities; ``kl_weight`` is the paper's alpha.
    A weight of 0 drops its term. Source: GDFQ, fine-tuning with fake data.
    """
    terms = []
    if ce_weight:
        terms.append(ce_weight * F.cross_entropy(student_logits, labels))
    if kl_weight:
        terms.append(kl_weight * distillation_kl(teacher_logits, student_logits, temperature, mean_over_classes))
    return torch.stack(terms).sum()
