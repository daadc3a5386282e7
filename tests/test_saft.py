"""SaFT's fine-tuning: each term by hand, promotion, sharing of the teacher's view, and what may be switched off."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.finetuning.network_views import Internals, NetworkProbe, channel_attention
from dfqlib.finetuning.streams import Batch, FirstThen, GeneratorStream, ImageStream, generated_pool
from dfqlib.generators.networks import Generator
from dfqlib.losses import distillation_kl
from dfqlib.methods import gdfq, reconstruct, saft
from dfqlib.methods.saft import HAST, WithTeacherView, agreement, attention_gap, make_student, selective_cross_entropy
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.calibrate import calibrated
from dfqlib.quantizers.layers import observing
from dfqlib.schedules import AlignmentWeights, CalibratedSchedule, Corrections, GeneratorSchedule, TuningSchedule
from dfqlib.scores import Score


class Residual(nn.Module):
    """Two residual units and the head of a ResNet, for 8 x 8 images of four classes."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = (
            nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)) for channels in (3, 6, 6)
        )
        self.pool, self.output = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for unit in (self.one, self.two):
            x = F.relu(unit(x) + x)
        return self.output(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = Residual()
    for _ in range(20):
        network(torch.randn(32, 3, 8, 8) * 2 + 1)
    return Teacher.from_module(network, 4, (0.5,) * 3, (0.25,) * 3, input_size=8)


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    return torch.randn(10, 3, 8, 8, generator=random), torch.arange(10) % 4


def make(teacher, data, bits=2, **weights):
    """(stream, student) with ranges learned."""
    weights = AlignmentWeights(**weights)
    probe = NetworkProbe(teacher.network, weights.saliency_of, cam=weights.cam)
    student = make_student(teacher, probe, BitWidths(bits, bits), weights, lr=1e-4, decay="cosine")
    with observing(student.network), torch.no_grad():
        student.network(data[0])
    return WithTeacherView(ImageStream(teacher.network, *data, batch=8), probe), student


def spans(iterations, observed):
    return TuningSchedule(iterations=iterations, observe_iterations=observed, train_from=observed)


def test_selective_cross_entropy_by_hand():
    # The teacher gives the label 3/4, 1/4 and 1/2: difficulties 1/4, 3/4 and 1/2.
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)], [0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0], [9.0, 0.0], [math.log(3.0), 0.0]])
    labels = torch.zeros(3, dtype=torch.long)
    one, both = math.log(2), (math.log(2) + math.log(4 / 3)) / 2  # 1/2 is not under 0.5
    for below, by_hand in {0.5: one, 0.6: both, 2.0: F.cross_entropy(student, labels).item(), 0.1: 0}.items():
        assert selective_cross_entropy(student, teacher, labels, below).item() == pytest.approx(by_hand)


def test_channel_attention_and_its_gap_by_hand():
    features = torch.tensor([[[[3.0, 0.0]], [[0.0, 0.0]]], [[[2.0, 2.0]], [[2.0, -2.0]]]])
    attention = channel_attention(features)
    half = 0.5**0.5
    torch.testing.assert_close(attention, torch.tensor([[1.0, 0.0], [half, half]]))
    torch.testing.assert_close(channel_attention(7 * features), attention)
    zero = torch.zeros(2, 2)
    # Means of squares: 1/2 of the first unit, (1 + 0 + 1/2 + 1/2) / 4; the second unit agrees.
    torch.testing.assert_close(attention_gap([attention, zero], [zero, zero]), torch.tensor(0.5))
    features.zero_().requires_grad_()
    channel_attention(features).sum().backward()
    assert features.grad.isfinite().all()


def test_agreement_is_the_sum_of_its_weighted_terms():
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 4, generator=random)
    attention = torch.rand(2, 5, 6, generator=random)
    ours, theirs = (Internals(logits[i], [attention[i]], [], None) for i in range(2))
    labels, terms = torch.arange(5) % 4, AlignmentWeights(easy_below=0.8)
    kl = 20 * distillation_kl(theirs.logits, ours.logits, 20)
    ce = 0.05 * selective_cross_entropy(ours.logits, theirs.logits, labels, 0.8)
    fa = 2000 * attention_gap(ours.attentions, theirs.attentions)
    torch.testing.assert_close(agreement(ours, theirs, labels, terms), kl + ce + fa)
    torch.testing.assert_close(agreement(ours, theirs, labels, terms, attention=False), kl + ce)
    for off, rest in (("kl_weight", ce + fa), ("ce_weight", kl + fa), ("attention_weight", kl + ce)):
        torch.testing.assert_close(agreement(ours, theirs, labels, dataclasses.replace(terms, **{off: 0.0})), rest)


def test_promotion_moves_each_pixel_by_epsilon_and_raises_the_loss(teacher, data):
    images = data[0].clone().requires_grad_()

    def loss(x):
        return F.cross_entropy(teacher.network(x), data[1])

    before = loss(images)
    harder = saft.promote(images, before, 0.02)
    moved = (harder - data[0]).abs()
    assert not harder.requires_grad and images.grad is None and loss(harder) > before
    assert ((moved < 1e-3) | ((moved - 0.02).abs() < 1e-6)).all() and (moved > 1e-3).float().mean() > 0.9


def by_hand(teacher, student, batch, terms, perturbed_attention=True):
    """The whole loss, composed anew from the networks alone."""
    own, other = (NetworkProbe(each.network, terms.saliency_of, cam=terms.cam) for each in (student, teacher))
    images = batch.images.clone().requires_grad_()
    ours, theirs = own(images, True), other(batch.images, True)
    clean = agreement(ours, theirs, batch.labels, terms)
    harder = batch.images + terms.epsilon * torch.autograd.grad(clean, images, retain_graph=True)[0].sign()
    total = clean + terms.saliency_weight * (ours.saliency - theirs.saliency).square().mean()
    if terms.epsilon:
        copies = agreement(own(harder), other(harder), batch.labels, terms, perturbed_attention)
        total = total + terms.perturbed_weight * copies
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epsilon": 0.0},
        {"saliency_weight": 0.0},
        {"perturbed_attention": False},
        {"saliency_of": "convolution"},
        {"perturbed_weight": 0.5, "cam": "gradcam++"},
        HAST,
    ],
    ids=str,
)
def test_the_loss_is_both_agreements_and_the_gap_of_the_maps(teacher, data, changes):
    stream, student = make(teacher, data, **changes)
    batch = stream.next_batch()
    ours = student.loss(student.network, batch)
    terms = AlignmentWeights(**changes)
    torch.testing.assert_close(ours, by_hand(teacher, student, batch, terms, terms.perturbed_attention))
    ours.backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.network.parameters())
    assert all(parameter.grad is None for parameter in teacher.network.parameters())


def test_a_student_that_is_the_teacher_has_nothing_to_learn_but_labels(teacher, data):
    terms = AlignmentWeights(ce_weight=0.0)
    viewer = NetworkProbe(teacher.network)
    batch = WithTeacherView(ImageStream(teacher.network, *data, 8), viewer).next_batch()
    assert saft.alignment_loss(teacher.network, batch, viewer, viewer, terms).item() < 1e-3


def test_tuning_brings_the_student_closer_to_the_teacher(teacher, data):
    stream, student = make(teacher, data)
    student.lr = 2e-5
    losses = finetune(stream, {"s": student}, spans(45, 5)).students["s"]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_view_of_a_batch_is_the_teachers_and_carries_no_gradient(teacher, data):
    batch = make(teacher, data)[0].next_batch()
    torch.testing.assert_close(batch.teacher_logits, teacher.network(batch.images))
    assert isinstance(batch, Batch) and batch.seen.saliency.shape == (8, 8, 8) and len(batch.seen.attentions) == 2
    assert not any(t.requires_grad for t in (batch.images, batch.seen.saliency, *batch.seen.attentions))


def test_a_generator_learns_behind_the_view(teacher, data):
    stream = GeneratorStream(teacher.network, Generator(4, shape=(3, 8, 8)), 2, batch=4)
    first, then = WithTeacherView(stream, NetworkProbe(teacher.network)), ImageStream(teacher.network, *data, 8)
    both = FirstThen(first, 2, then)
    assert [len(both.next_batch().images) for _ in range(3)] == [4, 4, 8] and len(stream.losses) == 2
    ranges_first = saft.after_generated_ranges(teacher, then, 2)
    assert [len(ranges_first.next_batch().images) for _ in range(3)] == [16, 16, 8]


def test_hast_weights_of_a_data_set_and_as_released():
    """lam and eps of its configurations, on CIFAR-100 SaFT's; the released code drops cross-entropy."""
    for dataset, expected in (("cifar10", (1000, 0.01)), ("cifar100", (2000, 0.02)), ("imagenet", (4000, 0.01))):
        weights = AlignmentWeights(**saft.hast_weights(dataset))
        assert (weights.attention_weight, weights.epsilon) == expected
        assert (weights.ce_weight, weights.saliency_weight) == (1, 0)
    assert saft.hast_weights("cifar10", as_released=True)["ce_weight"] == 0


def test_images_come_round_by_round(teacher, data):
    images = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 8, 8)
    stream, again = (ImageStream(teacher.network, images, data[1], 4, seed=5) for _ in range(2))
    batches = [stream.next_batch() for _ in range(5)]
    numbers = torch.cat([batch.images[:, 0, 0, 0] for batch in batches])
    assert sorted(numbers[:10].tolist()) == sorted(numbers[10:].tolist()) == list(range(10))
    assert not torch.equal(numbers[:10], numbers[10:])
    assert torch.equal(torch.cat([batch.labels for batch in batches]), data[1][numbers.long()])
    assert torch.equal(numbers, torch.cat([again.next_batch().images[:, 0, 0, 0] for _ in range(5)]))
    large = ImageStream(teacher.network, images, data[1], batch=25)  # more than there are
    assert len(large.next_batch().images) == 25


def test_the_teacher_is_asked_once_when_its_logits_are_read(teacher, data):
    asked, scale = [], torch.ones(1, requires_grad=True)

    def ask(images):
        asked.append(len(images))
        return teacher.network(images * scale)

    students = {name: gdfq.make_student(teacher, BitWidths(4, 4), GeneratorSchedule()) for name in "ab"}
    finetune(ImageStream(ask, *data, 4), students, spans(5, 3))
    assert asked == [4, 4]
    assert not ImageStream(ask, *data, 4).next_batch().teacher_logits.requires_grad


def test_output_gap_by_hand():
    ones, twos = torch.ones(2, 1, 1, 2), 2 * torch.ones(2, 1, 1, 2)
    assert reconstruct.output_gap([ones, twos], [twos, twos]).item() == 1 / 8  # (1 / 4 + 0) / 2
    assert reconstruct.output_gap([7 * ones], [7 * twos]).item() == 1 / 4


@pytest.mark.parametrize("sites", ["papers", "integer"])
def test_reconstruction_of_calibrated_students_brings_their_answers_closer(teacher, data, sites):
    """Weights, ranges and batch norms start as calibrated: nothing is left to observe."""
    student = reconstruct.make_student(calibrated(teacher.network, BitWidths(3, 4), data[0], sites=sites), 3e-3)
    stream = WithTeacherView(ImageStream(teacher.network, *data, batch=8), NetworkProbe(teacher.network))

    def gap():
        return (student.network(data[0]) - teacher.network(data[0])).square().mean().item()

    before = gap()
    losses = finetune(stream, {"s": student}, CalibratedSchedule(iterations=80)).students["s"]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10]) and gap() < 0.8 * before


def test_without_residual_units_attention_is_refused_and_logits_alone_are_reconstructed():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = Teacher.from_module(network.append(nn.Linear(4, 2)), 2, (0.5,) * 3, (0.25,) * 3, input_size=8)
    with pytest.raises(UserError, match="attention_weight=2000"):
        make_student(plain, NetworkProbe(plain.network), BitWidths(4, 4), AlignmentWeights())
    make_student(plain, NetworkProbe(plain.network), BitWidths(4, 4), AlignmentWeights(attention_weight=0))
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    student = reconstruct.make_student(calibrated(plain.network, BitWidths(2, 2), images))
    losses = reconstruct.reconstruct(plain, {"s": student}, images, 40, batch=8).students["s"]
    assert losses[-1] < losses[0]


def test_students_of_a_pool_are_calibrated_and_then_reconstructed(teacher, data):
    stream = ImageStream(teacher.network, *data, 4)
    pool = generated_pool(stream, 7)
    assert pool.images.shape == (7, *data[0].shape[1:]) and pool.labels.shape == (7,)
    schedule, seen = Corrections(corrected_iterations=5, corrected_batch=4, corrected_refinement=2), []
    widths = [BitWidths(4, 4), BitWidths(3, 3)]
    history = reconstruct.tune(teacher, pool, widths, schedule, lambda network: seen.append(network) or Score([True]))
    assert {name: len(losses) for name, losses in history.students.items()} == {"W4A4": 5, "W3A3": 5}
    assert [done for done, _ in history.scores["W3A3"]] == [1, 6] and len(seen) == 4  # before and after, of each
