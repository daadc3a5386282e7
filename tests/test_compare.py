"""The cross table's two halves: pools of images from every source, students of any pool by every use."""

import copy
import functools
from dataclasses import replace

import pandas as pd
import pytest
import torch

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import Checkpoint
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.methods import dsg
from dfqlib.methods.compare import make_pool, make_students, variance_shares
from dfqlib.models.teacher import load_teacher
from dfqlib.schedules import CALIBRATIONS, SOURCES, USES, Budget

BUDGET = Budget(images=6, synthesis_iterations=1, batch=4, tuning_iterations=3)
BITS = [BitWidths(4, 4), BitWidths(3, 3)]


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("resnet20_cifar10")


@pytest.fixture(scope="module", autouse=True)
def little_noise():
    """DSG's margins from 8 images of noise in place of 1,024, which would take longer than everything else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsg, "noise_gaps", functools.partial(dsg.noise_gaps, count=8))
        yield


@pytest.fixture(scope="module")
def pool(teacher):
    """Called with a source: its pool, made when it is first asked for."""
    return functools.cache(lambda source: make_pool(source, teacher, BUDGET, seed=1)[0])


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_keeps_to_the_budget_and_follows_its_seed(source, teacher, pool):
    made = pool(source)
    assert made.images.shape == (6, 3, 32, 32) and made.images.isfinite().all() and not made.images.requires_grad
    (again, seconds), (other, _) = (make_pool(source, teacher, BUDGET, seed=seed) for seed in (1, 2))
    assert torch.equal(made.images, again.images) and torch.equal(made.labels, again.labels)
    assert len(made.labels) == 6 and seconds > 0 and not torch.equal(made.images, other.images)


def test_real_images_come_with_their_own_labels(teacher, pool):
    for source in ("few-shot", "real"):
        with torch.no_grad():
            assert (teacher.network(pool(source).images).argmax(1) == pool(source).labels).sum() >= 5
    few, _ = make_pool("few-shot", teacher, replace(BUDGET, images=50))
    assert sorted(few.labels.tolist()) == list(range(10))
    real, _ = make_pool("real", teacher, replace(BUDGET, images=500))
    assert real.labels.bincount().tolist() == 10 * [10]


def test_images_without_labels_get_the_teachers(teacher, pool):
    for source in ("noise", "zeroq"):
        with torch.no_grad():
            assert torch.equal(pool(source).labels, teacher.network(pool(source).images).argmax(1))


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("use", USES)
def test_every_use_makes_a_student_of_every_width_and_only_fine_tuning_changes_weights(use, calibration, teacher, pool):
    before = copy.deepcopy(teacher.network.state_dict())
    students, seconds = make_students(use, teacher, pool("gdfq"), BITS, BUDGET, calibration=calibration)
    assert list(students) == ["W4A4", "W3A3"] and seconds > 0
    with torch.no_grad():
        logits = [student(pool("real").images) for student in students.values()]
    assert all(each.isfinite().all() for each in logits) and not torch.equal(*logits)
    for name, value in teacher.network.state_dict().items():
        assert torch.equal(before[name], value)
    name = "features.init_block.conv.weight"
    for student in students.values():
        assert torch.equal(student.get_parameter(name), teacher.network.get_parameter(name)) == (use == "ranges")
        mean = "features.init_block.bn.running_mean"
        moved = not torch.equal(student.get_buffer(mean), teacher.network.get_buffer(mean))
        assert moved == (calibration == "corrected")


def test_what_is_finished_is_not_made_again(teacher, pool, tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path / "pool.ckpt"), Checkpoint(tmp_path / "students.ckpt")

    def make():
        made, spent = make_pool("gdfq", teacher, BUDGET, 1, kept[0])
        students, tuning = make_students("gdfq", teacher, made, BITS[:1], BUDGET, checkpoint=kept[1])
        return made, students["W4A4"].state_dict(), (spent, tuning)

    first, weights, seconds = make()
    assert torch.equal(first.images, pool("gdfq").images)
    monkeypatch.setattr("dfqlib.finetuning.streams.GeneratorStream.next_batch", None)  # nobody may ask for it again
    monkeypatch.setattr("dfqlib.finetuning.streams.ImageStream.next_batch", None)
    again, same_weights, same_seconds = make()
    assert torch.equal(again.images, first.images) and again.images.stride() == first.images.stride()
    assert torch.equal(again.labels, first.labels) and same_seconds == seconds
    assert all(torch.equal(weights[name], value) for name, value in same_weights.items())
    with pytest.raises(UserError, match="seed=2"):
        make_pool("gdfq", teacher, BUDGET, 2, kept[0])


def test_mixed_classes_are_used_by_every_tuning(teacher, pool):
    soft = torch.nn.functional.one_hot(pool("gdfq").labels, 10).float().mul(0.8).add(0.02)
    mixed = SyntheticImages(pool("gdfq").images, soft)
    for use in ("gdfq", "saft"):
        assert make_students(use, teacher, mixed, BITS[:1], BUDGET)


def test_unknown_names_are_refused(teacher, pool):
    with pytest.raises(UserError, match="source='zero'"):
        make_pool("zero", teacher, BUDGET)
    with pytest.raises(UserError, match="use='tune'"):
        make_students("tune", teacher, pool("real"), BITS, BUDGET)
    with pytest.raises(UserError, match="calibration='none'"):
        make_students("ranges", teacher, pool("real"), BITS, BUDGET, calibration="none")


def test_shares_of_the_variance_by_hand():
    def shares(*values):
        return variance_shares(pd.DataFrame(values).rename_axis("source").rename_axis("use", axis=1).stack())

    assert shares([1.0, 3.0], [5.0, 7.0]) == {"source": 80.0, "use": 20.0, "interactions": 0.0}  # variances 4 and 1
    assert shares([1.0, 0.0], [0.0, 1.0]) == {"source": 0.0, "use": 0.0, "interactions": 100.0}
    assert shares([2.0, 2.0]) == {"source": 0.0, "use": 0.0, "interactions": 0.0}
