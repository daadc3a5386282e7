"""Qimera (Choi et al., NeurIPS 2021): GDFQ with images of several classes at once, from mixed class embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.finetuning.streams import GeneratorStream, Stateful
from dfqlib.generators.networks import Generator, GeneratorBody
from dfqlib.methods import gdfq
from dfqlib.models.features import classifier
from dfqlib.models.teacher import Teacher
from dfqlib.schedules import EmbeddingSwitches, GeneratorSchedule, Mixture
from dfqlib.settings import setting

EPSILON = 1e-5  # added to the variance of an embedding
MAPPED = {False: 64, True: 100}  # features after the disentanglement mapping, by ``conditional``


@dataclass(frozen=True, kw_only=True)
class SuperpositionSettings(Mixture, EmbeddingSwitches):
    """What is superposed, and how the class embeddings start: random, or as the weights of the teacher's last layer."""

    embedding: str = setting("random", choices=("random", "teacher"))


# Per model: p, k and the start of the embeddings, for 4 and for 5 bits. Source: the official scripts.
PUBLISHED = {
    "resnet20_cifar10": ((0.4, 2, "random"), (0.4, 2, "random")),
    "resnet20_cifar100": ((0.4, 10, "teacher"), (0.4, 50, "teacher")),
    "resnet18": ((0.4, 500, "random"), (0.4, 100, "random")),
    "resnet50": ((0.7, 500, "teacher"), (0.7, 100, "teacher")),
    "mobilenetv2_w1": ((0.4, 100, "random"), (0.4, 100, "random")),
}


def published_setting(model: str, bits: BitWidths, switches: EmbeddingSwitches | None = None) -> SuperpositionSettings:
    """The published setting of ``model`` at ``bits``: for 4 or fewer, for 5 or more; CIFAR-10's without one."""
    four, five = PUBLISHED.get(model, PUBLISHED["resnet20_cifar10"])
    p, k, embedding = four if min(bits.weight, bits.activation) <= 4 else five
    return SuperpositionSettings(p=p, k=k, embedding=embedding, **EmbeddingSwitches.of(switches or {}).values())


def standardise(embeddings: Tensor, over_batch: bool = False) -> Tensor:
    """Every vector of ``embeddings`` (B, K, D) with mean 0 and variance 1 over its own D entries.

    ``over_batch=True`` is a quirk of the released code: a transpose puts slot k where channels belong, so mean and
    variance are those of slot k over B D entries. Source: Qimera, section 4.2.
    """
    variance, mean = torch.var_mean(embeddings, (0, 2) if over_batch else 2, correction=0, keepdim=True)
    return (embeddings - mean) * (variance + EPSILON).rsqrt()


def soft_targets(labels: Tensor, weights: Tensor, classes: int) -> Tensor:
    """sum_k lambda_k onehot(y_k), (B, classes), for labels and weights (B, K): the weights of a repeated label add up.

    Source: Qimera, section 4.1, equation 4.
    """
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


class QimeraGenerator(nn.Module):
    """Noise z (B, K, latent), labels and weights (B, K) to images (B, C, H, W): sum_k lambda_k map(e_k).

    e_k = standardise(E[y_k] + z_k), with one trained embedding per class, initially ``embeddings`` (classes, latent);
    map is linear (the disentanglement mapping), to ``mapped`` features; 0: as many as published.
    ``conditional`` as for GDFQ's generator; gain and bias are then superposed as the embeddings are. ``switches``
    freeze the embeddings, scale the noise and leave the mapping out.

    ``as_released=True`` follows the released code: no mapping, superposed batches standardised over the batch, and gain
    and bias of conditional batch norms averaged over k, so k times too small. Source: Qimera, sections 4.1 to 4.3.
    """

    def __init__(
        self,
        embeddings: Tensor,
        shape: tuple[int, int, int] = (3, 32, 32),
        mapped: int = 0,
        conditional: bool = False,
        as_released: bool = False,
        switches: EmbeddingSwitches | None = None,
    ) -> None:
        super().__init__()
        self.classes, self.latent = embeddings.shape
        switches = switches or EmbeddingSwitches()
        self.as_released, self.noise_scale = as_released, switches.noise_scale
        self.embedding = nn.Embedding.from_pretrained(embeddings.clone(), freeze=switches.frozen)
        maps = switches.mapping and not as_released
        features = (mapped or MAPPED[conditional]) if maps else self.latent
        self.mapping = nn.Linear(self.latent, features) if maps else nn.Identity()
        self.body = GeneratorBody(features, shape, self.classes if conditional else None)

    def forward(self, z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        slots = labels.shape[1]
        noisy = self.embedding(labels) + self.noise_scale * z
        each = standardise(noisy, over_batch=self.as_released and slots > 1)
        # The mapping is affine and the weights add up to 1, so it may follow the sum: K times less work.
        latent = self.mapping((weights.unsqueeze(1) @ each).squeeze(1))
        targets = soft_targets(labels, weights, self.classes)
        return self.body(latent, targets / slots if self.as_released else targets)


class Superposition(Stateful):
    """Draws the generator's input: with probability ``p`` a batch of ``k`` classes per sample, otherwise of one.

    Noise (count, K, latent), uniform labels (count, K) and weights (count, K), softmax of N(0, 1), K being k or 1; and
    soft targets (count, classes). Whether a batch is superposed is drawn on the CPU, from random numbers of its own, so
    that no step waits for the device. Source: Qimera, section 4.1, equations 3 and 4.
    """

    remembers = ("coin",)

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
    """The generator's inputs, P * steps samples, on straight paths between the two classes of each of ``pairs`` (P, 2).

    Noise (., 2, latent), constant along a path, labels (., 2), and weights (., 2), the second's from 0 to 1.
    Source: Qimera, figure 3.
    """
    z = torch.randn(len(pairs), 2, latent, generator=random, device=random.device)
    share = torch.linspace(0, 1, steps, device=random.device).repeat(len(pairs))
    weights = torch.stack([1 - share, share], dim=1)
    return z.repeat_interleave(steps, 0), pairs.to(random.device).repeat_interleave(steps, 0), weights


def mix_in_gdfq(generator: Generator, z: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Images (B, C, H, W) of GDFQ's ``generator`` for mixtures of classes, on which it was not trained.

    Noise z (B, latent); ``weights`` (B, K) mix the embeddings of ``labels`` (B, K), or their gains and biases.
    """
    targets = soft_targets(labels, weights, generator.classes)
    return generator.body(z if generator.embedding is None else (targets @ generator.embedding.weight) * z, targets)


def make_stream(
    teacher: Teacher,
    schedule: GeneratorSchedule,
    setting: SuperpositionSettings,
    as_released: bool = False,
    seed: int = 0,
) -> GeneratorStream:
    """:func:`dfqlib.methods.gdfq.make_stream` with a :class:`QimeraGenerator` and :class:`Superposition`.

    Embeddings that start as the ``"teacher"``'s last weights point to where each class's features lie (section 4.2).
    """
    shape = teacher.entry.image_shape

    def build() -> QimeraGenerator:
        weight = classifier(teacher.network).weight.detach().flatten(1)
        embeddings = weight.cpu() if setting.embedding == "teacher" else torch.randn(weight.shape)
        large = max(shape[1:]) > gdfq.LARGE
        return QimeraGenerator(embeddings, shape, conditional=large, as_released=as_released, switches=setting)

    return gdfq.make_stream(teacher, schedule, seed=seed, build=build, draw=Superposition(setting.p, setting.k, seed))
