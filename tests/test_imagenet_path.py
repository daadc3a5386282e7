"""Every ImageNet model of the published tables goes the whole way: images, generator, quantized copy, fine-tuning.

With random weights, two images and a handful of steps: what is tested is that nothing about the architectures or their
input sizes is in the way, and that a run which stops goes on, not accuracy.
"""

import math
import shutil
from functools import partial

import pytest
import torch

from dfqlib.bits import BitWidths
from dfqlib.checkpoint import load_checkpoint
from dfqlib.finetuning.loop import Checkpoint, finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import ImageStream
from dfqlib.generators.networks import Generator
from dfqlib.methods import dsg, gdfq, hast, saft, zeroq
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import MODELS, build
from dfqlib.papers import published
from dfqlib.quantizers import calibrate
from dfqlib.schedules import ImageSchedule

IMAGENET = published.models_of("imagenet")
SCHEDULE = gdfq.Schedule(iterations=2, observe_iterations=1, train_from=1, generator_iterations=1, batch=2)


@pytest.fixture(scope="module", params=IMAGENET)
def teacher(request) -> Teacher:
    """The architecture with random weights."""
    torch.manual_seed(0)
    entry = MODELS[request.param]
    return Teacher.from_module(build(entry.name), 1000, entry.mean, entry.std, input_size=entry.input_size)


def test_the_tables_have_the_models_they_should():
    assert set(IMAGENET) >= {"resnet18", "resnet50", "inceptionv3", "mobilenetv2_w1", "shufflenet_g1_w1", "sqnxt23_w2"}


def test_post_training_quantization_runs(teacher):
    size = teacher.entry.input_size
    made = zeroq.distil_images(teacher, ImageSchedule(images=2, synthesis_iterations=1))
    images = made.images
    assert images.shape == (2, 3, size, size) and all(map(math.isfinite, made.losses[0]))
    with torch.no_grad():
        assert calibrate.calibrated(teacher.network, BitWidths(8, 8), images)(images).shape == (2, 1000)
    diverse, labels, losses = dsg.synthesise_diverse(teacher, dsg.noise_gaps(teacher, 2), batch=2, iterations=1)
    assert diverse.shape == images.shape and labels.max() < 1000 and all(map(math.isfinite, losses))


def test_fine_tuning_on_a_generator_runs_and_goes_on_after_a_stop(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(gdfq, "Generator", partial(Generator, latent=8))  # or files of a gigabyte are written
    checkpoint, stopped = (Checkpoint(tmp_path / name, seconds=0) for name in ("run.ckpt", "stopped.ckpt"))

    def keep_the_first(history):
        if len(history.students["w4a4"]) == 1:  # what a run that is stopped now leaves behind
            shutil.copy(checkpoint.path, stopped.path)

    def tune(checkpoint, on_evaluation=None):
        stream, student = gdfq.make_stream(teacher, SCHEDULE), gdfq.make_student(teacher, "w4a4", SCHEDULE)
        before = [p.clone() for p in student.network.parameters()]
        spans = {"iterations": SCHEDULE.iterations, "observe_iterations": SCHEDULE.observe_iterations}
        watch = {"evaluate_every": 1, "on_evaluation": on_evaluation}
        history = finetune(stream, {"w4a4": student}, **spans, **watch, checkpoint=checkpoint)
        return history, before, list(student.network.parameters()), stream

    history, before, tuned, stream = tune(checkpoint, keep_the_first)
    size = teacher.entry.input_size
    assert stream.next_batch().images.shape == (2, 3, size, size)
    assert all(map(math.isfinite, history.generator + history.students["w4a4"]))
    assert any(not torch.equal(old, new) for old, new in zip(before, tuned, strict=True))

    assert load_checkpoint(stopped.path, {})["drawn"] == 1
    again, _, continued, _ = tune(stopped)
    assert again == history
    assert all(torch.equal(one, other) for one, other in zip(tuned, continued, strict=True))


def test_alignment_with_hard_images_runs(teacher):
    made = hast.hard_images(teacher, 2, beta=0.1, gamma=1.0, batch=2, iterations=1)
    viewer = NetworkProbe(teacher.network)
    with torch.no_grad():
        residual = len(viewer(made.images).attentions) > 0
    terms = (
        saft.LossWeights() if residual else saft.LossWeights(attention_weight=0.0)
    )  # Inception has no units to align
    student = saft.make_student(teacher, viewer, "w6a6", terms)
    seen = saft.WithTeacherView(ImageStream(teacher.network, made.images, made.labels, batch=2), viewer)
    history = finetune(seen, {"w6a6": student}, iterations=2, observe_iterations=1)
    losses = [*made.losses[0], *history.students["w6a6"]]
    assert made.images.shape[0] == 2 and len(history.students["w6a6"]) == 1 and all(map(math.isfinite, losses))
