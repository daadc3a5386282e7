"""The fine-tuning loop: one stream of labelled images, any number of quantized students.

No stream sees a student, unless it was made for one, so one run of it serves every bit width, and a student learns the
same whether it is tuned alone or with others.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfqlib.checkpoint import load_checkpoint, save_checkpoint
from dfqlib.device import fused
from dfqlib.errors import Diverged, check_range
from dfqlib.finetuning.streams import Batch, Losses, Stateful, Stream, read_losses
from dfqlib.losses import student_loss
from dfqlib.progress import track
from dfqlib.quantizers.layers import observing
from dfqlib.schedules import CalibratedSchedule, GeneratorSchedule, TuningSchedule, decay_factor
from dfqlib.scores import Score
from dfqlib.speed.precision import run
from dfqlib.speed.scale_weights import scale_weights

REMEMBERED = ("scores", "diverged", "seconds")  # of a history, in a checkpoint; the losses are in the tuners' states
LOOK_EVERY = 25  # batches between two looks at the losses, which wait for the device


@dataclass(frozen=True)
class Checkpoint:
    """The file from which a stopped fine-tuning continues, written whenever ``seconds`` have passed and at the end.

    A file that cannot be read is refused; with ``anew`` the fine-tuning then starts again, with a warning. UserError
    for an interval out of range.
    """

    path: Path
    seconds: float = 60.0
    anew: bool = False

    def __post_init__(self) -> None:
        check_range("seconds", self.seconds, 0, 10**9)


def distillation_loss(network: nn.Module, batch: Batch, loss: Callable[..., Tensor] = student_loss) -> Tensor:
    """``loss`` of the student's logits, the teacher's logits and the labels of a batch."""
    return loss(run(network, batch.images), batch.teacher_logits, batch.labels)


@dataclass
class Student:
    """A quantized network and how it learns: its loss on a batch, and SGD with Nesterov momentum, or Adam.

    ``range_lr`` is the rate of activation ranges that learn, which are shares and so have one of their own.
    The network keeps its mode: in eval mode, as published, its batch-norm statistics stay the teacher's.
    """

    network: nn.Module
    lr: float = 1e-4
    decay: str = "step"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    loss: Callable[[nn.Module, Batch], Tensor] = distillation_loss
    optimizer: Literal["sgd", "adam"] = "sgd"
    range_lr: float = 0.0


@dataclass
class History:
    """What a fine-tuning recorded: losses per iteration, and test scores (iteration, top-1 in per cent)."""

    generator: list[float] = field(default_factory=list)
    students: dict[str, list[float]] = field(default_factory=dict)
    scores: dict[str, list[tuple[int, Score]]] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)  # students that were given up, each with the reason
    networks: dict[str, nn.Module] = field(default_factory=dict, compare=False)  # the students', which train in place
    seconds: float = field(default=0.0, compare=False)  # in all, also before a stop

    def last(self, student: str) -> Score:
        """Top-1 after the last iteration; NaN, with the reason, for a student that diverged."""
        if student in self.diverged:
            return Score([False], diverged=self.diverged[student])
        return self.scores[student][-1][1]

    def best(self, student: str) -> Score:
        """The best top-1 of all evaluations: picked on the test set, so too high; to be labelled as such."""
        return max(score for _, score in self.scores[student])


def finetune(
    stream: Stream,
    students: Mapping[str, Student],
    schedule: TuningSchedule,
    evaluate: Callable[[nn.Module], Score] | None = None,
    evaluate_every: int = 200,
    on_evaluation: Callable[[History], None] | None = None,
    label: str = "fine-tuning",
    generator_warmup: int = 0,
    checkpoint: Checkpoint | None = None,
) -> History:
    """Tune every student on the same stream of batches; networks and generator change in place.

    For the first ``generator_warmup`` batches only the generator trains; they are not part of ``iterations``. In the
    first ``observe_iterations`` the students only observe the images, to learn their activation ranges. Then the ranges
    are frozen, and the students train from iteration ``train_from`` to the end. ``evaluate`` returns a network's test
    score; it is called before the first training iteration, after every ``evaluate_every`` and after the last.
    ``on_evaluation`` is called with the history each time.

    A student whose loss is no longer finite is given up within ``LOOK_EVERY`` batches: ``History.diverged`` names its
    iteration and the term, and the others go on. Diverged if the generator's loss is not finite.

    With a ``checkpoint`` a stopped run continues from its file, if that exists, and on a CPU ends with exactly the
    numbers of an uninterrupted one. UserError if the checkpoint is another run's: of another teacher, other bits,
    another schedule, optimizer or seed.
    """
    iterations, train_from = schedule.iterations, schedule.train_from
    tuners = {name: _Tuner(name, student, train_from) for name, student in students.items()}
    history, start, settings = History(students={n: [] for n in students}, scores={n: [] for n in students}), 0, {}
    history.networks = {name: student.network for name, student in students.items()}
    if checkpoint is not None:
        settings = {"generator_warmup": generator_warmup, "evaluate_every": evaluate_every}
        settings |= _settings(stream, students, schedule)
        if state := load_checkpoint(checkpoint.path, settings, checkpoint.anew):
            start, history = state["drawn"], replace(history, **{name: state[name] for name in REMEMBERED})
            stream.load_state_dict(state["stream"])
            tuners = {name: tuner for name, tuner in tuners.items() if name not in history.diverged}
            for name, tuner in tuners.items():
                tuner.load_state_dict(state["students"][name])
    written = time.perf_counter()
    began = written - history.seconds
    for drawn in track(range(start, generator_warmup + iterations), label):
        batch = stream.next_batch()
        iteration = drawn - generator_warmup  # below 0 the generator trains alone
        for tuner in tuners.values():
            if 0 <= iteration < schedule.observe_iterations:
                with torch.no_grad(), observing(tuner.fast_network):
                    run(tuner.fast_network, batch.images)
            if iteration >= train_from:
                tuner.step(batch, iteration / iterations, (iteration - train_from) / (iterations - train_from))
        done = iteration + 1
        if drawn % LOOK_EVERY == 0:
            _read_losses(history, stream, tuners)
        if done == iterations or (done >= train_from and (done - train_from) % evaluate_every == 0):
            _read_losses(history, stream, tuners)
            if evaluate is not None:
                for name, tuner in tuners.items():
                    history.scores[name].append((done, evaluate(tuner.network)))
            if on_evaluation is not None:
                on_evaluation(history)
        now = time.perf_counter()
        history.seconds = now - began
        if checkpoint is not None and (done == iterations or now - written >= checkpoint.seconds):
            _read_losses(history, stream, tuners)  # no run can continue from a broken state
            state = {"drawn": drawn + 1} | {name: getattr(history, name) for name in REMEMBERED}
            states = {name: tuner.state_dict() for name, tuner in tuners.items()}
            save_checkpoint(checkpoint.path, settings, state | {"students": states, "stream": stream.state_dict()})
            written = time.perf_counter()
    _read_losses(history, stream, tuners)
    return history


def _settings(stream: Stream, students: Mapping[str, Student], schedule: TuningSchedule) -> dict[str, Any]:
    """What the checkpoint of a fine-tuning that is about to start must have been made with, by name."""
    kinds = GeneratorSchedule, CalibratedSchedule, TuningSchedule
    kind = next(kind for kind in kinds if isinstance(schedule, kind))
    settings = kind.of(schedule).values() | {"students": list(students)}  # a notebook's settings hold more than these
    for name, student in students.items():
        modules = list(student.network.modules())
        each = ([getattr(m, bits) for m in modules if hasattr(m, bits)] for bits in ("weight_bits", "bits"))
        settings[f"bits of {name}"] = "W{}A{}".format(*(bits[0] if len(set(bits)) == 1 else bits for bits in each))
        learning = "lr", "decay", "momentum", "weight_decay", "optimizer", "range_lr"
        settings |= {f"{key} of {name}": getattr(student, key) for key in learning}
    teacher = digest([student.network.state_dict() for student in students.values()])  # students start as its copies
    return settings | {"teacher": teacher, "stream": digest(stream.state_dict())}


def digest(state: Any) -> str:
    """A short hash of tensors, numbers and text, nested in mappings, lists and tuples."""
    parts, found = [state], hashlib.sha256()
    while parts:
        part = parts.pop()
        if isinstance(part, Mapping | list | tuple):
            parts += part.items() if isinstance(part, Mapping) else part
        else:
            found.update(part.detach().cpu().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return found.hexdigest()[:12]


class _Tuner(Stateful):
    """One student at work: its optimizer, and its losses so far."""

    remembers = "network", "optimizer", "losses"

    def __init__(self, name: str, student: Student, train_from: int) -> None:
        self.student, self.network = student, student.network
        self.fast_network = scale_weights(student.network)  # the same parameters, trained faster
        named, momentum = list(student.network.named_parameters()), student.momentum
        rates = {False: student.lr, True: student.range_lr}
        groups = [
            {"params": [p for name, p in named if name.endswith("stretch") == ranges], "lr": lr, "initial_lr": lr}
            for ranges, lr in rates.items()
        ]
        options = {"weight_decay": student.weight_decay, "fused": fused([p for _, p in named])}
        if student.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(groups, **options)
        else:
            self.optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, **options)
        self.losses = Losses(f"student {name!r}", train_from + 1)

    def step(self, batch: Batch, progress: float, training_progress: float) -> None:
        """``progress`` counts from the first iteration, as the published steps do; cosines start with the training."""
        decay = self.student.decay
        factor = decay_factor(decay, progress if decay in ("step", "late_step") else training_progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad()
        loss = self.student.loss(self.fast_network, batch)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss)


def _read_losses(history: History, stream: Stream, tuners: dict[str, _Tuner]) -> None:
    """Bring the losses from the device into the history, and remove the tuners of students that diverged.

    Diverged if a loss of the generator is not finite.
    """
    history.generator = read_losses(stream)
    for name, tuner in list(tuners.items()):
        try:
            history.students[name] = tuner.losses.read()
        except Diverged as error:
            history.diverged[name] = str(error)
            del tuners[name]
