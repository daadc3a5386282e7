"""The losses of the papers, one short function each.

``layers`` is what :class:`dfqlib.statistics.BatchNormInputs` collected in the forward pass of the teacher: for every
batch norm, in execution order, the statistics of what entered it, and the module with those of the training data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfqlib.statistics import (
    Layer,
    batch_gaps,
    by_layer,
    over_channels,
    sample_gaps,
    sample_mean_square,
    sample_mean_std,
)
from dfqlib.terms import add_up


def zeroq_statistics_loss(images: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Squared gap of each sample's channel means and standard deviations to the batch-norm statistics.

    ``images`` (B, 3, H, W) normalised, compared with mean 0 and standard deviation 1; what enters each batch norm with
    its running mean and variance. Sums over channels and layers, mean over the batch.
    Source: ZeroQ, generation of distilled data.
    """
    mean, std = sample_mean_std(images)
    of_images = mean.square().sum() + (1 - std).square().sum()
    mean_gaps, std_gaps = sample_gaps(layers)
    return (of_images + mean_gaps.square().sum() + std_gaps.square().sum()) / len(images)


def bns_loss(layers: Sequence[Layer]) -> Tensor:
    """L_BNS: gap of the batch's means and variances to the batch-norm statistics, mean over channels and layers.

    The mean and the biased variance, over everything but channels, of what enters each batch norm are compared with its
    running mean and running variance by mean squared error. Source: GDFQ, knowledge matching generator.
    """
    mean_gaps, variance_gaps = batch_gaps(layers)
    return mean_of_layers(mean_gaps.square() + variance_gaps.square(), layers)


def mean_of_layers(values: Tensor, layers: Sequence[Layer]) -> Tensor:
    """Mean over layers of the mean over each one's channels; ``values`` (sum of C,) of all channels side by side."""
    return torch.stack([of_layer.mean() for of_layer in by_layer(values, layers)]).mean()


def generator_loss(
    teacher_logits: Tensor,
    labels: Tensor,
    layers: Sequence[Layer],
    ce_weight: float = 1.0,
    bns_weight: float = 0.1,
    statistics_loss: Callable[[Sequence[Layer]], Tensor] = bns_loss,
) -> Tensor:
    """L_G = CE(T(x), y) + 0.1 L_BNS: images the teacher names as asked, with the statistics it was trained on.

    ``teacher_logits`` (B, classes); ``labels`` (B,) integers or (B, classes) probabilities. A weight of 0 drops its
    term; ``statistics_loss`` takes the place of L_BNS. Source: GDFQ, knowledge matching generator.
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
    terms = {}
    if ce_weight:
        terms["CE"] = ce_weight * F.cross_entropy(student_logits, labels)
    if kl_weight:
        terms["KL"] = kl_weight * distillation_kl(teacher_logits, student_logits, temperature, mean_over_classes)
    return add_up(terms)


def difficulty(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - p_y (B,): how little of the probability goes to the label, 0 for an easy sample and 1 for a hopeless one.

    ``logits`` (B, classes), ``labels`` (B,) integers. Source: HAST, hard sample synthesis.
    """
    return 1 - logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def hast_loss(
    teacher_logits: Tensor,
    labels: Tensor,
    layers: Sequence[Layer],
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


def selective_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, easy_below: float = 0.5
) -> Tensor:
    """CE(S(x), y), mean over the samples whose difficulty for the teacher is under ``easy_below``; 0 if there are none.

    Logits (B, classes), labels (B,) integers. The teacher errs on hard samples, so their hard labels mislead; they are
    learned from its soft ones alone. Above 1 every sample counts. Source: SynQ, soft labels for difficult samples.
    """
    easy = (difficulty(teacher_logits, labels) < easy_below).to(student_logits.dtype)
    losses = F.cross_entropy(student_logits, labels, reduction="none")
    return (easy * losses).sum() / easy.sum().clamp(min=1)


def channel_attention(features: Tensor) -> Tensor:
    """How much of the energy of ``features`` (B, C, h, w) each channel holds: (B, C), each row of length 1.

    The mean of the squares over space, normalised. Source: HAST, feature alignment.
    """
    return F.normalize(sample_mean_square(features), dim=1)


def attention_gap(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """FA: the mean squared gap between channel attentions (B, C), summed over the residual units.

    ``student`` and ``teacher`` hold one attention per unit, in the same order; at least one.
    Source: HAST, feature alignment.
    """
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).sum()


def slack(gap: Tensor, margin: Tensor | float) -> Tensor:
    """max(|gap| - margin, 0): how far a gap exceeds what is allowed. Source: DSG, slack distribution alignment."""
    return (gap.abs() - margin).clamp(min=0)


def slack_squares(gaps: tuple[Tensor, Tensor], margins: tuple[Tensor, Tensor], layers: Sequence[Layer]) -> Tensor:
    """How far gaps of means and of spreads, (..., sum of C) each, exceed their layers' margins (L,): squares, added."""
    of_means, of_spreads = (
        slack(gap, over_channels(margin, layers)).square() for gap, margin in zip(gaps, margins, strict=True)
    )
    return of_means + of_spreads


def sample_weights(layers: int, samples: int, published: bool = False) -> Tensor:
    """How often the loss of each sample counts in each layer, (layers, samples): twice where i mod L = l, else once.

    So every sample has a layer of its own, which it is to fit best. ``published=True`` is the quirk of DSG's
    post-training code: only the first 20 samples have a layer, whatever the number of layers, and as the gap itself is
    doubled their loss counts four times. Source: DSG, layerwise sample enhancement.
    """
    own, each = torch.arange(layers).unsqueeze(1), torch.arange(samples)
    if published:
        return 1.0 + 3.0 * ((own == each) & (each < 20))
    return 1.0 + (own == each % layers)


def dsg_statistics_loss(
    images: Tensor, layers: Sequence[Layer], margins: tuple[Tensor, Tensor], weights: Tensor
) -> Tensor:
    """ZeroQ's loss with slack: gaps of each sample's means and standard deviations, as far as they exceed the margins.

    ``images`` (B, 3, H, W) normalised, compared with mean 0 and standard deviation 1 without a margin; each batch
    norm's input (B, C, h, w) with its running mean and variance. ``margins``: of means and of standard deviations, one
    value a layer each, (L,); ``weights`` (L, B), see :func:`sample_weights`. Zeros and ones switch these off. Sums over
    channels and layers, mean over the batch. Source: DSG, slack distribution alignment and layerwise enhancement.
    """
    mean, std = sample_mean_std(images)
    of_images = mean.square().sum() + (1 - std).square().sum()
    squares = slack_squares(sample_gaps(layers), margins, layers)
    return (of_images + (over_channels(weights.T, layers) * squares).sum()) / len(images)


def slack_bns_loss(layers: Sequence[Layer], margins: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """L_BNS with slack: gaps of the batch's means and variances, as far as they exceed the margins.

    ``margins``: of means and of variances, (L,) each. A batch has no gap of one sample to enhance, so a sample that
    counts twice by ``weights`` (L, B) enters that layer's mean and variance twice, and with it the gradient. Zeros and
    ones give L_BNS. Source: DSG, slack distribution alignment and layerwise enhancement, for a generator.
    """
    return mean_of_layers(slack_squares(batch_gaps(layers, weights), margins, layers), layers)


def published_slack_bns_loss(layers: Sequence[Layer], margins: tuple[Tensor, Tensor], enhance: bool = True) -> Tensor:
    """The slack L_BNS as the published code of DSG's fine-tuning has it, with its quirks; ``margins`` (L,) each.

    | |gap| - margin | leaves no slack at all: a gap of just the margin is sought. In layer l channel l, not sample l,
    counts twice (its gap times the root of 2). Squares are summed over channels, not averaged, so the term is some
    C times larger than GDFQ's. Source: the official code.
    """
    (mean_gaps, variance_gaps), (of_mean, of_variance) = batch_gaps(layers), margins
    squares = (mean_gaps.abs() - over_channels(of_mean, layers)).square()
    squares = squares + (variance_gaps.abs() - over_channels(of_variance, layers)).square()
    # Channel l of layer l; none where a layer has fewer channels.
    own = [part[index : index + 1] for index, part in enumerate(by_layer(squares, layers))] if enhance else []
    return torch.cat([squares, *own]).sum() / len(layers)


def image_prior_loss(images: Tensor, shift: int) -> Tensor:
    """Total variation plus mean length of ``images`` (B, 3, H, W), after rolling both axes by ``shift`` pixels.

    Total variation: the Euclidean norms, over the whole batch, of the differences to the neighbours right, below and on
    both diagonals. Source: DSG's post-training code, after DeepInversion.
    """
    images = images.roll((shift, shift), (2, 3))
    differences = (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., 1:, :-1] - images[..., :-1, 1:],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )
    return torch.stack([difference.norm() for difference in differences]).sum() + images.flatten(1).norm(dim=1).mean()
