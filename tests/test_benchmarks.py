"""The published steps that the kit's cost is measured against compute what the kit computes."""

import math

import pytest
import torch

from benchmarks.cases import CASES, make_case
from benchmarks.imagenet import split
from benchmarks.measure import PATIENCE, ROUND, Alternating, alternate
from dfqlib.data.image_sets import ImageSet
from dfqlib.models.teacher import load_teacher

ITERATIONS = 2  # in the first one students observe, in the second one they learn


@pytest.fixture
def teacher():
    """In double precision: in single precision a student of few bits turns rounding errors into other levels."""
    torch.set_default_dtype(torch.float64)
    teacher = load_teacher("resnet20_cifar10")
    teacher.network.double()
    yield teacher
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_published_step_computes_the_same(teacher, name):
    case = make_case(name, teacher, batch=2)
    ticks = []
    ours, theirs = case.ours(ITERATIONS, lambda: ticks.append(1)), case.published()
    losses = [theirs.step() for _ in range(ITERATIONS)]
    assert len(ticks) == ITERATIONS
    for found, expected in zip(ours.losses, losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)
    for found, expected in zip(ours.trained, theirs.trained, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8, check_stride=False)


@pytest.mark.parametrize(
    ("products", "own", "switches", "median"),
    [
        ([1, 1, 1, 1], 1, 0, 2.5),
        ([1, 1, 1, 2], 1, 0, 2),
        ([1, 1, 2, 1], 1, 0, math.nan),
        ([1, 1, 1, 1], 1, 70, 2.5),
        ([1, 1, 1, 1], 1, 300, math.nan),
        ([1, 1, 1, 1], 0.8, 0, math.nan),
    ],
)
def test_rounds_of_a_busy_machine_do_not_count_and_some_must(products, own, switches, median):
    times = Alternating(torch.device("cpu"), 2)
    times.rounds = [[[1.0, 3.0]], [[2.0, 2.0]], [[9.0, 9.0]]]
    times.products, times.marks = products, [(second, second * own, second * switches) for second in range(4)]
    assert times.medians() == [pytest.approx(median, nan_ok=True)]


def test_a_loop_ends_once_enough_rounds_count_and_others_run_in_float32():
    formats, ticks = [], []

    def loop(iterations, tick):
        for _ in range(iterations):
            ticks.append(1)
            with torch.autocast("cpu", torch.bfloat16):
                tick()

    alternate(loop, torch.device("cpu"), 1, lambda: formats.append((torch.eye(2) @ torch.eye(2)).dtype))
    assert set(formats) == {torch.float32}
    assert len(ticks) % ROUND in (0, 1) and ROUND < len(ticks) <= ROUND * PATIENCE


@pytest.mark.parametrize(("count", "chosen"), [(3, [0, 3, 6]), (4, [0, 2, 4, 6]), (10, list(range(10)))])
def test_images_to_calibrate_on_are_of_all_classes_and_not_scored(count, chosen):
    images = ImageSet("ten", torch.zeros(10, 3, 1, 1, dtype=torch.uint8), torch.arange(10), tuple("abcdefghij"), "here")
    few, others = split(images, count)
    assert few.labels.tolist() == chosen
    assert sorted(few.labels.tolist() + others.labels.tolist()) == list(range(10))
