"""What is measured: for each method the kit's own loop, and the published step of :mod:`benchmarks.published`.

Both start from the same weights and images and draw the same random numbers, so they compute the same losses.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks import published
from dfqlib.bits import BitWidths
from dfqlib.finetuning.loop import finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import Batch, GeneratorStream, ImageStream
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.methods import dsg, gdfq, hast, qimera, saft, zeroq
from dfqlib.models.teacher import Teacher
from dfqlib.schedules import AlignmentWeights, DiverseImageSchedule, GeneratorSchedule, HardImageSchedule, ImageSchedule

W4A4 = BitWidths(4, 4)
WIDTHS = (BitWidths(3, 3), W4A4, BitWidths(5, 5), BitWidths(8, 8))
SETTING = qimera.SuperpositionSettings()  # CIFAR-10's
MARGIN_IMAGES = 64  # noise images behind DSG's margins, which are computed before the first iteration
SEED = 0

Tick = Callable[[], None]


@dataclass(frozen=True)
class Outcome:
    """The losses of each iteration, and the tensors that were trained, each list in the order of the other side."""

    losses: list[list[float]]
    trained: list[Tensor]


class Step(Protocol):
    """A published step."""

    trained: list[Tensor]

    def step(self) -> list[float]: ...


@dataclass(frozen=True)
class Case:
    """One row of the table.

    ``ours(iterations, tick)`` runs the kit's loop and calls ``tick`` as each iteration begins; ``published()`` makes
    the step to compare it with. In the first iteration of both, students only observe.
    """

    name: str
    title: str
    batch: int
    ours: Callable[[int, Tick], Outcome]
    published: Callable[[], Step]


def plain(teacher: Teacher) -> nn.Module:
    """The teacher's network, in torch's default memory format."""
    return copy.deepcopy(teacher.network).to(memory_format=torch.contiguous_format)


def with_weights_of(source: nn.Module, target: nn.Module) -> nn.Module:
    """``target`` with the parameters of ``source``, which has the same ones in the same order."""
    with torch.no_grad():
        for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
            ours.copy_(theirs)
    return target


def schedule(batch: int, iterations: int) -> GeneratorSchedule:
    """The published settings without decay, which does not come in the first quarter of a published run."""
    lengths = {"iterations": iterations, "generator_iterations": iterations}
    return GeneratorSchedule(**lengths, observe_iterations=1, train_from=1, batch=batch, decay="constant")


def tuned(
    stream: GeneratorStream, teacher: Teacher, settings: GeneratorSchedule, widths: tuple[BitWidths, ...], tick: Tick
) -> Outcome:
    """The kit's fine-tuning: one generator, a student for each of ``widths``."""
    students = {str(width): gdfq.make_student(teacher, width, settings) for width in widths}
    handle = stream.generator.register_forward_pre_hook(lambda *_: tick())
    try:
        history = finetune(stream, students, settings)
    finally:
        handle.remove()
    of_students = zip(*history.students.values(), strict=True)
    losses = [[loss, *rest] for loss, rest in zip(history.generator, [(), *of_students], strict=True)]
    of_networks = [tensor for student in students.values() for tensor in published.by_name(student.network)]
    return Outcome(losses, [*stream.generator.parameters(), *of_networks])


def make_gdfq(teacher: Teacher, batch: int, widths: tuple[BitWidths, ...] = (W4A4,)) -> Case:
    """GDFQ; for several widths the published way is one run, with a generator of its own, for each."""

    def ours(iterations: int, tick: Tick) -> Outcome:
        settings = schedule(batch, iterations)
        return tuned(gdfq.make_stream(teacher, settings, seed=SEED), teacher, settings, widths, tick)

    def one_run(width: BitWidths) -> published.GeneratorTuning:
        source = gdfq.make_stream(teacher, schedule(batch, 2), seed=SEED).generator
        generator = with_weights_of(source, published.Generator(published.GdfqInput(teacher.entry.classes)))
        return published.GeneratorTuning(plain(teacher), generator, (width.weight, width.activation), batch, SEED)

    def theirs() -> Step:
        return one_run(widths[0]) if len(widths) == 1 else published.Table([one_run(width) for width in widths])

    named = ", ".join(map(str, widths))
    return Case("gdfq" if len(widths) == 1 else "gdfq_table", f"GDFQ, {named}", batch, ours, theirs)


def make_qimera(teacher: Teacher, batch: int) -> Case:
    """Qimera with the paper's mapping, W4A4."""

    def stream(iterations: int) -> GeneratorStream:
        return qimera.make_stream(teacher, schedule(batch, iterations), SETTING, seed=SEED)

    def ours(iterations: int, tick: Tick) -> Outcome:
        return tuned(stream(iterations), teacher, schedule(batch, iterations), (W4A4,), tick)

    def theirs() -> Step:
        source = stream(2).generator
        mapped, latent = source.mapping.weight.shape
        entry = published.QimeraInput(source.classes, latent, mapped, SETTING.p, SETTING.k, SEED)
        generator = with_weights_of(source, published.Generator(entry))
        return published.GeneratorTuning(plain(teacher), generator, (4, 4), batch, SEED)

    return Case("qimera", "Qimera, W4A4", batch, ours, theirs)


def synthesised(teacher: Teacher, tick: Tick, make: Callable[[], SyntheticImages]) -> Outcome:
    """The outcome of ``make``, one of the kit's syntheses, which runs the folded teacher once per iteration."""
    handle = teacher.folded.register_forward_pre_hook(lambda *_: tick())
    try:
        made = make()
    finally:
        handle.remove()
    return Outcome([[loss] for loss in made.losses[0]], [made.images])


def make_zeroq(teacher: Teacher, batch: int) -> Case:
    """ZeroQ's distillation."""

    def ours(iterations: int, tick: Tick) -> Outcome:
        settings = ImageSchedule(images=batch, synthesis_iterations=iterations)
        return synthesised(teacher, tick, lambda: zeroq.distil_images(teacher, settings, seed=SEED))

    def theirs() -> Step:
        start = zeroq.start_images(batch, teacher.entry.image_shape, SEED).to(teacher.device)
        return published.Synthesis(plain(teacher), start, published.zeroq_loss, lr=0.5, patience=100)

    return Case("zeroq", "ZeroQ, images", batch, ours, theirs)


def make_hast(teacher: Teacher, batch: int) -> Case:
    """HAST's hard images."""
    beta, gamma = hast.PUBLISHED["cifar10"]

    def ours(iterations: int, tick: Tick) -> Outcome:
        settings = HardImageSchedule(images=batch, synthesis_batch=batch, synthesis_iterations=iterations)
        return synthesised(teacher, tick, lambda: hast.hard_images(teacher, settings, beta, gamma, seed=SEED))

    def theirs() -> Step:
        random, size = torch.Generator().manual_seed(SEED), teacher.entry.input_size
        labels = torch.randint(teacher.entry.classes, (batch,), generator=random).to(teacher.device)
        start = torch.randn(batch, 3, size, size, generator=random).to(teacher.device)
        return published.Synthesis(plain(teacher), start, published.hast_loss(labels, beta, gamma), lr=0.5, patience=50)

    return Case("hast", "HAST, images", batch, ours, theirs)


def make_dsg(teacher: Teacher, batch: int) -> Case:
    """DSG's images for post-training quantization."""
    gaps = dsg.noise_gaps(teacher, MARGIN_IMAGES, SEED)

    def ours(iterations: int, tick: Tick) -> Outcome:
        settings = DiverseImageSchedule(images=batch, synthesis_iterations=iterations)
        return synthesised(teacher, tick, lambda: dsg.synthesise_diverse(teacher, gaps, settings, seed=SEED))

    def theirs() -> Step:
        size = teacher.entry.input_size
        random = torch.Generator().manual_seed(SEED + 1)
        labels = torch.randint(teacher.entry.classes, (batch,), generator=random).to(teacher.device)
        loss = published.dsg_loss(labels, gaps.margins(), round(dsg.SHIFT * size), SEED)
        start = dsg.start_images(batch, teacher.entry.image_shape, SEED).to(teacher.device)
        return published.Synthesis(plain(teacher), start, loss, lr=0.9, patience=260)

    return Case("dsg", "DSG, images", batch, ours, theirs)


def make_saft(teacher: Teacher, batch: int) -> Case:
    """SaFT's and SynQ's fine-tuning, W4A4, on noise in place of images."""
    random, size = torch.Generator().manual_seed(SEED), teacher.entry.input_size
    images = torch.randn(batch, 3, size, size, generator=random).to(teacher.device)
    labels = torch.randint(teacher.entry.classes, (batch,), generator=random).to(teacher.device)

    def ours(iterations: int, tick: Tick) -> Outcome:
        probe = NetworkProbe(teacher.network)
        student = saft.make_student(teacher, probe, W4A4, AlignmentWeights(), decay="constant")
        stream = Ticking(ImageStream(teacher.network, images, labels, batch, seed=SEED), tick)
        history = finetune(saft.WithTeacherView(stream, probe), {"W4A4": student}, schedule(batch, iterations))
        losses = [[], *([loss] for loss in history.students["W4A4"])]
        return Outcome(losses, published.by_name(student.network))

    def theirs() -> Step:
        return published.Alignment(plain(teacher), images, labels, (4, 4), SEED)

    return Case("saft", "SaFT, SynQ, W4A4", batch, ours, theirs)


class Ticking:
    """``stream``, with a tick before each batch."""

    def __init__(self, stream: ImageStream, tick: Tick) -> None:
        self.stream, self.tick = stream, tick
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def next_batch(self) -> Batch:
        self.tick()
        return self.stream.next_batch()


def make_gdfq_table(teacher: Teacher, batch: int) -> Case:
    """GDFQ at four bit widths."""
    return make_gdfq(teacher, batch, WIDTHS)


# By name: how to make it, and the published batch.
CASES: dict[str, tuple[Callable[[Teacher, int], Case], int]] = {
    "gdfq": (make_gdfq, 200),
    "gdfq_table": (make_gdfq_table, 200),
    "qimera": (make_qimera, 200),
    "zeroq": (make_zeroq, 32),
    "hast": (make_hast, 256),
    "dsg": (make_dsg, 40),
    "saft": (make_saft, 64),
}


def make_case(name: str, teacher: Teacher, batch: int | None = None) -> Case:
    """The case ``name`` of :data:`CASES`, with the published batch unless ``batch`` is given."""
    make, published_batch = CASES[name]
    return make(teacher, batch or published_batch)
