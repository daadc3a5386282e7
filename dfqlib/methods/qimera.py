"""Qimera (Choi et al., NeurIPS 2021): images of several classes at once, from a generator fed with mixed embeddings.

GDFQ with another input to the generator: everything else, the body, the losses and the fine-tuning, is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.errors import check_choice
from dfqlib.finetuning.streams import GeneratorStream
from dfqlib.generators.networks import Generator, GeneratorBody
from dfqlib.methods import gdfq
from dfqlib.models.features import classifier
from dfqlib.models.teacher import Teacher
from dfqlib.schedules import GeneratorSchedule, Mixture
from dfqlib.settings import setting

EPSILON = 1e-5  # beside the variance of an embedding
MAPPED = {32: 64, 224: 100}  # features after the disentanglement mapping, by image size
EMBEDDINGS = ("random", "teacher")


@dataclass(frozen=True, kw_only=True)
class SuperpositionSettings(Mixture):
    """What is superposed, and where the class embeddings start: random, or as the teacher's last weights."""

    embedding: str = setting("random", choices=EMBEDDINGS)


# Per model: the published p, k and start of the embeddings for 4 and for 5 bits. Source: the official scripts.
PUBLISHED = {
    "resnet20_cifar10": (
        (0.4, 2, "random"),
        (0.4, 2, "random"),
    ),
    "resnet20_cifar100": (
        (0.4, 10, "teacher"),
        (0.4, 50, "teacher"),
    ),
    "resnet18": (
        (0.4, 500, "random"),
        (0.4, 100, "random"),
    ),
    "resnet50": (
        (0.7, 500, "teacher"),
        (0.7, 100, "teacher"),
    ),
    "mobilenetv2_w1": (
        (0.4, 100, "random"),
        (0.4, 100, "random"),
    ),
}


def published_setting(model: str, bits: BitWidths) -> SuperpositionSettings:
    """The published setting of ``model`` at ``bits``.

    Those for 4 bits serve fewer bits too, those for 5 bits more: the paper has no others. A model without published
    settings takes the ones of CIFAR-10.
    """
    four, five = PUBLISHED.get(model, PUBLISHED["resnet20_cifar10"])
    p, k, embedding = four if min(bits.weight, bits.activation) <= 4 else five
    return SuperpositionSettings(p=p, k=k, embedding=embedding)


def standardise(embeddings: Tensor, over_batch: bool = False) -> Tensor:
    """Every vector of ``embeddings`` (B, K, D) with mean 0 and variance 1 over its own D entries.

    ``over_batch=True`` is the published quirk: a transpose puts slot k where channels belong, so mean and variance are
    slot k's over the whole batch, (B, D) entries each. Source: Qimera, section 4.2.
    """
    dims = (0, 2) if over_batch else (2,)
    variance, mean = torch.var_mean(embeddings, dims, correction=0, keepdim=True)
    return (embeddings - mean) * (variance + EPSILON).rsqrt()


def soft_targets(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """sum_k lambda_k onehot(y_k), (B, classes), for labels and weights (B, K): repeated labels add up.

    Source: Qimera, section 4.1, equation 4.
    """
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


class QimeraGenerator(nn.Module):
    """Noise z (B, K, latent), labels and weights (B, K) to images (B, 3, size, size): sum_k lambda_k map(e_k).

    e_k = standardise(E[y_k] + z_k), with one trained embedding per class, which starts from ``embeddings``
    (classes, latent), and map one linear layer to ``mapped`` features (the disentanglement mapping). ``conditional``
    as for GDFQ's generator; gain and bias are then superposed like the embeddings.

    ``published=True`` does as the published scripts do instead of as the paper says: no mapping, superposed batches
    standardised slot by slot over the batch, and gain and bias of the conditional batch norms averaged over k, which
    makes them k times too small. Source: Qimera, sections 4.1 to 4.3.
    """

    def __init__(
        self, embeddings: Tensor, size: int = 32, mapped: int = 64, conditional: bool = False, published: bool = False
    ) -> None:
        super().__init__()
        self.classes, self.latent = embeddings.shape
        self.published = published
        self.embedding = nn.Embedding.from_pretrained(embeddings.clone(), freeze=False)
        self.mapping = nn.Identity() if published else nn.Linear(self.latent, mapped)
        features = self.latent if published else mapped
        self.body = GeneratorBody(features, size, self.classes if conditional else None)

    def forward(self, z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        slots = labels.shape[1]
        each = standardise(self.embedding(labels) + z, over_batch=self.published and slots > 1)
        # The mapping is affine and the weights add up to 1, so it may follow the sum: K times less work.
        latent = self.mapping((weights.unsqueeze(1) @ each).squeeze(1))
        targets = soft_targets(labels, weights, self.classes)
        return self.body(latent, targets / slots if self.published else targets)


class Superposition:
    """Draws the generator's input: with probability ``p`` a batch of ``k`` classes per sample, otherwise of one.

    Called with (generator, count, random), it returns noise (count, K, latent), uniform labels (count, K) and weights
    (count, K), softmax of N(0, 1), K being k or 1; and the soft targets (count, classes). Whether a batch is superposed
    is drawn on the CPU from a stream of its own, seeded with ``seed``, so that nobody waits for the device.
    Source: Qimera, section 4.1, equations 3 and 4.
    """

    def __init__(self, p: float, k: int, seed: int = 0) -> None:
        self.p, self.k = p, k
        self.coin = torch.Generator().manual_seed(seed)

    def __call__(
        self, generator: QimeraGenerator, count: int, random: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        superposed = torch.rand((), generator=self.coin).item() < self.p
        slots = (count, self.k if superposed else 1)
        z = torch.randn(*slots, generator.latent, generator=random, device=random.device)
        labels = torch.randint(generator.classes, slots, generator=random, device=random.device)
        weights = torch.randn(slots, generator=random, device=random.device).softmax(1)
        return (z, labels, weights), soft_targets(labels, weights, generator.classes)


def path_between(pairs: Tensor, steps: int, latent: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the generator on the straight path from one class to another, for every pair of labels (P, 2).

    P * steps samples, pair by pair: noise (., 2, latent), which stays the same along a path, labels (., 2), and weights
    (., 2), the second's from 0 to 1. Source: Qimera, figure 3.
    """
    z = torch.randn(len(pairs), 2, latent, generator=random, device=random.device)
    share = torch.linspace(0, 1, steps, device=random.device).repeat(len(pairs))
    weights = torch.stack([1 - share, share], dim=1)
    return z.repeat_interleave(steps, 0), pairs.to(random.device).repeat_interleave(steps, 0), weights


def mix_in_gdfq(generator: Generator, z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What GDFQ's ``generator`` makes of a mixture it was not trained for: images (B, 3, size, size).

    Noise z (B, latent); the embeddings of ``labels`` (B, K), or the gains and biases they choose, are mixed by
    ``weights`` (B, K).
    """
    targets = soft_targets(labels, weights, generator.classes)
    return generator.body(z if generator.embedding is None else (targets @ generator.embedding.weight) * z, targets)


def class_embeddings(teacher: Teacher, start: str) -> Tensor:
    """Where the embeddings (classes, features) start: the ``"teacher"``'s last weights, or ``"random"`` N(0, 1).

    Source: Qimera, section 4.2: the weights of a class point to where its features lie.
    """
    weight = classifier(teacher.network).weight.detach().flatten(1)
    return weight if check_choice("embedding", start, EMBEDDINGS) == "teacher" else torch.randn(weight.shape)


def make_stream(
    teacher: Teacher,
    schedule: GeneratorSchedule,
    setting: SuperpositionSettings,
    published: bool = False,
    loss: Callable[..., Tensor] | None = None,
    seed: int = 0,
) -> GeneratorStream:
    """A fresh generator and the stream of images of its training; see :func:`dfqlib.gdfq.make_stream`.

    ``published`` as for :class:`QimeraGenerator`.
    """
    size = teacher.entry.input_size

    def build() -> QimeraGenerator:
        large = size > gdfq.LARGE
        embeddings = class_embeddings(teacher, setting.embedding).cpu()
        return QimeraGenerator(embeddings, size, MAPPED[224 if large else 32], large, published)

    return gdfq.make_stream(teacher, schedule, loss, seed, build, Superposition(setting.p, setting.k, seed))
