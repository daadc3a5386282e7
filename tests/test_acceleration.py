"""Each acceleration can be turned off by its name, and nothing but the time changes."""

import pytest
import torch

from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.methods import hast, zeroq
from dfqlib.methods.gdfq import Schedule, make_stream, make_student
from dfqlib.models.teacher import load_teacher
from dfqlib.schedules import ImageSchedule
from dfqlib.speed.switches import ACCELERATIONS, OFF_VARIABLE, off_from_start, uses, without

SCHEDULE = Schedule(iterations=3, observe_iterations=1, train_from=1, generator_iterations=3, batch=8, student_lr=1e-3)


def gdfq_run() -> list[torch.Tensor]:
    """The images, and the weights of the student, after three iterations."""
    teacher = load_teacher("resnet20_cifar10")
    stream, student = make_stream(teacher, SCHEDULE), make_student(teacher, "w8a8", SCHEDULE)
    history = finetune(stream, {"w8a8": student}, SCHEDULE.iterations, 1)
    return [stream.next_batch().images, torch.tensor(history.generator), torch.tensor(history.students["w8a8"])]


def zeroq_run() -> list[torch.Tensor]:
    made = zeroq.distil_images(load_teacher("resnet20_cifar10"), ImageSchedule(images=4, synthesis_iterations=3))
    return [made.images, torch.tensor(made.losses)]


def hast_run() -> list[torch.Tensor]:
    made = hast.hard_images(load_teacher("resnet20_cifar10"), count=4, batch=4, iterations=3)
    return [made.images, torch.tensor(made.losses)]


@pytest.mark.parametrize("run", [gdfq_run, zeroq_run, hast_run])
def test_nothing_changes_without_any_of_them(run):
    expected = run()
    for name in ACCELERATIONS:
        with without(name):
            found = run()
        for ours, theirs in zip(found, expected, strict=True):
            # Adam divides by the gradient's own size: rounding shows in pixels whose gradient is nearly 0.
            off = (ours - theirs).abs() > 0.02 * theirs.abs().max()
            assert off.float().mean() < 0.002, name


def test_off_only_inside_and_also_when_nested():
    with without("channels_last"), pytest.raises(KeyError), without("channels_last", "fused_rounding"):
        assert not uses("channels_last") and not uses("fused_rounding") and uses("folded_upsampling")
        raise KeyError
    assert all(uses(name) for name in ACCELERATIONS)
    with without("fused_rounding"):
        with without("fused_rounding"):
            pass
        assert not uses("fused_rounding")


@pytest.fixture
def environment(monkeypatch):
    """Sets the variable as if the process had been started with it."""

    def start_with(value: str) -> None:
        monkeypatch.setenv(OFF_VARIABLE, value)
        off_from_start.cache_clear()

    yield start_with
    monkeypatch.undo()
    off_from_start.cache_clear()


def test_a_process_can_be_started_without_some(environment):
    environment("fused_rounding, folded_batch_norms")
    assert not uses("fused_rounding") and not uses("folded_batch_norms") and uses("channels_last")


def test_unknown_names_are_refused(environment):
    with pytest.raises(UserError, match="acceleration='fold' is unknown"), without("fold"):
        pass
    environment("fusing")
    with pytest.raises(UserError, match="DFQ_WITHOUT='fusing' is unknown"):
        uses("fused_rounding")
