"""GDFQ (Xu et al., ECCV 2020): a generator learns images from the teacher; the student is fine-tuned on them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.device import channels_last
from dfqlib.finetuning.loop import Student, distillation_loss
from dfqlib.finetuning.streams import GeneratorStream
from dfqlib.generators.networks import Generator, draw_one_label
from dfqlib.losses import bns_loss, generator_loss, student_loss
from dfqlib.models.batch_norm_statistics import BatchNormInputs
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.convert import quantize_model
from dfqlib.schedules import GeneratorSchedule

LARGE = 32  # pixels; above this size the generator is conditional, as published for 224


def make_stream(
    teacher: Teacher,
    schedule: GeneratorSchedule,
    loss: Callable[..., Tensor] | None = None,
    seed: int = 0,
    build: Callable[[], nn.Module] | None = None,
    draw: Callable[..., tuple[tuple[Tensor, ...], Tensor]] = draw_one_label,
    image_loss: Callable[[Tensor], Tensor] | None = None,
    conditional: bool = False,
    student: nn.Module | None = None,
) -> GeneratorStream:
    """Images of a new generator for the teacher's classes and input size, which trains as they are drawn.

    ``loss`` replaces L_G; ``image_loss``, a function of the images, is added to it. ``build`` makes another generator,
    whose input ``draw`` draws; ``conditional`` gives GDFQ's the labels by its batch norms at every size. ``student`` is
    for a ``loss`` that looks at one. ``seed`` alone decides the initial weights and the noise.
    """
    shape = teacher.entry.image_shape
    conditional = conditional or max(shape[1:]) > LARGE
    build = build or partial(Generator, teacher.entry.classes, shape=shape, conditional=conditional)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = build()
    generator = channels_last(generator.to(teacher.device))
    spans = schedule.generator_iterations, schedule.batch, schedule.generator_lr, schedule.decay
    loss = loss or partial(generator_loss, bns_weight=schedule.bns_weight)
    options = {"loss": loss, "draw": draw, "seed": seed, "image_loss": image_loss, "student": student}
    return GeneratorStream(teacher.folded, generator, *spans, **options)


def make_student(
    teacher: Teacher,
    bits: BitWidths,
    schedule: GeneratorSchedule,
    network: nn.Module | None = None,
    **loss_options: float | bool,
) -> Student:
    """A quantized copy of the teacher with GDFQ's observers, optimizer and loss; ``loss_options`` change its loss.

    ``network``, a quantized copy that is calibrated already, takes the place of the new one.
    """
    options = {name: getattr(schedule, name) for name in ("ce_weight", "kl_weight", "temperature")}
    options |= {"mean_over_classes": schedule.kl_mean_over_classes} | loss_options
    network, loss = network or quantize_model(teacher.network, bits), partial(student_loss, **options)
    return Student(network, schedule.student_lr, schedule.decay, loss=partial(distillation_loss, loss=loss))


@torch.no_grad()
def labelled_images(generator: Generator, labels: Tensor, seed: int = 0) -> Tensor:
    """Images (N, C, H, W) of ``labels`` (N,); the noise depends on ``seed`` alone.

    Batch norms use this batch's statistics, as in training: only dozens of labels give images as students see them.
    """
    device = next(generator.parameters()).device
    z = torch.randn(len(labels), generator.latent, generator=torch.Generator().manual_seed(seed))
    return generator(z.to(device), labels.to(device))


@torch.no_grad()
def layer_gaps(network: nn.Module, images: Tensor) -> list[float]:
    """The terms of L_BNS for ``images`` (B, C, H, W): one per batch norm, in execution order; their mean is L_BNS."""
    with BatchNormInputs(network) as norms:
        network(images)
        return [bns_loss([layer]).item() for layer in norms.layers]
