"""bfloat16 in convolutions and large products leaves labels and accuracy as they are in float32."""

import pytest
import torch

from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import balanced_subset, embedded_test, few_shot
from dfqlib.finetuning.grad_cam import map_correlation
from dfqlib.finetuning.loop import finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import ImageStream, generated_pool
from dfqlib.methods import gdfq
from dfqlib.models.evaluate import top1
from dfqlib.models.teacher import load_teacher
from dfqlib.notebook.start import start
from dfqlib.papers.profiles import describe_schedule
from dfqlib.runner.plan import Selection, plan
from dfqlib.schedules import SALIENCY_LAYERS, GeneratorSchedule
from dfqlib.speed import precision


@pytest.fixture
def teacher():
    yield load_teacher("resnet20_cifar10")
    precision.use("float32")


def both(measure):
    """What ``measure`` gives in float32 and in bfloat16."""
    return [measure() for name in ("float32", "bfloat16") if precision.use(name)]


def test_a_generator_learns_its_labels(teacher):
    """torch's autocast around such a loop trains on copies of the first weights: 10 %, as by chance."""
    schedule = GeneratorSchedule(
        iterations=60,
        observe_iterations=1,
        train_from=1,
        generator_iterations=60,
        batch=16,
        decay="cosine",
        generator_lr=1e-2,
    )

    def agreed() -> float:
        stream = gdfq.make_stream(teacher, schedule, conditional=True)
        for _ in range(schedule.iterations):
            stream.next_batch()
        pool = generated_pool(stream, 256)
        assert pool.images.dtype == torch.float32
        return 100 * (teacher.network(pool.images).argmax(1) == pool.labels).float().mean().item()

    found = both(agreed)
    assert min(found) > 18 and found[1] == pytest.approx(found[0], abs=8)


def test_a_student_is_as_good(teacher):
    few, test = few_shot("cifar10"), balanced_subset(embedded_test("cifar10"), 40, "40 per class")
    schedule = GeneratorSchedule(iterations=14, observe_iterations=2, train_from=2, batch=32, student_lr=5e-6)

    def accuracy() -> float:
        student = gdfq.make_student(teacher, BitWidths(4, 4), schedule)
        images = ImageStream(teacher.folded, teacher.normalise(few.pixels), few.labels, schedule.batch)
        finetune(images, {"W4A4": student}, schedule)
        precision.use("float32")
        return top1(student.network, test, teacher)

    found = both(accuracy)
    assert min(found) > 80 and found[1] == pytest.approx(found[0], abs=2)


@pytest.mark.parametrize("layer", SALIENCY_LAYERS)
def test_a_probe_sees_the_same(teacher, layer):
    """Attentions and maps, which are gradients by a convolution's output where there is no closed form."""
    images, probe = teacher.normalise(few_shot("cifar10").pixels[:8]), NetworkProbe(teacher.network, layer)
    exact, found = both(lambda: probe(images, saliency=True).detach())
    assert {each.dtype for each in (found.logits, found.saliency, *found.attentions, *found.outputs)} == {torch.float32}
    torch.testing.assert_close(found.attentions[-1], exact.attentions[-1], rtol=0.1, atol=0.01)
    assert map_correlation(found.saliency, exact.saliency).min() > 0.95


def test_auto_is_what_the_hardware_is_good_at_and_part_of_a_run(capsys):
    here = precision.resolve("auto", "cpu")
    assert here in ("float32", "bfloat16") and precision.resolve("bfloat16") == "bfloat16"
    runs = {name: plan(Selection("fast", papers=["gdfq"], settings=settings))[0] for name, settings in {
        "auto": {"device": "cpu"}, "float32": {"device": "cpu", "precision": "float32"},
        "bfloat16": {"device": "cpu", "precision": "bfloat16"}}.items()}  # fmt: skip
    assert runs["auto"].identity == runs[here].identity and runs["float32"].identity != runs["bfloat16"].identity
    assert plan(Selection("quick", papers=["gdfq"]))[0].parameters["precision"] == "float32"
    started = start("zeroq", {"precision": "auto", "device": "cpu", "per_class": 1})
    assert started.run.parameters["precision"] == precision.used() == here
    precision.use("float32")


def test_tables_say_so():
    published = {"iterations": 80_000, "dataset": "cifar10"}
    assert describe_schedule("gdfq", published | {"precision": "float32"}) == "as published"
    assert describe_schedule("gdfq", published | {"precision": "bfloat16"}) == "as published, in bfloat16"
    told = describe_schedule("gdfq", published | {"iterations": 800, "precision": "bfloat16"})
    assert told == "reduced, in bfloat16: iterations 800 (published 80000)"
