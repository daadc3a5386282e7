"""The 2-D experiment: four sets of points in the plane, and what each knows of a classifier's boundary.

500 points uniform in [-4, 4]^2, their class the sign of x * y. A small network learns them; then points are made from
that network alone, by ZeroQ's way (match the batch-norm statistics) and by GDFQ's (a generator that is also asked for
a class). Source: the unofficial GDFQ seed's toy experiment, after figure 3 of GDFQ.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.finetuning.streams import GeneratorStream
from dfqlib.generators.optimise_images import synthesise
from dfqlib.loss_terms import add_up
from dfqlib.losses import bns_loss
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.progress import track

SIDE = 4.0  # points lie in [-SIDE, SIDE] on both axes


def real_points(count: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points (count, 2), uniform, and their labels (count,): 1 where x * y > 0, else 0."""
    points = (torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * SIDE
    return points, (points.prod(1) > 0).long()


def layers(widths: list[int]) -> nn.Sequential:
    """Linear layers of these widths, with batch norm (eps 0.8) and leaky ReLU between them."""
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        modules += [nn.Linear(before, after), nn.BatchNorm1d(after, eps=0.8), nn.LeakyReLU(0.2)]
    return nn.Sequential(*modules, nn.Linear(widths[-2], widths[-1]))


def train_classifier(points: Tensor, labels: Tensor, iterations: int = 200, lr: float = 1e-2) -> nn.Sequential:
    """The teacher: a 2-128-256-512-2 network fitted to all points at once by Adam; frozen, in eval mode."""
    network = layers([2, 128, 256, 512, 2])
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for _ in track(range(iterations), "toy classifier"):
        optimizer.zero_grad()
        F.cross_entropy(network(points), labels).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def zeroq_points(teacher: nn.Module, count: int = 500, iterations: int = 200, lr: float = 0.1) -> Tensor:
    """Points (count, 2) moved from Gaussian noise until the teacher's batch-norm inputs have its running statistics.

    Diverged if the loss diverges. A point has no pixels to average over, so the statistics are the batch's, where
    ZeroQ's images use each sample's.
    """
    with BatchNormInputs(teacher) as norms:

        def loss(points: Tensor) -> Tensor:
            teacher(points)
            return add_up({"L_BNS": bns_loss(norms.layers)})

        points, _ = synthesise(torch.randn(count, 2), loss, lr, iterations, 100, 1e-4, label="toy ZeroQ")
    return points


class PointGenerator(nn.Module):
    """GDFQ's generator for points: noise (B, latent) times the label's embedding, to points (B, 2)."""

    def __init__(self, classes: int = 2, latent: int = 100) -> None:
        super().__init__()
        self.classes = classes
        self.latent = latent
        self.embedding = nn.Embedding(classes, latent)
        self.body = layers([latent, 128, 128, 2])

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        return self.body(self.embedding(labels) * z)


def gdfq_points(
    teacher: nn.Module, count: int = 500, iterations: int = 200, lr: float = 1e-2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Points (count, 2) of a generator trained by L_G = CE + 0.1 L_BNS, and the labels (count,) it was asked for.

    Diverged if the loss diverges.
    """
    stream = GeneratorStream(teacher, PointGenerator(), iterations, batch=count, lr=lr, decay="cosine", seed=seed)
    for _ in track(range(iterations), "toy GDFQ"):
        stream.next_batch()
    stream.read_losses()
    batch = stream.next_batch()
    return batch.images, batch.labels
