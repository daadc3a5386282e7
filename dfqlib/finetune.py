"""The fine-tuning loop: one stream of labelled images, any number of quantized students.

The stream decides what the images are: :class:`GeneratorStream` trains a generator against the teacher and hands on
each batch it was trained on; :class:`ImageStream` goes through a fixed set of images. A stream never sees a student, so
one run of it serves every bit width, and a student learns the same whether it is tuned alone or with others.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dfqlib.checkpoint import load_checkpoint, save_checkpoint
from dfqlib.errors import UserError, check_choice, check_range
from dfqlib.generators import draw_one_label
from dfqlib.losses import generator_loss, student_loss
from dfqlib.memory import held_memory
from dfqlib.progress import track
from dfqlib.quantize import observing
from dfqlib.runtime import channels_last, fused
from dfqlib.scaling import scale_weights
from dfqlib.statistics import BatchNormInputs
from dfqlib.terms import add_up, finite_numbers, kept, numbers

LOWER = "; lower its lr."  # what to do about a loss that is not finite
DECAYS = ("step", "late_step", "cosine", "constant")


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


@dataclass(frozen=True)
class Checkpoint:
    """The file from which a fine-tuning goes on after a stop, written after every so many batches, and at the end.

    With ``seconds`` it is written whenever so many have passed instead. A file that cannot be read is refused, unless
    ``anew`` says to begin anew then, with a warning: for a file that nobody named. UserError for an interval out of
    range.
    """

    path: Path
    every: int = 500
    seconds: float | None = None
    anew: bool = False

    def __post_init__(self) -> None:
        check_range("every", self.every, 1, 10**9)
        if self.seconds is not None:
            check_range("seconds", self.seconds, 0, 10**9)

    def due(self, drawn: int, seconds: float) -> bool:
        """Whether to write it after ``drawn`` batches in all, ``seconds`` after it was last written."""
        return drawn % self.every == 0 if self.seconds is None else seconds >= self.seconds


def decay_factor(decay: str, progress: float) -> float:
    """What the learning rate is multiplied by at ``progress`` (0 to 1) of its run.

    ``"step"``: 0.1 at a quarter, a half and three quarters, which is epochs 100, 200, 300 of the published 400;
    ``"late_step"``: 0.1 at two fifths and at four fifths, which is epochs 20 and 40 of SaFT's 50;
    ``"cosine"``: half a cosine from 1 to 0, under a linear rise from 0.1 over the first tenth, without which the loss
    of students of many bits first rises; ``"constant"``: 1.
    """
    check_choice("decay", decay, DECAYS)
    if decay == "step":
        return 0.1 ** sum(progress >= quarter for quarter in (0.25, 0.5, 0.75))
    if decay == "late_step":
        return 0.1 ** sum(progress >= fifth for fifth in (0.4, 0.8))
    if decay == "cosine":
        return min(1, 0.1 + 9 * progress) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


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
        return finite_numbers(self.losses, "the generator diverged: its loss is", LOWER, 1)

    def state_dict(self) -> dict[str, Any]:
        """Generator, optimizer, random numbers, losses so far; on the CPU where they can be."""
        state = {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.get_state(),
            "iteration": self.iteration,
            "losses": numbers(self.losses),
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
        self.losses.append(kept(loss))
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


def distil(network: nn.Module, batch: Batch, loss: Callable[..., Tensor] = student_loss) -> Tensor:
    """``loss`` of the student's logits, the teacher's and the labels of a batch."""
    return loss(network(batch.images), batch.teacher_logits, batch.labels)


@dataclass
class Student:
    """A quantized network and how it learns: its loss on a batch, and SGD with Nesterov momentum.

    The network's mode is left as it is: in eval mode, as published, its batch-norm statistics stay the teacher's.
    """

    network: nn.Module
    lr: float = 1e-4
    decay: str = "step"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    loss: Callable[[nn.Module, Batch], Tensor] = distil


@dataclass
class History:
    """What a fine-tuning run recorded: losses per iteration, and test scores (iteration, top-1 in per cent)."""

    generator: list[float] = field(default_factory=list)
    students: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)  # spent so far, with the parts before a stop

    def last(self, student: str) -> float:
        """Top-1 after the last iteration."""
        return self.scores[student][-1][1]

    def best(self, student: str) -> float:
        """The best top-1 of all evaluations: picked on the test set, so too good; recorded to be named as such."""
        return max(score for _, score in self.scores[student])


def check_spans(iterations: int, observe_iterations: int, train_from: int) -> None:
    """UserError if a fine-tuning of these numbers has nothing to observe or nothing to train."""
    if not 0 < observe_iterations <= train_from < iterations:
        raise UserError(
            f"observe_iterations={observe_iterations}, train_from={train_from}, iterations={iterations} leave nothing "
            "to observe or to train; allowed: 0 < observe_iterations <= train_from < iterations."
        )


@held_memory()
def finetune(
    stream: Stream,
    students: Mapping[str, Student],
    iterations: int,
    observe_iterations: int = 800,
    train_from: int | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    evaluate_every: int = 200,
    on_evaluation: Callable[[History], None] | None = None,
    label: str = "fine-tuning",
    generator_warmup: int = 0,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Tune every student on the same stream of batches; networks and generator change in place.

    The first ``generator_warmup`` batches no student sees: the stream's generator learns alone. They count in none of
    the other numbers. In the first ``observe_iterations`` (the warm-up) the students only see the images, to learn
    their activation ranges; then the ranges are frozen, and the students train from iteration ``train_from`` (at once,
    if it is not given) to the end. ``evaluate`` gives a network's test score; it runs before the first iteration of
    training, after every ``evaluate_every`` and after the last, and ``on_evaluation`` sees the history then.

    With a ``checkpoint`` a run that was stopped goes on from its file, if that exists, and on a CPU ends with the very
    same numbers as one that was not. Raises Diverged, naming the student or the generator, the iteration and the
    term that broke, if a loss is no longer finite, at the next evaluation or checkpoint; UserError if the spans leave
    nothing to do, or the checkpoint is another run's.
    """
    train_from = observe_iterations if train_from is None else train_from
    check_spans(iterations, observe_iterations, train_from)
    tuners = {name: _Tuner(student) for name, student in students.items()}
    settings = {"iterations": iterations, "observe_iterations": observe_iterations, "train_from": train_from}
    settings |= {"generator_warmup": generator_warmup, "evaluate_every": evaluate_every, "students": list(students)}
    run = _Progress(stream, tuners, History(scores={name: [] for name in students}))
    if checkpoint is not None and (state := load_checkpoint(checkpoint.path, settings, checkpoint.anew)):
        run.load_state_dict(state)
    written = time.perf_counter()
    began = written - run.history.seconds
    for drawn in track(range(run.drawn, generator_warmup + iterations), label):
        batch = stream.next_batch()
        iteration = drawn - generator_warmup  # below 0 the generator learns alone
        if 0 <= iteration < observe_iterations:
            for tuner in tuners.values():
                tuner.observe(batch)
        if iteration >= train_from:
            progress = iteration / iterations, (iteration - train_from) / (iterations - train_from)
            for tuner in tuners.values():
                tuner.step(batch, *progress)
        done, run.drawn = iteration + 1, drawn + 1
        if done == iterations or (done >= train_from and (done - train_from) % evaluate_every == 0):
            _read_losses(run.history, stream, tuners, train_from)
            if evaluate is not None:
                for name, student in students.items():
                    run.history.scores[name].append((done, evaluate(student.network)))
            if on_evaluation is not None:
                on_evaluation(run.history)
        now = time.perf_counter()
        run.history.seconds = now - began
        if checkpoint is not None and (done == iterations or checkpoint.due(run.drawn, now - written)):
            _read_losses(run.history, stream, tuners, train_from)  # from a broken state nothing could go on
            save_checkpoint(checkpoint.path, settings, run.state_dict())
            written = time.perf_counter()
    _read_losses(run.history, stream, tuners, train_from)
    return run.history


@dataclass
class _Progress:
    """How far a fine-tuning has come: all that its rest depends on."""

    stream: Stream
    tuners: Mapping[str, _Tuner]
    history: History
    drawn: int = 0  # batches taken from the stream

    def state_dict(self) -> dict[str, Any]:
        students = {name: tuner.state_dict() for name, tuner in self.tuners.items()}
        history = {"scores": self.history.scores, "seconds": self.history.seconds}
        return {"drawn": self.drawn, "stream": self.stream.state_dict(), "students": students, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]
        self.history.scores, self.history.seconds = state["history"]["scores"], state["history"]["seconds"]
        self.stream.load_state_dict(state["stream"])
        for name, tuner in self.tuners.items():
            tuner.load_state_dict(state["students"][name])


class _Tuner:
    """One student at work: its optimizer, and its losses so far as device scalars, so that no step waits for them."""

    def __init__(self, student: Student) -> None:
        check_choice("decay", student.decay, DECAYS)
        self.student = student
        self.network = scale_weights(student.network)  # the same parameters, trained faster
        self.optimizer = torch.optim.SGD(
            student.network.parameters(),
            lr=student.lr,
            momentum=student.momentum,
            weight_decay=student.weight_decay,
            nesterov=student.momentum > 0,
            fused=fused(student.network.parameters()),
        )
        self.losses: list[Tensor] = []

    @torch.no_grad()
    def observe(self, batch: Batch) -> None:
        with observing(self.network):
            self.network(batch.images)

    def step(self, batch: Batch, progress: float, training_progress: float) -> None:
        """``progress`` counts from the first iteration, as the published steps do; cosines start with the training."""
        student = self.student
        for group in self.optimizer.param_groups:
            stepwise = student.decay in ("step", "late_step")
            factor = decay_factor(student.decay, progress if stepwise else training_progress)
            group["lr"] = student.lr * factor
        self.optimizer.zero_grad()
        loss = student.loss(self.network, batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append(kept(loss))

    def state_dict(self) -> dict[str, Any]:
        network, optimizer = self.student.network.state_dict(), self.optimizer.state_dict()
        return {"network": network, "optimizer": optimizer, "losses": numbers(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.student.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        device = next(self.student.network.parameters()).device
        self.losses = list(torch.tensor(state["losses"], device=device))


def _read_losses(history: History, stream: Stream, tuners: Mapping[str, _Tuner], train_from: int) -> None:
    """Bring the losses from the device; Diverged where one is not finite."""
    history.generator = read_losses(stream)
    for name, tuner in tuners.items():
        before = f"student {name!r} diverged: its loss is"
        history.students[name] = finite_numbers(tuner.losses, before, LOWER, train_from + 1)
