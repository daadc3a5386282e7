"""Each acceleration can be turned off by its name, and only the time changes."""

from functools import partial

import pytest
import torch

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import finetune
from dfqlib.methods import hast, zeroq
from dfqlib.methods.gdfq import make_stream, make_student
from dfqlib.models.teacher import load_teacher
from dfqlib.schedules import GeneratorSchedule, HardImageSchedule, ImageSchedule
from dfqlib.speed.switches import ACCELERATIONS, OFF_VARIABLE, off_from_start, uses, without

SPANS = {"iterations": 3, "observe_iterations": 1, "train_from": 1, "generator_iterations": 3}
SCHEDULE = GeneratorSchedule(**SPANS, batch=8, student_lr=1e-3)


def gdfq_run() -> list[torch.Tensor]:
    teacher = load_teacher("resnet20_cifar10")
    stream, student = make_stream(teacher, SCHEDULE), make_student(teacher, BitWidths(8, 8), SCHEDULE)
    history = finetune(stream, {"W8A8": student}, SCHEDULE)
    return [stream.next_batch().images, torch.tensor(history.generator), torch.tensor(history.students["W8A8"])]


def image_run(make, schedule) -> list[torch.Tensor]:
    made = make(load_teacher("resnet20_cifar10"), schedule)
    return [made.images, torch.tensor(made.losses)]


HARD = HardImageSchedule(images=4, synthesis_batch=4, synthesis_iterations=3)
RUNS = {
    "GDFQ": gdfq_run,
    "ZeroQ": partial(image_run, zeroq.distil_images, ImageSchedule(images=4, synthesis_iterations=3)),
    "HAST": partial(image_run, hast.hard_images, HARD),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_nothing_changes_without_any_of_them(run):
    expected = run()
    for name in ACCELERATIONS:
        with without(name):
            found = run()
        for ours, theirs in zip(found, expected, strict=True):
            # Adam divides by the gradient's own size, so rounding errors show in pixels whose gradient is nearly 0.
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


def test_a_process_can_be_started_without_some_and_unknown_names_are_refused(monkeypatch):
    def start_with(value: str) -> None:
        monkeypatch.setenv(OFF_VARIABLE, value)
        off_from_start.cache_clear()

    try:
        start_with("fused_rounding, folded_batch_norms")
        assert not uses("fused_rounding") and not uses("folded_batch_norms") and uses("channels_last")
        start_with("fusing")
        with pytest.raises(UserError, match="DFQ_WITHOUT='fusing' is unknown"):
            uses("fused_rounding")
    finally:
        off_from_start.cache_clear()
    with pytest.raises(UserError, match="acceleration='fold' is unknown"), without("fold"):
        pass
