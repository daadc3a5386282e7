"""The fine-tuning loop: students share a stream and leave it alone; ranges freeze; a stopped run goes on as it was."""

import io
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

from dfqlib.bits import BitWidths
from dfqlib.data.crops import RandomCrops
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import Checkpoint, History, Student, distillation_loss, finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import FirstThen, GeneratorStream, ImageStream
from dfqlib.generators.networks import Generator
from dfqlib.loss_terms import add_up
from dfqlib.losses import bns_loss, student_loss
from dfqlib.methods import dsg, gdfq, qimera
from dfqlib.methods.saft import WithTeacherView
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.convert import quantize_model
from dfqlib.quantizers.layers import FakeQuantize
from dfqlib.schedules import GeneratorSchedule, TuningSchedule, decay_factor


@pytest.fixture(scope="module")
def teacher():
    return small_teacher()


def small_teacher(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1, stride=2)]
    layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    network = nn.Sequential(*layers)
    for _ in range(20):
        network(torch.randn(32, 3, 8, 8) * 2 + 1)  # statistics that differ from a fresh generator's
    return network.eval().requires_grad_(False)


def make_stream(teacher, iterations=6, seed=0, **options):
    torch.manual_seed(seed)
    return GeneratorStream(
        teacher, Generator(4, shape=(3, 8, 8)), iterations, batch=16, decay="constant", seed=seed, **options
    )


def make_student(teacher, bits=4, **options):
    return Student(quantize_model(teacher, BitWidths(bits, bits)), **({"lr": 0.01, "decay": "cosine"} | options))


def spans(iterations, observe_iterations, train_from=None):
    train_from = train_from or observe_iterations
    return TuningSchedule(iterations=iterations, observe_iterations=observe_iterations, train_from=train_from)


def parameters(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        # A range not learned yet is NaN on both sides.
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)


def test_generator_is_bitwise_the_same_with_one_student_and_with_four(teacher):
    results = []
    for widths in ([3], [2, 3, 4, 8]):
        stream, students = make_stream(teacher), {f"w{bits}": make_student(teacher, bits) for bits in widths}
        finetune(stream, students, spans(6, 2))
        results.append(parameters(stream.generator) | parameters(students["w3"].network))
    assert_equal(*results)


def adadfq_loss(teacher, labels, layers, student, least=0.1, most=0.8):
    """AdaDFQ's generator: disagreement and agreement of both networks on the label, within a margin; L_BNS."""
    entropy = Categorical(logits=teacher - student).entropy()
    share = (entropy - entropy.min()) / (math.log(teacher.shape[1]) - entropy.min())
    margin = (least - share).relu().mean() + (share - most).relu().mean()
    both = 0.2 * F.cross_entropy(teacher - student, labels) + 0.1 * F.cross_entropy(teacher + student, labels)
    return add_up({"margin": margin, "agreement": both, "L_BNS": bns_loss(layers)})


def test_a_generator_may_look_at_its_student_from_the_first_batch_on(teacher):
    made = []
    for bits in (2, 8):
        student = make_student(teacher, bits=bits)
        stream = make_stream(teacher, 8, loss=adadfq_loss, student=student.network)
        history = finetune(stream, {"s": student}, spans(6, 2), generator_warmup=2)
        assert len(history.generator) == 8 and len(history.students["s"]) == 4
        made.append(torch.cat([p.detach().flatten() for p in stream.generator.parameters()]))
    assert not torch.equal(*made)  # from the same noise: they have learned for their students


def test_the_generator_learns_and_then_stays_as_it_is(teacher):
    stream = make_stream(teacher, iterations=30)
    for _ in range(30):
        stream.next_batch()
    losses = torch.tensor(stream.read_losses())
    assert losses[-5:].mean() < losses[:5].mean()
    before = [value.clone() for value in stream.generator.parameters()]
    first, second = stream.next_batch(), stream.next_batch()
    assert len(stream.read_losses()) == 30
    assert all(map(torch.equal, before, stream.generator.parameters()))
    assert not torch.equal(first.images, second.images)
    assert not first.images.requires_grad and not first.teacher_logits.requires_grad


def test_ranges_and_statistics_are_frozen_after_the_warm_up_and_weights_before(teacher):
    student, stream = make_student(teacher), make_stream(teacher)
    start, seen = parameters(student.network), []

    class Spy:
        """The stream, with a look at the student before each batch."""

        def next_batch(self):
            seen.append(parameters(student.network))
            return stream.next_batch()

    finetune(Spy(), {"s": student}, spans(7, 3, 5))
    seen.append(parameters(student.network))
    ranges = [name for name in start if name.endswith(".high")]  # after a ReLU the low end is 0 throughout
    running = [name for name in start if "running" in name]
    weights = [name for name, _ in student.network.named_parameters()]
    assert ranges and running and weights
    for name in ranges:
        assert not torch.equal(seen[1][name], seen[3][name])  # learned in iterations 0 to 2
        assert torch.equal(seen[3][name], seen[7][name])
    for name in running:
        assert torch.equal(start[name], seen[7][name])
    for name in weights:
        assert torch.equal(start[name], seen[5][name])
        assert not torch.equal(seen[5][name], seen[7][name]), name  # batch-norm affines train too
    assert not any(m.observing for m in student.network.modules() if isinstance(m, FakeQuantize))


def test_tuning_brings_the_student_closer_to_the_teacher_which_it_leaves_alone(teacher):
    loss = partial(distillation_loss, loss=partial(student_loss, ce_weight=0))
    student, before = make_student(teacher, bits=2, loss=loss), parameters(teacher)
    losses = finetune(make_stream(teacher, 0), {"s": student}, spans(45, 5)).students["s"]
    assert len(losses) == 40
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert_equal(before, parameters(teacher))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_last_and_best_scores_and_when_they_are_taken(teacher):
    scores, looks = iter([1.0, 10.0, 30.0, 20.0]), []

    def look(history):
        looks.append((len(history.generator), len(history.students["s"])))

    students = {"s": make_student(teacher)}
    history = finetune(make_stream(teacher), students, spans(7, 2), lambda _: next(scores), 2, look)
    assert history.scores["s"] == [(2, 1.0), (4, 10.0), (6, 30.0), (7, 20.0)]
    assert (history.last("s"), history.best("s")) == (20.0, 30.0)
    assert History(scores={"s": [(1, 5.0)]}).best("s") == 5.0
    assert looks == [(2, 0), (4, 2), (6, 4), (6, 5)]  # the generator stopped after six


def test_decays():
    assert [decay_factor("step", p) for p in (0.0, 0.2499, 0.25, 0.5, 0.75)] == pytest.approx([1, 1, 0.1, 0.01, 0.001])
    assert [decay_factor("cosine", p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.5, 0])
    assert max(decay_factor("cosine", p / 100) for p in range(100)) == pytest.approx(decay_factor("cosine", 0.1))
    assert decay_factor("constant", 0.9) == 1
    rates = [decay_factor("late_step", epoch / 50) for epoch in (0, 19, 20, 39, 40, 49)]  # as published
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    with pytest.raises(UserError, match="decay='linear'"):
        decay_factor("linear", 0.5)


def image_stream(teacher, seed=0):
    images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return ImageStream(teacher, images, torch.arange(20) % 4, batch=8, vary=RandomCrops(8, seed=seed), seed=seed)


def method_stream(method, network):
    teacher = Teacher.from_module(network, 4, (0.5,) * 3, (0.25,) * 3, input_size=8)
    schedule = GeneratorSchedule(batch=8, generator_iterations=5)
    if method == "qimera":  # about every second batch is superposed
        return qimera.make_stream(teacher, schedule, qimera.SuperpositionSettings(p=0.5, k=2))
    if method == "gdfq":
        return gdfq.make_stream(teacher, schedule)
    return dsg.make_stream(teacher, schedule, dsg.noise_gaps(teacher, 16))


STREAMS = {
    "images": image_stream,
    "generator, then images": lambda teacher: FirstThen(make_stream(teacher), 5, image_stream(teacher)),
    "with the teacher's view": lambda teacher: WithTeacherView(image_stream(teacher), NetworkProbe(teacher)),
} | {method: partial(method_stream, method) for method in ("gdfq", "qimera", "dsg")}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_a_stream_goes_on_from_its_state_with_the_same_batches(teacher, make):
    """Everything that a draw, a loss or a crop depends on is part of the state; 3 batches before and 8 after a stop."""
    stream, saved = make(teacher), io.BytesIO()
    for _ in range(3):
        stream.next_batch()
    torch.save(stream.state_dict(), saved)
    saved.seek(0)
    again = make(teacher)
    again.load_state_dict(torch.load(saved, weights_only=True))
    for _ in range(8):
        first, second = stream.next_batch(), again.next_batch()
        for part in ("images", "labels", "teacher_logits"):
            assert torch.equal(getattr(first, part), getattr(second, part)), part


def tuned(teacher, checkpoint, stop_at=None):
    """Parameters and history of two students; ``stop_at`` breaks off when that many iterations are done."""

    def stop(history):
        if stop_at and len(history.students["w3"]) + 2 >= stop_at:
            raise KeyboardInterrupt

    def score(network):
        return network(torch.ones(1, 3, 8, 8)).sum().item()

    students = {"w3": make_student(teacher, 3), "w4": make_student(teacher, 4)}
    stream, options = STREAMS["generator, then images"](teacher), {"generator_warmup": 3, "checkpoint": checkpoint}
    history = finetune(stream, students, spans(8, 2), score, 1, stop, **options)
    return {name: parameters(student.network) for name, student in students.items()}, history


def test_a_stopped_run_goes_on_to_the_same_numbers(teacher, tmp_path):
    whole, whole_history = tuned(teacher, None)
    checkpoint = Checkpoint(tmp_path / "run.ckpt", seconds=0)
    for stop_at in (4, 7):  # stopped twice, each time an iteration after the last checkpoint
        with pytest.raises(KeyboardInterrupt):
            tuned(teacher, checkpoint, stop_at)
    for _ in range(2):  # the second time nothing is left to do
        continued, history = tuned(teacher, checkpoint)
        for name in whole:
            assert_equal(whole[name], continued[name])
        assert history == whole_history


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"of": 1}, r"teacher='\w+' \(it has '\w+'\)"),
        ({"bits": 8}, r"bits of s='W8A8' \(it has 'W4A4'\)"),
        ({"lr": 1.0}, r"lr of s=1\.0 \(it has 0\.01\)"),
        ({"decay": "step"}, r"decay of s='step' \(it has 'cosine'\)"),
        ({"momentum": 0.5}, r"momentum of s=0\.5 \(it has 0\.9\)"),
        ({"seed": 1}, r"settings: stream='\w+' \(it has '\w+'\)"),
        ({"iterations": 9}, r"settings: iterations=9 \(it has 8\)"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path, change, told):
    checkpoint = Checkpoint(tmp_path / "run.ckpt", seconds=0)

    def run(of=0, seed=0, iterations=8, **options):
        network = small_teacher(of)
        student = make_student(network, **options)
        finetune(make_stream(network, seed=seed), {"s": student}, spans(iterations, 2), checkpoint=checkpoint)

    run()
    with pytest.raises(UserError, match=told):
        run(**change)


def test_half_a_checkpoint_is_refused(teacher, tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.ckpt", seconds=0)
    tuned(teacher, checkpoint)
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"run\.ckpt' cannot be read"):
        tuned(teacher, checkpoint)
    with pytest.raises(UserError, match="seconds=-1"):
        Checkpoint(checkpoint.path, seconds=-1)


def test_warming_up_the_generator_is_drawing_batches_before_the_run(teacher):
    results = []
    for drawn, warmup in ((3, 0), (0, 3)):
        stream, student = make_stream(teacher), make_student(teacher)
        for _ in range(drawn):
            stream.next_batch()
        finetune(stream, {"s": student}, spans(4, 1), generator_warmup=warmup)
        results.append(parameters(student.network))
    assert_equal(*results)
