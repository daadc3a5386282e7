"""Where the batches of a fine-tuning come from: a generator in training, or a fixed set of images."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dfqlib.device import channels_last, fused
from dfqlib.generators.networks import draw_one_label
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.loss_terms import add_up, detach_with_terms, to_finite_floats
from dfqlib.losses import generator_loss
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.progress import track
from dfqlib.quantizers.layers import observing
from dfqlib.schedules import decay_factor
from dfqlib.speed.precision import run


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
        return run(self.teacher, self.images)


class Stream(Protocol):
    """Where the batches of a fine-tuning come from; a stream that loads another's state continues with its batches."""

    def next_batch(self) -> Batch | UnaskedBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def generated_pool(stream: Stream, count: int) -> SyntheticImages:
    """``count`` images of a stream, such as that of a generator after its training, with the labels asked for."""
    batches = [stream.next_batch()]
    while sum(len(batch.images) for batch in batches) < count:
        batches.append(stream.next_batch())
    return SyntheticImages(
        *(torch.cat([getattr(batch, part) for batch in batches])[:count] for part in ("images", "labels"))
    )


def pool_after_training(stream: "GeneratorStream", count: int, label: str = "training a generator") -> SyntheticImages:
    """:func:`generated_pool` of the stream's generator after its training, with the losses of that."""
    for _ in track(range(stream.iterations), label):
        stream.next_batch()
    return replace(generated_pool(stream, count), losses=[stream.read_losses()])


def read_losses(stream: Stream) -> list[float]:
    """The losses of the generator behind a stream, none without a generator; Diverged if one is not finite."""
    return stream.read_losses() if hasattr(stream, "read_losses") else []


class Losses:
    """The losses of a network's steps. They stay on its device until they are read, so that no step waits for them."""

    def __init__(self, whose: str, first: int = 1) -> None:
        self.whose, self.first = whose, first
        self.values: list[float] = []
        self.unread: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.values) + len(self.unread)

    def append(self, loss: Tensor) -> None:
        self.unread.append(detach_with_terms(loss))

    def read(self) -> list[float]:
        """All of them; Diverged, naming ``whose``, the iteration from ``first`` and the term, if one is not finite."""
        before = f"{self.whose} diverged: its loss is"
        self.values += to_finite_floats(self.unread, before, "; lower its lr.", self.first + len(self.values))
        self.unread.clear()
        return list(self.values)

    state_dict = read

    def load_state_dict(self, values: list[float]) -> None:
        self.values = list(values)


class Stateful:
    """Has a state: that of each attribute in ``remembers``, be it an object with a state, random numbers or a value."""

    remembers: tuple[str, ...]

    def state_dict(self) -> dict[str, Any]:
        return {name: _state(getattr(self, name)) for name in self.remembers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.remembers:
            part = getattr(self, name)
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(state[name])
            elif isinstance(part, torch.Generator):
                part.set_state(state[name])
            elif not callable(part):
                setattr(self, name, state[name].to(part.device) if isinstance(part, Tensor) else state[name])


def _state(part: Any) -> Any:
    if hasattr(part, "state_dict"):
        return part.state_dict()
    if isinstance(part, torch.Generator):
        return part.get_state()
    return None if callable(part) else part  # a plain function remembers nothing


@dataclass(eq=False, repr=False)
class GeneratorStream(Stateful):
    """Trains a generator against the teacher and yields the batches it was trained on.

    ``loss`` takes (teacher logits, labels, batch-norm inputs); ``image_loss`` takes the images and is added to it.
    With a ``student``, a quantized network, ``loss`` takes its logits too, as those of AdaSG and AdaDFQ do. It learns
    ranges on the first batch, or it could not compute; as this generator serves its student alone, students of several
    widths need a stream each.
    ``draw(generator, batch, random)`` returns the generator's inputs and the labels of its images; it draws from the
    stream's own random numbers, seeded with ``seed``. After ``iterations`` batches the generator is no longer trained,
    but its batch norms still use the statistics of the batch. What ``draw``, ``loss`` and ``image_loss`` remember
    between calls belongs to the state, if they have a ``state_dict``.
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
    student: nn.Module | None = None
    remembers = "generator", "optimizer", "random", "losses", "draw", "loss", "image_loss"

    def __post_init__(self) -> None:
        self.norms, parameters = BatchNormInputs(self.teacher), list(self.generator.train().parameters())
        self.optimizer = torch.optim.Adam(parameters, self.lr, betas=(0.5, 0.999), fused=fused(parameters))
        self.random = torch.Generator(parameters[0].device).manual_seed(self.seed)
        self.losses = Losses("the generator")

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
            logits = run(self.teacher, images)
            loss = self.loss(logits, labels, self.norms.layers, *self._of_student(images))
        if self.image_loss is not None:
            loss = add_up({"": loss, "image loss": self.image_loss(images)})
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss)
        return Batch(images.detach(), labels, logits.detach())

    def _of_student(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.student is None:
            return ()
        with contextlib.nullcontext() if self.losses else observing(self.student):
            return (run(self.student, images),)

    def read_losses(self) -> list[float]:
        return self.losses.read()


@dataclass(eq=False, repr=False)
class ImageStream(Stateful):
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
    remembers = "random", "order", "vary"  # what is left of the round is in ``order``

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


class FirstThen(Stateful):
    """A stream that is ``first`` for ``count`` batches and ``then`` from there on."""

    remembers = "left", "first", "then"

    def __init__(self, first: Stream, count: int, then: Stream) -> None:
        self.first, self.left, self.then = first, count, then

    def next_batch(self) -> Batch | UnaskedBatch:
        self.left -= 1
        return (self.first if self.left >= 0 else self.then).next_batch()

    def read_losses(self) -> list[float]:
        return read_losses(self.first)
