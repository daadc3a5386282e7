"""The losses that several papers share; a loss of one paper only is in that paper's module.

``layers`` are what :class:`dfqlib.models.batch_norm_statistics.BatchNormInputs` collected in the teacher.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.loss_terms import add_up
from dfqlib.models.batch_norm_statistics import BatchNormInput, batch_gaps, by_layer


def bns_loss(layers: Sequence[BatchNormInput]) -> Tensor:
    """L_BNS: squared gaps of the batch's means and biased variances to the batch-norm statistics, added.

    Mean over channels, then over layers. Source: GDFQ, knowledge matching generator.
    """
    mean_gaps, variance_gaps = batch_gaps(layers)
    return mean_of_layers(mean_gaps.square() + variance_gaps.square(), layers)


def mean_of_layers(values: Tensor, layers: Sequence[BatchNormInput]) -> Tensor:
    """Mean over layers of the mean over channels; ``values`` (sum of C,) hold the channels of all layers in a row."""
    return torch.stack([of_layer.mean() for of_layer in by_layer(values, layers)]).mean()


def generator_loss(
    teacher_logits: Tensor,
    labels: Tensor,
    layers: Sequence[BatchNormInput],
    ce_weight: float = 1.0,
    bns_weight: float = 0.1,
    statistics_loss: Callable[[Sequence[BatchNormInput]], Tensor] = bns_loss,
) -> Tensor:
    """L_G = CE(T(x), y) + 0.1 L_BNS; ``statistics_loss`` replaces L_BNS, a weight of 0 drops its term.

    ``teacher_logits`` (B, classes); ``labels`` (B,) integers or (B, classes) probabilities.
    Source: GDFQ, knowledge matching generator.
    """
    terms = {}
    if ce_weight:
        terms["CE"] = ce_weight * F.cross_entropy(teacher_logits, labels)
    if bns_weight:
        terms["L_BNS"] = bns_weight * statistics_loss(layers)
    return add_up(terms)


def distillation_kl(
    teacher_logits: Tensor, student_logits: Tensor, temperature: float = 20.0, mean_over_classes: bool = False
) -> Tensor:
    """tau^2 KL(softmax(T / tau) || softmax(S / tau)) in nats, mean over the batch; logits (B, classes).

    ``mean_over_classes=True`` is a quirk of the released code: ``KLDivLoss`` with reduction "mean" also divides by the
    number of classes. Source: GDFQ, fine-tuning with fake data.
    """
    student, teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
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
    """L_S = CE(S(x), y) + alpha tau^2 KL(T || S); ``kl_weight`` is alpha, a weight of 0 drops its term.

    Logits (B, classes); labels (B,) integers or (B, classes) probabilities. Source: GDFQ, fine-tuning with fake data.
    """
    terms = {}
    if ce_weight:
        terms["CE"] = ce_weight * F.cross_entropy(student_logits, labels)
    if kl_weight:
        terms["KL"] = kl_weight * distillation_kl(teacher_logits, student_logits, temperature, mean_over_classes)
    return add_up(terms)


def difficulty(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - p_y (B,), p_y the probability of the label: 0 for an easy sample, 1 for the hardest.

    ``logits`` (B, classes), ``labels`` (B,) integers or (B, classes) shares. Source: HAST, hard sample synthesis.
    """
    p = logits.softmax(1)
    return 1 - (p.gather(1, labels[:, None]).squeeze(1) if labels.dim() == 1 else (labels * p).sum(1))
