"""The two-dimensional experiment: which points do ZeroQ and GDFQ make from a small classifier alone?

Source: the toy experiment of the unofficial GDFQ seed, after figure 3 of GDFQ.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.finetuning.streams import GeneratorStream, pool_after_training
from dfqlib.generators.optimise_images import synthesise
from dfqlib.losses import bns_loss
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.progress import track
from dfqlib.schedules import ImageSchedule

SIDE = 4.0  # points lie in [-SIDE, SIDE] on both axes


def real_points(count: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (count, 2), uniform, and their labels (count,): 1 where x * y > 0, else 0."""
    points = (torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * SIDE
    return points, (points.prod(1) > 0).long()


def layers(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, with batch norm (eps 0.8) and leaky ReLU between them."""
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        modules += [nn.Linear(before, after), nn.BatchNorm1d(after, eps=0.8), nn.LeakyReLU(0.2)]
    return nn.Sequential(*modules[:-2])


def train_classifier(points: Tensor, labels: Tensor, iterations: int = 200) -> nn.Sequential:
    """The teacher: a 2-128-256-512-2 network fitted to all points at once by Adam; frozen, in eval mode."""
    network = layers(2, 128, 256, 512, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in track(range(iterations), "toy classifier"):
        optimizer.zero_grad()
        F.cross_entropy(network(points), labels).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def zeroq_points(teacher: nn.Module, count: int = 500, iterations: int = 200) -> Tensor:
    """Points (count, 2) optimised from Gaussian noise to match the teacher's batch-norm statistics; or Diverged.

    Statistics of the batch, not of each sample as in ZeroQ: a point has no pixels to average over.
    """
    schedule = ImageSchedule(images=count, synthesis_iterations=iterations, synthesis_lr=0.1)
    with BatchNormInputs(teacher) as norms:

        def loss(points: Tensor) -> Tensor:
            teacher(points)
            return bns_loss(norms.layers)

        return synthesise(torch.randn(count, 2), loss, schedule, "toy ZeroQ").images


class PointGenerator(nn.Module):
    """GDFQ's generator for points: noise (B, 100) times the label's embedding, to points (B, 2)."""

    classes, latent = 2, 100

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(self.classes, self.latent)
        self.body = layers(self.latent, 128, 128, 2)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.body(self.embedding(labels) * z)


def gdfq_points(teacher: nn.Module, count: int = 500, iterations: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (count, 2) of a generator trained by L_G = CE + 0.1 L_BNS, and their labels (count,); or Diverged."""
    stream = GeneratorStream(teacher, PointGenerator(), iterations, batch=count, lr=1e-2, decay="cosine", seed=seed)
    pool = pool_after_training(stream, count, "toy GDFQ")
    return pool.images, pool.labels
