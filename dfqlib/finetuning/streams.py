"""Where the batches of a fine-tuning come from: a generator that learns, or a fixed set of images."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dfqlib.device import channels_last, fused
from dfqlib.errors import check_choice
from dfqlib.generators.networks import draw_one_label
from dfqlib.loss_terms import add_up, detach_with_terms, to_finite_floats, to_floats
from dfqlib.losses import generator_loss
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.schedules import DECAYS, decay_factor

LOWER_LR_HINT = "; lower its lr."  # what to do about a loss that is not finite


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W), labels (B,) or (B, classes), the teacher's logits (B, classes); none carries a gradient."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor


@dataclass(frozen=True)
class UnaskedBatch:
    """A :class:`Batch` whose teacher is asked when its logits are first read: some who take batches never do."""

    images: Tensor
    labels: Tensor
    teacher: nn.Module

    @functools.cached_property
    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        """(B, classes), for all who read them."""
        return self.teacher(self.images)


class Stream(Protocol):
    """Where the batches of a fine-tuning come from; its state is all that the batches to come depend on."""

    def next_batch(self) -> Batch | UnaskedBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class GeneratorStream:
    """Trains a generator against the teacher and yields the batches it was trained on.

    ``loss`` takes (teacher logits, labels, batch-norm inputs); ``image_loss`` takes the images and is added to it.
    ``draw(generator, batch, random)`` gives what the generator is called with, and the labels its images are to have;
    it draws from a random stream of the stream's own, seeded with ``seed``. After ``iterations`` batches the generator
    is left as it is and only asked for images, still with the statistics of the batch in its batch norms, as in
    training. ``losses`` holds one device scalar per step, see :func:`dfqlib.terms.kept`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        generator: nn.Module,
        iterations: int,
        batch: int = 200,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        decay: str = "step",
        loss: Callable[..., Tensor] = generator_loss,
        draw: Callable[..., tuple[tuple[Tensor, ...], Tensor]] = draw_one_label,
        seed: int = 0,
        image_loss: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        check_choice("decay", decay, DECAYS)
        self.teacher = teacher
        self.norms = BatchNormInputs(teacher)
        self.generator = generator.train()
        self.iterations = iterations
        self.batch = batch
        self.lr = lr
        self.decay = decay
        self.loss = loss
        self.image_loss = image_loss
        self.draw = draw
        one_kernel = fused(generator.parameters())
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=lr, betas=betas, fused=one_kernel)
        self.random = torch.Generator(next(generator.parameters()).device).manual_seed(seed)
        self.iteration = 0
        self.losses: list[Tensor] = []

    def next_batch(self) -> Batch | UnaskedBatch:
        """Fresh noise and labels, their images, and (while it learns) one step of the generator."""
        inputs, labels = self.draw(self.generator, self.batch, self.random)
        if self.iteration < self.iterations:
            batch = self._learn(inputs, labels)
        else:
            with torch.no_grad():
                batch = UnaskedBatch(self.generator(*inputs), labels, self.teacher)
        self.iteration += 1
        return batch

    def read_losses(self) -> list[float]:
        """The loss of each step so far; Diverged, naming step and term, if one is not finite."""
        return to_finite_floats(self.losses, "the generator diverged: its loss is", LOWER_LR_HINT, 1)

    def state_dict(self) -> dict[str, Any]:
        """Generator, optimizer, random numbers, losses so far; on the CPU where they can be."""
        state = {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "iteration": self.iteration,
            "losses": to_floats(self.losses),
        }
        return state | {"image_loss": self.image_loss.state_dict()} if self.image_loss is not None else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the same batches to come."""
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"])
        self.iteration = state["iteration"]
        self.losses = list(torch.tensor(state["losses"], device=self.random.device))
        if self.image_loss is not None:
            self.image_loss.load_state_dict(state["image_loss"])

    def _learn(self, inputs: tuple[Tensor, ...], labels: Tensor) -> Batch:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * decay_factor(self.decay, self.iteration / self.iterations)
        images = self.generator(*inputs)
        with self.norms:
            logits = self.teacher(images)
            loss = self.loss(logits, labels, self.norms.layers)
        if self.image_loss is not None:
            loss = add_up({"": loss, "image loss": self.image_loss(images)})
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(detach_with_terms(loss))
        return Batch(images.detach(), labels, logits.detach())


class ImageStream:
    """Yields random batches of a fixed set of images (N, 3, H, W), normalised, with their labels (N,), round by round.

    Every round shows each image once, in another order, from a stream seeded with ``seed`` and drawn where the labels
    are, so that no batch waits for its order; the last batch of a round is filled up from the next one. ``vary``
    changes a batch of images before it is seen, for instance :class:`dfqlib.crops.RandomCrops`; labels stay.
    """

    def __init__(
        self,
        teacher: nn.Module,
        images: Tensor,
        labels: Tensor,
        batch: int = 64,
        vary: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.teacher, self.images, self.labels, self.batch, self.vary = teacher, images, labels, batch, vary
        self.random = torch.Generator(labels.device).manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long, device=labels.device)

    @torch.no_grad()
    def next_batch(self) -> UnaskedBatch:
        """The next images of the round."""
        while len(self.order) < self.batch:
            another = torch.randperm(len(self.labels), generator=self.random, device=self.labels.device)
            self.order = torch.cat([self.order, another])
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        images = self.images[chosen] if self.vary is None else self.vary(self.images[chosen])
        return UnaskedBatch(channels_last(images), self.labels[chosen], self.teacher)

    def state_dict(self) -> dict[str, Any]:
        """What is left of the round, and the random numbers."""
        state = {"random": self.random.get_state(), "order": self.order}
        return state | {"vary": self.vary.state_dict()} if self.vary is not None else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the same batches to come."""
        self.random.set_state(state["random"])
        self.order = state["order"].to(self.labels.device)
        if self.vary is not None:
            self.vary.load_state_dict(state["vary"])


def read_losses(stream: Stream) -> list[float]:
    """The losses of the generator behind a stream, none if there is none; Diverged if one is not finite."""
    return stream.read_losses() if hasattr(stream, "read_losses") else []


class FirstThen:
    """A stream that is ``first`` for ``count`` batches and ``then`` from there on."""

    def __init__(self, first: Stream, count: int, then: Stream) -> None:
        self.first, self.left, self.then = first, count, then

    def next_batch(self) -> Batch | UnaskedBatch:
        self.left -= 1
        return (self.first if self.left >= 0 else self.then).next_batch()

    def read_losses(self) -> list[float]:
        """Those of the first stream."""
        return read_losses(self.first)

    def state_dict(self) -> dict[str, Any]:
        """Both streams and how many batches the first has left."""
        return {"left": self.left, "first": self.first.state_dict(), "then": self.then.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, with the same batches to come."""
        self.left = state["left"]
        self.first.load_state_dict(state["first"])
        self.then.load_state_dict(state["then"])
