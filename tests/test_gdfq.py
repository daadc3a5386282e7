"""GDFQ's pieces as a user puts them together."""

import pytest
import torch
from pytorchcv.model_provider import get_model

from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.methods.gdfq import Schedule, labelled_images, layer_gaps, make_stream, make_student
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.layers import observing


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return Teacher.from_module(get_model("resnet20_cifar10"), 10, (0.5,) * 3, (0.25,) * 3)


def test_the_papers_schedule_is_the_default():
    schedule = Schedule()
    assert (schedule.iterations, schedule.observe_iterations, schedule.batch) == (400 * 200, 4 * 200, 200)
    assert (schedule.generator_lr, schedule.student_lr, schedule.temperature) == (1e-3, 1e-4, 20)
    assert not schedule.kl_mean_over_classes


def test_optimizers_are_the_published_ones(teacher):
    stream = make_stream(teacher, Schedule())
    assert stream.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    student = make_student(teacher, "w4a4", Schedule())
    assert (student.momentum, student.weight_decay, student.lr) == (0.9, 1e-4, 1e-4)


def test_a_short_run_on_resnet20(teacher):
    schedule = Schedule(
        iterations=4, observe_iterations=2, train_from=2, generator_iterations=4, batch=4, student_decay="cosine"
    )
    stream = make_stream(teacher, schedule)
    students = {bits: make_student(teacher, bits, schedule) for bits in ("w3a3", "w4a8")}
    history = finetune(stream, students, schedule.iterations, schedule.observe_iterations, schedule.train_from)
    assert len(history.generator) == 4
    assert {name: len(losses) for name, losses in history.students.items()} == {"w3a3": 2, "w4a8": 2}


def test_the_stream_follows_its_seed_alone(teacher):
    schedule = Schedule(batch=2)
    torch.manual_seed(1)
    first = make_stream(teacher, schedule, seed=3).next_batch()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = make_stream(teacher, schedule, seed=3).next_batch()
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.images, make_stream(teacher, schedule, seed=4).next_batch().images)


def test_loss_options_vary_one_student(teacher):
    schedule = Schedule(batch=2)
    batch = make_stream(teacher, schedule).next_batch()
    student = make_student(teacher, "w4a4", schedule)
    with observing(student.network), torch.no_grad():
        student.network(batch.images)
    quirk = make_student(teacher, "w4a4", schedule, mean_over_classes=True)
    only_ce = make_student(teacher, "w4a4", schedule, kl_weight=0.0)
    with torch.no_grad():
        ce = only_ce.loss(student.network, batch)
        kl = student.loss(student.network, batch) - ce
        torch.testing.assert_close(quirk.loss(student.network, batch), ce + kl / 10, rtol=1e-3, atol=1e-5)


def test_large_images_get_the_conditional_generator():
    network = get_model("resnet20_cifar10")
    assert make_stream(Teacher.from_module(network, 10, (0.5,) * 3, (0.25,) * 3), Schedule()).generator.embedding
    large = Teacher.from_module(network, 10, (0.5,) * 3, (0.25,) * 3, input_size=64)
    stream = make_stream(large, Schedule(batch=2))
    assert stream.generator.embedding is None
    assert stream.generator(torch.randn(2, 100), torch.tensor([0, 9])).shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 1},
        {"student_lr": 0},
        {"kl_weight": -1},
        {"student_decay": "linear"},
        {"generator_lr": "fast"},
        {"observe_iterations": 900},
        {"train_from": 80_000},
    ],
)
def test_wrong_numbers_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Schedule(**wrong)


def test_labelled_images_come_from_the_same_noise(teacher):
    generator = make_stream(teacher, Schedule(batch=2)).generator
    labels = torch.arange(10).repeat(2)
    images = labelled_images(generator, labels)
    assert torch.equal(images, labelled_images(generator, labels)) and not images.requires_grad
    gaps = layer_gaps(teacher.network, images)
    assert len(gaps) == 21 and min(gaps) >= 0
