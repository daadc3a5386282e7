"""Every ImageNet model of the published tables goes the whole way: images, generator, quantized copy, fine-tuning.

With random weights, two images and a handful of steps: what is tested is that nothing about the architectures or their
input sizes is in the way, not accuracy.
"""

import math

import pytest
import torch

from dfqlib import gdfq, published, zeroq
from dfqlib.finetune import finetune
from dfqlib.models import MODELS, Teacher, build

IMAGENET = published.models_of("imagenet")
SCHEDULE = gdfq.Schedule(iterations=3, observe_iterations=1, train_from=1, generator_iterations=2, batch=2)


def random_teacher(name: str) -> Teacher:
    torch.manual_seed(0)
    entry = MODELS[name]
    return Teacher.from_module(build(name), 1000, entry.mean, entry.std, input_size=entry.input_size)


def test_the_tables_have_the_models_they_should():
    assert set(IMAGENET) >= {"resnet18", "resnet50", "inceptionv3", "mobilenetv2_w1", "shufflenet_g1_w1", "sqnxt23_w2"}


@pytest.mark.parametrize("name", IMAGENET)
def test_post_training_and_fine_tuning_run(name):
    teacher = random_teacher(name)
    size = teacher.entry.input_size
    images, losses = zeroq.distill(teacher, batch=2, iterations=2)
    assert images.shape == (2, 3, size, size) and all(map(math.isfinite, losses))
    student = zeroq.calibrated(teacher.network, 8, 8, images)
    with torch.no_grad():
        assert student(images).shape == (2, 1000)

    stream = gdfq.make_stream(teacher, SCHEDULE)
    tuned = gdfq.make_student(teacher, "w4a4", SCHEDULE)
    before = [p.detach().clone() for p in tuned.network.parameters()]
    history = finetune(stream, {"w4a4": tuned}, SCHEDULE.iterations, SCHEDULE.observe_iterations)
    assert all(map(math.isfinite, history.generator + history.students["w4a4"]))
    assert any(not torch.equal(old, new) for old, new in zip(before, tuned.network.parameters(), strict=True))
    assert stream.next_batch().images.shape == (2, 3, size, size)
