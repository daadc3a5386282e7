"""Train a full-precision teacher, resumable after any epoch: recipe, augmentation, optimizers and the epoch loop."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from dfqlib.checkpoint import load_checkpoint, save_checkpoint
from dfqlib.device import channels_last
from dfqlib.errors import Diverged
from dfqlib.progress import track
from dfqlib.speed.precision import run


@dataclass(frozen=True)
class Recipe:
    """All settings of a teacher's training, as its card records them.

    The rate rises over ``warmup`` epochs to its peak and falls along ``knots``: (fraction of the epochs, fraction of
    the peak), linear in between. It falls fast when the images first grow: the peak suits coarse features, and there
    the loss soon stops falling. The images' ``sizes`` take equal parts of the epochs: most of what such a network
    learns costs a fraction of the full resolution. For the fraction ``full`` of the epochs, images whose loss is below
    the mean are left out with probability ``prune``. The result is the mean of the weights after each of the last
    ``average`` of the epochs; 0 takes the last epoch's.
    """

    epochs: int = 60
    batch: int = 128
    filter_lr: float = 0.05  # turn of each filter bank per step, in radians
    lr: float = 0.1  # SGD rate of batch-norm affines and of the classifier
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of the classifier's weight alone; filter banks keep their norm
    warmup: float = 0.5
    knots: tuple[tuple[float, float], ...] = ((0.15, 1.0), (0.3, 14 / 17), (1 / 3, 0.4), (1.0, 0.0))
    sizes: tuple[int, ...] = (20, 24, 32)
    prune: float = 0.5
    full: float = 0.875
    average: float = 0.0
    seed: int = 0

    def rate(self, epoch: float) -> float:
        """Learning rate at ``epoch``, which may be fractional, as a fraction of the peak."""
        rising = (epoch + 0.01) / self.warmup if self.warmup else 1.0
        return float(min(rising, np.interp(epoch / self.epochs, *zip(*self.knots, strict=True))))

    def size(self, epoch: int) -> int:
        """Height and width in pixels of the training images in ``epoch``."""
        return self.sizes[epoch * len(self.sizes) // self.epochs]

    def pruned(self, epoch: int) -> float:
        """Probability that ``epoch`` leaves out an image whose loss is below the mean."""
        return self.prune if epoch < self.full * self.epochs else 0.0


def next_cycle(epochs: int, batch: int, seed: int) -> Recipe:
    """Recipe to train trained weights further: from a lower peak the rate falls linearly to zero.

    Most images are learnt by then, so each epoch leaves out two thirds of the easy ones; the mean over the last epochs
    is nearer to the centre of the minimum than any single epoch.
    """
    rates = {"filter_lr": 0.015, "lr": 0.03, "knots": ((0.0, 1.0), (1.0, 0.0))}
    return Recipe(epochs, batch, **rates, sizes=(24, 32, 32), prune=2 / 3, full=0.95, average=0.3, seed=seed)


def choose_images(losses: Tensor, prune: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An epoch's images in random order and the weights of their losses: two (M,) tensors, M <= N.

    ``losses`` (N,) are the images' latest. Those below the mean are left out with probability ``prune``; the ones kept
    count 1 / (1 - prune) times, which leaves the expected gradient unchanged. Source: Qin et al., "InfoBatch: lossless
    training speed up by unbiased dynamic data pruning", ICLR 2024, section 3.
    """
    easy = losses < losses.mean()
    kept = ~easy | (torch.rand(len(losses), generator=generator) >= prune)
    order = torch.randperm(len(losses), generator=generator)
    order = order[kept[order]]
    return order, torch.where(easy[order], 1 / (1 - prune), 1.0)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, (rows, columns) -> same, by the quintic Newton-Schulz iteration of Muon.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalise(matrix.T, steps).T
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class FilterMuon(torch.optim.Optimizer):
    """Muon for convolution filters before a batch norm: the loss does not depend on their scale, so it is kept.

    Each step rotates the filter bank, flattened to (out, in * kh * kw), by ``lr`` radians towards the orthogonalised
    Nesterov momentum and restores its norm. ``torch.optim.Muon`` takes matrices only, and decays the norm instead.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = orthogonalise(p.grad.add(buffer, alpha=group["momentum"]).flatten(1)).view_as(p)
                norm = p.norm()
                p.sub_(update, alpha=float(group["lr"] * norm / update.norm()))
                p.mul_(norm / p.norm())


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random 4-pixel shift (zero padding) and horizontal flip of (B, 3, H, W) images, then resized to ``size``."""
    b, _, h, w = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, b), generator=generator).to(images.device)
    rows = dy[:, None] + torch.arange(h, device=images.device)
    columns = dx[:, None] + torch.arange(w, device=images.device)
    flipped = (torch.rand(b, generator=generator) < 0.5).to(images.device)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    sample = torch.arange(b, device=images.device)[:, None, None]
    out = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if size != h:
        out = F.interpolate(out, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return channels_last(out)


def optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the filter banks, SGD with Nesterov momentum for everything else (decay on matrices only)."""
    vectors, matrices, filters = ([p for p in network.parameters() if p.ndim == ndim] for ndim in (1, 2, 4))
    rest = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(rest, lr=recipe.lr, momentum=recipe.momentum, nesterov=True)
    return [FilterMuon(filters, recipe.filter_lr, recipe.momentum), sgd]


def train_teacher(
    network: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    normalise: Callable[[Tensor], Tensor],
    recipe: Recipe,
    checkpoint: str | Path,
    evaluate: Callable[[nn.Module], float],
    compiled: bool = False,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train ``network`` in place on its device, from ``checkpoint`` if it exists; return the history by epoch.

    ``pixels`` are uint8 (N, 3, H, W), ``labels`` int64 (N,); ``normalise`` turns a batch of pixels into the network's
    input; ``evaluate`` gives the top-1 in per cent recorded after each epoch (nothing is selected by it). Averaged
    weights get batch-norm statistics of their own, from one pass over all images, augmented (Izmailov et al.,
    "Averaging weights leads to wider optima and better generalization", UAI 2018, section 3.1). The checkpoint is
    written after every epoch; Diverged, naming the epoch, if its loss is not finite: no checkpoint of it is written.
    """
    checkpoint, settings = Path(checkpoint), asdict(recipe)
    device = next(network.parameters()).device
    for name, module in list(network.named_modules()):  # pooling over the whole map takes images of any size
        if name.endswith("final_pool") and isinstance(module, nn.AvgPool2d):
            network.set_submodule(name, nn.AdaptiveAvgPool2d(1))
    network = channels_last(network)
    mean, steppers = AveragedModel(network), optimizers(network, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    losses, history = torch.zeros(len(pixels)), []
    if state := load_checkpoint(checkpoint, settings):
        network.load_state_dict(state["network"])
        mean.load_state_dict(state["mean"])
        for optimizer, saved in zip(steppers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        losses, history = state["losses"], state["history"]
    forward = torch.compile(network, dynamic=False) if compiled else network
    pixels, labels, losses = pixels.to(device), labels.to(device), losses.to(device)
    for epoch in range(len(history), recipe.epochs):
        network.train()
        size = recipe.size(epoch)
        order, weights = (t.to(device) for t in choose_images(losses.cpu(), recipe.pruned(epoch), generator))
        steps = max(len(order) // recipe.batch, 1)
        for step in track(range(steps), f"teacher, epoch {epoch + 1} of {recipe.epochs}"):
            batch = slice(step * recipe.batch, (step + 1) * recipe.batch)
            chosen, rate = order[batch], recipe.rate(epoch + step / steps)
            logits = run(forward, augment(normalise(pixels[chosen]), size, generator))
            loss = F.cross_entropy(logits, labels[chosen], reduction="none")
            for optimizer in steppers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.setdefault("peak_lr", group["lr"])
                optimizer.zero_grad()
            (loss * weights[batch]).mean().backward()
            for optimizer in steppers:
                optimizer.step()
            losses[chosen] = loss.detach()
        network.eval()
        if epoch >= (1 - recipe.average) * recipe.epochs:
            mean.update_parameters(network)
        mean_loss = float(losses.mean())
        if not math.isfinite(mean_loss):
            raise Diverged(f"the teacher diverged: its loss is {mean_loss} in epoch {epoch + 1}; lower its lr.")
        entry = {"epoch": epoch + 1, "size": size, "images": steps * recipe.batch, "loss": mean_loss}
        history.append(entry | {"top1": evaluate(network)})
        state = {"network": network.state_dict(), "mean": mean.state_dict(), "generator": generator.get_state()}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in steppers]}
        save_checkpoint(checkpoint, settings, state | {"losses": losses.cpu(), "history": history})
        if on_epoch:
            on_epoch(history[-1])
    if recipe.average:
        views = (augment(normalise(part), recipe.sizes[-1], generator) for part in pixels.split(recipe.batch))
        update_bn(views, mean)
        network.load_state_dict(mean.module.state_dict())
        network.eval()
    return history
