"""Where the batches of a fine-tuning come from: a generator in training, or a fixed set of images."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dfqlib.device import channels_last, fused
from dfqlib.generators.networks import draw_one_label
from dfqlib.loss_terms import add_up, detach_with_terms, to_finite_floats, to_floats
from dfqlib.losses import generator_loss
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.schedules import decay_factor

LOWER_LR_HINT = "; lower its lr."  # ends the message about a loss that is not finite


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, H, W), labels (B,) or (B, classes), the teacher's logits (B, classes); none carries a gradient."""

    images: Tensor
    labels: Tensor
    teacher_logits: Tensor


@dataclass(frozen=True)
class UnaskedBatch:
    """A :class:`Batch` whose teacher runs when its logits are first read: students that observe never read them."""

    images: Tensor
    labels: Tensor
    teacher: nn.Module

    @functools.cached_property
    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        return self.teacher(self.images)


class Stream(Protocol):
    """Where the batches of a fine-tuning come from; a stream that loads another's state continues with its batches."""

    def next_batch(self) -> Batch | UnaskedBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def read_losses(stream: Stream) -> list[float]:
    """The losses of the generator behind a stream, none without a generator; Diverged if one is not finite."""
    return stream.read_losses() if hasattr(stream, "read_losses") else []


class _Resumable:
    """A stream whose state is that of its random numbers and of its ``parts``, where they have one."""

    parts: tuple[str, ...]
    random: torch.Generator

    def _stateful(self) -> dict[str, Any]:
        return {name: part for name in self.parts if hasattr(part := getattr(self, name), "state_dict")}

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.get_state()} | {name: p.state_dict() for name, p in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.set_state(state["random"])
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])


@dataclass(eq=False, repr=False)
class GeneratorStream(_Resumable):
    """Trains a generator against the teacher and yields the batches it was trained on.

    ``loss`` takes (teacher logits, labels, batch-norm inputs); ``image_loss`` takes the images and is added to it.
    ``draw(generator, batch, random)`` returns the generator's inputs and the labels of its images; it draws from the
    stream's own random numbers, seeded with ``seed``. After ``iterations`` batches the generator is no longer trained,
    but its batch norms still use the statistics of the batch. ``losses`` holds one device scalar per step, see
    :func:`dfqlib.loss_terms.detach_with_terms`. What ``draw``, ``loss`` and ``image_loss`` remember between calls
    belongs to the state, if they have a ``state_dict``.
    """

    teacher: nn.Module
    generator: nn.Module
    iterations: int
    batch: int = 200
    lr: float = 1e-3
    decay: str = "step"
    loss: Callable[..., Tensor] = generator_loss
    draw: Callable[..., tuple[tuple[Tensor, ...], Tensor]] = draw_one_label
    seed: int = 0
    image_loss: Callable[[Tensor], Tensor] | None = None
    parts = "generator", "optimizer", "draw", "loss", "image_loss"

    def __post_init__(self) -> None:
        self.norms, parameters = BatchNormInputs(self.teacher), list(self.generator.train().parameters())
        self.optimizer = torch.optim.Adam(parameters, self.lr, betas=(0.5, 0.999), fused=fused(parameters))
        self.random = torch.Generator(parameters[0].device).manual_seed(self.seed)
        self.losses: list[Tensor] = []

    def next_batch(self) -> Batch | UnaskedBatch:
        """The images of new noise and labels and, during training, one step of the generator on them."""
        inputs, labels = self.draw(self.generator, self.batch, self.random)
        if len(self.losses) >= self.iterations:
            with torch.no_grad():
                return UnaskedBatch(self.generator(*inputs), labels, self.teacher)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * decay_factor(self.decay, len(self.losses) / self.iterations)
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

    def read_losses(self) -> list[float]:
        """The loss of each step so far; Diverged, naming step and term, if one is not finite."""
        return to_finite_floats(self.losses, "the generator diverged: its loss is", LOWER_LR_HINT, 1)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"losses": to_floats(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.losses = list(torch.tensor(state["losses"], device=self.random.device))


@dataclass(eq=False, repr=False)
class ImageStream(_Resumable):
    """Yields batches of a fixed set of images (N, 3, H, W), normalised, with their labels (N,), round by round.

    Each round shows every image once in a new order, from random numbers seeded with ``seed`` and drawn on the labels'
    device, so that no batch waits for its order; a round's last batch is filled up from the next round. ``vary``
    changes a batch of images before anyone sees it, for instance :class:`dfqlib.data.crops.RandomCrops`.
    """

    teacher: nn.Module
    images: Tensor
    labels: Tensor
    batch: int = 64
    vary: Callable[[Tensor], Tensor] | None = None
    seed: int = 0
    parts = ("vary",)

    def __post_init__(self) -> None:
        self.random = torch.Generator(self.labels.device).manual_seed(self.seed)
        self.order = torch.empty(0, dtype=torch.long, device=self.labels.device)

    @torch.no_grad()
    def next_batch(self) -> UnaskedBatch:
        while len(self.order) < self.batch:
            another = torch.randperm(len(self.labels), generator=self.random, device=self.labels.device)
            self.order = torch.cat([self.order, another])
        chosen, self.order = self.order[: self.batch], self.order[self.batch :]
        images = self.images[chosen] if self.vary is None else self.vary(self.images[chosen])
        return UnaskedBatch(channels_last(images), self.labels[chosen], self.teacher)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"order": self.order}  # what is left of the round

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.order = state["order"].to(self.labels.device)


class FirstThen:
    """A stream that is ``first`` for ``count`` batches and ``then`` from there on."""

    def __init__(self, first: Stream, count: int, then: Stream) -> None:
        self.first, self.left, self.then = first, count, then

    def next_batch(self) -> Batch | UnaskedBatch:
        self.left -= 1
        return (self.first if self.left >= 0 else self.then).next_batch()

    def read_losses(self) -> list[float]:
        return read_losses(self.first)

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left, "first": self.first.state_dict(), "then": self.then.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = state["left"]
        self.first.load_state_dict(state["first"])
        self.then.load_state_dict(state["then"])
