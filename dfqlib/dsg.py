"""DSG (Qin et al., CVPR 2021 and TPAMI 2023): samples that differ, to set activation ranges (PTQ) or to tune (QAT)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib import gdfq
from dfqlib.correlation import spatial_correlation_loss
from dfqlib.errors import check_choice, check_range
from dfqlib.finetune import GeneratorStream
from dfqlib.losses import (
    dsg_statistics_loss,
    generator_loss,
    image_prior_loss,
    published_slack_bns_loss,
    sample_weights,
    slack_bns_loss,
)
from dfqlib.models import Teacher
from dfqlib.runtime import channels_last
from dfqlib.statistics import EPSILON, BatchNormInputs, pooled_mean_var, sample_gaps
from dfqlib.synthesis import synthesise
from dfqlib.terms import add_up

SHIFT = 30 / 224  # the image prior rolls images by at most this share of their side; published: 30 of 224 pixels
SPREADS = ("std", "variance")

# The four rules for the activation range of one batch that the published code offers, by their names in it.
RANGE_RULES = {"ema": "sample_mean", "percentile": "percentile", "mse": "mse", "minmax": "minmax"}


@dataclass(frozen=True)
class Parts:
    """What makes samples differ, each to be switched off; ``published=True`` has the published code's quirks instead.

    ``slack``: statistics may stay off by a margin. ``enhancement``: every sample has a layer that it is to fit best.
    ``correlation``: images are to be as little alike as noise is. With all three off what is left is ZeroQ with labels
    and an image prior (PTQ), or GDFQ (QAT). ``published`` changes numbers as :func:`dfqlib.losses.sample_weights` (PTQ)
    and :func:`dfqlib.losses.published_slack_bns_loss` (QAT) tell, and starts PTQ from uniform pixels in place of
    Gaussian ones.
    """

    slack: bool = True
    enhancement: bool = True
    correlation: bool = True
    published: bool = False


class Margins(NamedTuple):
    """How far a layer's statistics may stay off for nothing, in order of execution: of means, and of spreads, (L,)."""

    mean: Tensor
    spread: Tensor


@dataclass(frozen=True)
class NoiseGaps:
    """How far Gaussian noise is from a network's batch-norm statistics.

    Per layer, in order of execution: its name, and for every channel |mean - mu|, |std - sigma| and
    |variance - sigma^2| of the noise, and sigma itself, (C,) each.
    """

    layers: list[str]
    mean: list[Tensor]
    std: list[Tensor]
    variance: list[Tensor]
    sigma: list[Tensor]

    def margins(self, epsilon: float = 0.9, spread: str = "std") -> Margins:
        """The ``epsilon`` quantile (0 to 1) of each layer's gaps over its channels.

        ``spread`` says what the loss compares: ``"std"`` for PTQ, ``"variance"`` for QAT. The larger ``epsilon``, the
        more is allowed; 0 allows what the channel nearest to its statistics needs.
        Source: DSG, slack distribution alignment; 0.9 in the paper.
        """
        check_range("epsilon", epsilon, 0, 1)
        spreads = self.std if check_choice("spread", spread, SPREADS) == "std" else self.variance
        return Margins(*(torch.stack([gap.quantile(epsilon) for gap in gaps]) for gaps in (self.mean, spreads)))

    def no_margins(self) -> Margins:
        """Zeros: nothing is allowed."""
        nothing = torch.zeros(len(self.layers), device=self.mean[0].device)
        return Margins(nothing, nothing)


@torch.no_grad()
def noise_gaps(teacher: Teacher, count: int = 1024, seed: int = 0) -> NoiseGaps:
    """The gaps of ``count`` Gaussian noise images, N(0, 1), taken as one batch, to the teacher's batch-norm statistics.

    Noise is data that anyone has. The authors load their margins from files that they never published.
    UserError for a teacher without batch norms. Source: DSG, slack distribution alignment.
    """
    check_range("noise_images", count, 1, 10**6)
    size, random = teacher.entry.input_size, torch.Generator().manual_seed(seed)
    statistics: dict[tuple[int, str, nn.Module], list[tuple[Tensor, Tensor]]] = {}
    counts = [len(part) for part in torch.arange(count).split(128 if size <= 64 else 32)]
    with BatchNormInputs(teacher.network) as norms:
        for part in counts:
            noise = torch.randn(part, 3, size, size, generator=random).to(teacher.device)
            teacher.network(channels_last(noise))
            for place, layer in enumerate(norms.layers):
                # A batch norm that runs twice in a pass has two places.
                statistics.setdefault((place, layer.name, layer.norm), []).append(layer.mean_var())
    weights = torch.tensor(counts, dtype=torch.float32, device=teacher.device)
    gaps: list[tuple[Tensor, ...]] = []
    for (_, _, norm), parts in statistics.items():
        mean, variance = pooled_mean_var(*(torch.stack(each) for each in zip(*parts, strict=True)), weights)
        std, sigma = (variance + EPSILON).sqrt(), (norm.running_var + EPSILON).sqrt()
        differences = (mean - norm.running_mean, std - sigma, variance - norm.running_var)
        gaps.append((*(difference.abs() for difference in differences), sigma))
    return NoiseGaps([name for _, name, _ in statistics], *(list(each) for each in zip(*gaps, strict=True)))


def layer_weights(parts: Parts, layers: int, samples: int, device: torch.device) -> Tensor:
    """:func:`dfqlib.losses.sample_weights`, (layers, samples), or ones without enhancement."""
    if not parts.enhancement:
        return torch.ones(layers, samples, device=device)
    return sample_weights(layers, samples, parts.published).to(device)


class CorrelationWithNoise:
    """The spatial correlation loss of images, against fresh Gaussian noise at each call, over the number of layers."""

    def __init__(self, layers: int, device: torch.device, seed: int) -> None:
        # Another stream than that of the images' own start, or both would begin as the same noise.
        self.layers, self.random = layers, torch.Generator(device).manual_seed(seed + 2)

    def __call__(self, images: Tensor) -> Tensor:
        noise = torch.randn(images.shape, generator=self.random, device=images.device)
        return spatial_correlation_loss(images, noise) / self.layers

    def state_dict(self) -> dict[str, Tensor]:
        """The noise to come."""
        return {"random": self.random.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the noise that :meth:`state_dict` tells."""
        self.random.set_state(state["random"])


def start_images(batch: int, size: int, seed: int = 0, published: bool = False) -> Tensor:
    """Where synthesis starts: (batch, 3, size, size), N(0, 1), or as published uniform in [0, 1). Drawn on the CPU."""
    check_range("batch", batch, 2, 10**6)  # one sample is like no other
    draw = torch.rand if published else torch.randn
    return draw(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def synthesise_diverse(
    teacher: Teacher,
    gaps: NoiseGaps,
    epsilon: float = 0.9,
    parts: Parts = Parts(),
    batch: int = 40,
    iterations: int = 500,
    learning_rate: float = 0.9,
    patience: int = 260,
    min_learning_rate: float = 1e-4,
    label_weight: float = 2.0,
    prior_weight: float = 0.01,
    seed: int = 0,
    label: str = "",
) -> tuple[Tensor, Tensor, list[float]]:
    """Images for PTQ (batch, 3, H, W), normalised; the labels (batch,) they were asked for; the loss before each step.

    loss = aligned statistics + spatial correlation / L + label_weight CE to random labels + prior_weight image prior,
    the last on a copy rolled by a random offset; see ``dfqlib.losses``. A weight of 0 drops its term. ``gaps`` are
    those of :func:`noise_gaps`, and ``label`` names the loop. The defaults are those of the published script.
    UserError if a setting is out of range; Diverged if the loss diverges. Source: DSG, and its official code.
    """
    for name, weight in (("label_weight", label_weight), ("prior_weight", prior_weight)):
        check_range(name, weight, 0, 10**6)
    size, device = teacher.entry.input_size, teacher.device
    images = channels_last(start_images(batch, size, seed, parts.published).to(device))
    random = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(teacher.entry.classes, (batch,), generator=random).to(device)
    shift = max(1, round(SHIFT * size))
    margins = gaps.margins(epsilon) if parts.slack else gaps.no_margins()
    layers = len(gaps.layers)
    weights = layer_weights(parts, layers, batch, device)
    correlation = CorrelationWithNoise(layers, device, seed)
    with BatchNormInputs(teacher.folded) as norms:

        def loss(images: Tensor) -> Tensor:
            logits = teacher.folded(images)
            terms = {"statistics": dsg_statistics_loss(images, norms.layers, margins, weights)}
            if parts.correlation:
                terms["correlation"] = correlation(images)
            if label_weight:
                terms["CE"] = label_weight * F.cross_entropy(logits, labels)
            if prior_weight:
                offset = int(torch.randint(-shift, shift, (1,), generator=random))  # on the CPU: no device waits
                terms["image prior"] = prior_weight * image_prior_loss(images, offset)
            return add_up(terms)

        settings = (learning_rate, iterations, patience, min_learning_rate)
        images, losses = synthesise(images, loss, *settings, label or f"{batch} diverse images")
    return images, labels, losses


def make_stream(
    teacher: Teacher,
    schedule: gdfq.Schedule,
    gaps: NoiseGaps,
    epsilon: float = 0.9,
    parts: Parts = Parts(),
    seed: int = 0,
) -> GeneratorStream:
    """QAT: GDFQ's generator, with the slack L_BNS in place of L_BNS and the spatial correlation beside it.

    See :func:`dfqlib.gdfq.make_stream`; ``gaps`` are those of :func:`noise_gaps`. With all parts off this is GDFQ.
    Source: DSG (TPAMI 2023), data-free quantization-aware training.
    """
    layers = len(gaps.layers)
    margins = gaps.margins(epsilon, "variance") if parts.slack else gaps.no_margins()
    if parts.published:
        statistics_loss = partial(published_slack_bns_loss, margins=margins, enhance=parts.enhancement)
    else:
        weights = layer_weights(parts, layers, schedule.batch, teacher.device)
        statistics_loss = partial(slack_bns_loss, margins=margins, weights=weights)
    loss = partial(generator_loss, bns_weight=schedule.bns_weight, statistics_loss=statistics_loss)
    correlation = CorrelationWithNoise(layers, teacher.device, seed) if parts.correlation else None
    return gdfq.make_stream(teacher, schedule, loss, seed, image_loss=correlation)


@torch.no_grad()
def share_within(network: nn.Module, images: Tensor, margins: Margins) -> list[float]:
    """Per batch norm, in order of execution, the share of all samples' channel means that the margin leaves alone.

    ``images`` (B, 3, H, W), normalised; ``margins`` of :meth:`NoiseGaps.margins`.
    """
    with BatchNormInputs(network) as norms:
        network(images)
        layers = zip(norms.layers, margins.mean, strict=True)
        within = (sample_gaps([layer])[0].abs() <= margin for layer, margin in layers)
        return [each.float().mean().item() for each in within]


@torch.no_grad()
def deviations(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Per batch norm, in order of execution, how far each sample's channel means are off, in sigma: (B, C).

    (m - mu) / sigma for ``images`` (B, 3, H, W), normalised. If a column holds one value, all samples are the same in
    that channel: homogenisation at the distribution level.
    """
    with BatchNormInputs(network) as norms:
        network(images)
        return {
            layer.name: sample_gaps([layer])[0] / (layer.norm.running_var + layer.norm.eps).sqrt()
            for layer in norms.layers
        }


def spread(deviations: dict[str, Tensor]) -> dict[str, float]:
    """Per batch norm, how much samples differ: root mean square, over channels, of the standard deviation over samples.

    In sigma, from what :func:`deviations` gives; at least two samples.
    """
    return {name: values.var(0).mean().sqrt().item() for name, values in deviations.items()}
