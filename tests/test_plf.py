"""PLF: self-entropy, the split and its two kinds of label, and the loss, each by hand; what a user can switch off."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import ImageStream
from dfqlib.methods import plf
from dfqlib.methods.saft import WithTeacherView
from dfqlib.models.teacher import Teacher, load_teacher
from dfqlib.quantizers.layers import observing
from dfqlib.schedules import TuningSchedule


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_self_entropy_and_labels_by_hand():
    sure, two, all_alike = logits(0.97, 0.01, 0.01, 0.01), logits(0.5, 0.25, 0.125, 0.125), logits(*4 * [0.25])
    some = torch.cat([sure, two, all_alike])
    entropies = plf.self_entropy(some)
    assert entropies[1].item() == pytest.approx(1.75 / 2) and entropies[2].item() == pytest.approx(1)  # bits of 2
    by_hand = -(0.97 * math.log(0.97) + 0.03 * math.log(0.01)) / math.log(4)
    assert entropies[0].item() == pytest.approx(by_hand)
    labels = plf.pseudo_labels(some, 0.5)
    assert labels[0].tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(labels[1], torch.tensor([2 / 3, 1 / 3, 0, 0]))
    assert sorted(labels[2].tolist()) == pytest.approx([0, 0, 0.5, 0.5])
    assert plf.pseudo_labels(some, 0.9)[1].tolist() == [1, 0, 0, 0]  # at most 0.9: reliable
    certain = torch.tensor([[200.0, 0.0]])
    assert plf.self_entropy(certain).item() == 0  # and not a number that is none


def test_the_loss_is_a_mean_over_each_kind_of_image():
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.4], [0.0, 0.5, 0.5]])
    student = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    each = -(labels * student.log_softmax(1)).sum(1)
    torch.testing.assert_close(plf.pseudo_label_loss(student, labels), each[0] + 0.3 * each[1:].mean())
    torch.testing.assert_close(plf.pseudo_label_loss(student, labels, low_weight=0.0), each[0])
    torch.testing.assert_close(plf.pseudo_label_loss(student, labels, high_weight=0.0), 0.3 * each[1:].mean())
    torch.testing.assert_close(plf.pseudo_label_loss(student[:1], labels[:1]), each[0])  # none of the other kind


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("resnet20_cifar10")


def stream(teacher, iterations=4):
    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(6, 3, 32, 32, generator=random), torch.arange(6)
    seen = WithTeacherView(ImageStream(teacher.network, images, labels, 4), NetworkProbe(teacher.network), False)
    return plf.PseudoLabelled(seen, iterations, upper=0.9, lower=0.1)


def test_the_threshold_falls_from_the_upper_to_the_lower_one_and_goes_on_after_a_stop(teacher):
    some = stream(teacher)
    batches = [some.next_batch() for _ in range(4)]
    for drawn, batch in enumerate(batches):
        assert torch.equal(batch.labels, plf.pseudo_labels(batch.teacher_logits, 0.9 - 0.2 * drawn))
    stopped, again = stream(teacher), stream(teacher)
    for _ in range(2):
        stopped.next_batch()
    again.load_state_dict(stopped.state_dict())
    assert torch.equal(again.next_batch().labels, batches[2].labels)


def test_the_loss_adds_answers_pseudo_labels_and_features(teacher):
    student = plf.make_student(teacher, BitWidths(4, 4))
    batch = stream(teacher).next_batch()
    with observing(student.network), torch.no_grad():
        student.network(batch.images)
    ours = NetworkProbe(student.network)(batch.images)
    kl = F.kl_div(ours.logits.log_softmax(1), batch.teacher_logits.softmax(1), reduction="batchmean")
    features = sum(F.mse_loss(*pair) for pair in zip(ours.attentions, batch.seen.attentions, strict=True))
    expected = kl + plf.pseudo_label_loss(ours.logits, batch.labels) + 100 * features
    torch.testing.assert_close(student.loss(student.network, batch), expected, rtol=1e-4, atol=1e-4)
    probe, nothing = NetworkProbe(student.network), {"high_weight": 0.0, "low_weight": 0.0, "feature_weight": 0.0}
    torch.testing.assert_close(plf.plf_loss(student.network, batch, probe, **nothing), kl, rtol=1e-4, atol=1e-4)


def test_students_of_several_widths_learn_on_one_stream(teacher):
    widths = [BitWidths(4, 4), BitWidths(3, 3)]
    students = {str(width): plf.make_student(teacher, width, lr=1e-4, decay="constant") for width in widths}
    spans = TuningSchedule(iterations=12, observe_iterations=2, train_from=2)
    losses = finetune(stream(teacher, 12), students, spans).students
    assert all(each[-1] < each[0] for each in losses.values())


def test_a_network_without_residual_units_is_refused_unless_features_are_left_out():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    plain = Teacher.from_module(nn.Sequential(*layers), 2, (0.5,) * 3, (0.25,) * 3, input_size=8)
    with pytest.raises(UserError, match=r"feature_weight compares residual units.*allowed: 0"):
        plf.make_student(plain, BitWidths(4, 4))
    assert plf.make_student(plain, BitWidths(4, 4), feature_weight=0.0)
