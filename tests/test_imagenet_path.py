"""Every ImageNet model of the published tables goes the whole way: images, generator, quantized copy, fine-tuning.

With random weights, two images and a handful of steps: this tests that architectures and input sizes are supported and
that a stopped run continues, not accuracy.
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
from dfqlib.schedules import AlignmentWeights, DiverseImageSchedule, GeneratorSchedule, HardImageSchedule, ImageSchedule

IMAGENET = published.models_of("imagenet")
SPANS = {"iterations": 2, "observe_iterations": 1, "train_from": 1, "generator_iterations": 1}
SCHEDULE = GeneratorSchedule(**SPANS, batch=2)


@pytest.fixture(scope="module", params=IMAGENET)
def teacher(request) -> Teacher:
    """The architecture with random weights."""
    torch.manual_seed(0)
    entry = MODELS[request.param]
    return Teacher.from_module(build(entry.name), 1000, entry.mean, entry.std, input_size=entry.input_size)


def test_post_training_quantization_runs(teacher):
    size = teacher.entry.input_size
    made = zeroq.distil_images(teacher, ImageSchedule(images=2, synthesis_iterations=1))
    images = made.images
    assert images.shape == (2, 3, size, size) and all(map(math.isfinite, made.losses[0]))
    with torch.no_grad():
        assert calibrate.calibrated(teacher.network, BitWidths(8, 8), images)(images).shape == (2, 1000)
    schedule = DiverseImageSchedule(images=2, synthesis_iterations=1)
    diverse = dsg.synthesise_diverse(teacher, dsg.noise_gaps(teacher, 2), schedule)
    assert diverse.images.shape == images.shape and diverse.labels.max() < 1000
    assert all(map(math.isfinite, diverse.losses[0]))


def test_fine_tuning_on_a_generator_runs_and_goes_on_after_a_stop(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(gdfq, "Generator", partial(Generator, latent=8))  # or files of a gigabyte are written
    checkpoint, stopped = (Checkpoint(tmp_path / name, seconds=0) for name in ("run.ckpt", "stopped.ckpt"))

    def keep_the_first(history):
        if len(history.students["W4A4"]) == 1:  # what a run that is stopped now leaves behind
            shutil.copy(checkpoint.path, stopped.path)

    def tune(checkpoint, on_evaluation=None):
        stream, student = gdfq.make_stream(teacher, SCHEDULE), gdfq.make_student(teacher, BitWidths(4, 4), SCHEDULE)
        before = [p.clone() for p in student.network.parameters()]
        watch = {"evaluate_every": 1, "on_evaluation": on_evaluation, "checkpoint": checkpoint}
        history = finetune(stream, {"W4A4": student}, SCHEDULE, **watch)
        return history, before, list(student.network.parameters()), stream

    history, before, tuned, stream = tune(checkpoint, keep_the_first)
    size = teacher.entry.input_size
    assert stream.next_batch().images.shape == (2, 3, size, size)
    assert all(map(math.isfinite, history.generator + history.students["W4A4"]))
    assert any(not torch.equal(old, new) for old, new in zip(before, tuned, strict=True))

    assert load_checkpoint(stopped.path, {})["drawn"] == 1
    again, _, continued, _ = tune(stopped)
    assert again == history
    assert all(torch.equal(one, other) for one, other in zip(tuned, continued, strict=True))


def test_alignment_with_hard_images_runs(teacher):
    schedule = HardImageSchedule(images=2, synthesis_batch=2, synthesis_iterations=1)
    made = hast.hard_images(teacher, schedule, beta=0.1, gamma=1.0)
    probe = NetworkProbe(teacher.network)
    weights = AlignmentWeights() if probe.units else AlignmentWeights(attention_weight=0.0)  # Inception has no units
    student = saft.make_student(teacher, probe, BitWidths(6, 6), weights)
    stream = saft.WithTeacherView(ImageStream(teacher.network, made.images, made.labels, batch=2), probe)
    history = finetune(stream, {"W6A6": student}, SCHEDULE)
    assert len(made.images) == 2 and len(history.students["W6A6"]) == 1
    assert all(map(math.isfinite, [*made.losses[0], *history.students["W6A6"]]))
