"""GDFQ's parts as a user combines them."""

import pytest
import torch
from pytorchcv.model_provider import get_model
from torch import nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.methods.gdfq import labelled_images, layer_gaps, make_stream, make_student
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.layers import observing
from dfqlib.schedules import GeneratorSchedule

W4A4 = BitWidths(4, 4)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher.from_module(get_model("resnet20_cifar10"), 10, (0.5,) * 3, (0.25,) * 3)


def test_settings_are_the_papers_unless_changed(teacher):
    schedule = GeneratorSchedule()
    assert (schedule.iterations, schedule.observe_iterations, schedule.batch) == (400 * 200, 4 * 200, 200)
    assert (schedule.generator_lr, schedule.student_lr, schedule.temperature) == (1e-3, 1e-4, 20)
    assert make_stream(teacher, schedule).optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    student = make_student(teacher, W4A4, schedule)
    assert (student.momentum, student.weight_decay, student.lr) == (0.9, 1e-4, 1e-4)


def test_a_short_run_on_resnet20(teacher):
    spans = {"iterations": 4, "observe_iterations": 2, "train_from": 2, "generator_iterations": 4}
    schedule = GeneratorSchedule(**spans, batch=4, decay="cosine")
    students = {str(bits): make_student(teacher, bits, schedule) for bits in (BitWidths(3, 3), BitWidths(4, 8))}
    history = finetune(make_stream(teacher, schedule), students, schedule)
    assert len(history.generator) == 4
    assert {name: len(losses) for name, losses in history.students.items()} == {"W3A3": 2, "W4A8": 2}


def test_a_student_that_never_observes_is_refused_before_any_work():
    with pytest.raises(UserError, match="observe_iterations=0 is out of range"):
        GeneratorSchedule(iterations=3, observe_iterations=0, train_from=1)


def test_the_stream_follows_its_seed_alone(teacher):
    schedule = GeneratorSchedule(batch=2)
    torch.manual_seed(1)
    first = make_stream(teacher, schedule, seed=3).next_batch()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = make_stream(teacher, schedule, seed=3).next_batch()
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.images, make_stream(teacher, schedule, seed=4).next_batch().images)


def test_loss_options_vary_one_student(teacher):
    schedule = GeneratorSchedule(batch=2)
    batch = make_stream(teacher, schedule).next_batch()
    student = make_student(teacher, W4A4, schedule)
    with observing(student.network), torch.no_grad():
        student.network(batch.images)
    quirk = make_student(teacher, W4A4, schedule, mean_over_classes=True)
    only_ce = make_student(teacher, W4A4, schedule, kl_weight=0.0)
    with torch.no_grad():
        ce, both, less = (each.loss(student.network, batch) for each in (only_ce, student, quirk))
    torch.testing.assert_close(less, ce + (both - ce) / 10, rtol=1e-3, atol=1e-5)


def test_large_images_get_the_conditional_generator(teacher):
    assert make_stream(teacher, GeneratorSchedule()).generator.embedding
    network = get_model("resnet20_cifar10")
    network.features.final_pool = nn.AdaptiveAvgPool2d(1)
    large = Teacher.from_module(network, 10, (0.5,) * 3, (0.25,) * 3, input_size=64)
    stream = make_stream(large, GeneratorSchedule(batch=2))
    assert stream.generator.embedding is None
    assert stream.generator(torch.randn(2, 100), torch.tensor([0, 9])).shape == (2, 3, 64, 64)


def test_labelled_images_come_from_the_same_noise(teacher):
    generator = make_stream(teacher, GeneratorSchedule(batch=2)).generator
    labels = torch.arange(10).repeat(2)
    images = labelled_images(generator, labels)
    assert torch.equal(images, labelled_images(generator, labels)) and not images.requires_grad
    gaps = layer_gaps(teacher.network, images)
    assert len(gaps) == 21 and min(gaps) >= 0
