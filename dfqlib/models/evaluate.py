"""Predictions and top-1 accuracy of a network on an image set."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dfqlib.data.image_sets import ImageSet, data_set_of, load_test
from dfqlib.device import channels_last
from dfqlib.errors import UserError
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import ModelEntry
from dfqlib.scores import Score
from dfqlib.speed import precision
from dfqlib.speed.low_bits import in_low_bits
from dfqlib.speed.scale_weights import scale_weights

Normalise = Teacher | Callable[[Tensor], Tensor]


def images_for(entry: ModelEntry, folder: str = "") -> ImageSet:
    """The labelled images in ``folder``, or else of the network's data set, as the network of ``entry`` takes them.

    They are cropped to its size if that is square, and grey for one channel; UserError for images of other shapes.
    """
    size = entry.input_size if isinstance(entry.input_size, int) else None
    known = folder and data_set_of(folder, entry.classes, size)
    images = load_test(known or entry.dataset, folder, size=size)
    images = replace(images, pixels=in_channels(images.pixels, entry))
    if images.pixels.shape[1:] != entry.image_shape:
        held, allowed = (" x ".join(map(str, shape)) for shape in (images.pixels.shape[1:], entry.image_shape))
        raise UserError(f"data={folder!r} holds images of {held}; allowed: {allowed}.")
    return images


def in_channels(pixels: Tensor, entry: ModelEntry) -> Tensor:
    """``pixels`` (N, 3, H, W) in grey, (N, 1, H, W), for a network of one channel."""
    return pixels.float().mean(1, keepdim=True).round().byte() if len(entry.mean) == 1 else pixels


def top1(network: nn.Module, image_set: ImageSet, normalise: Normalise, batch: int | None = None) -> Score:
    """Percentage of ``image_set`` that ``network`` classifies correctly; parameters are those of :func:`predict`."""
    return score(predict(network, image_set, normalise, batch), image_set)


def score(logits: Tensor, image_set: ImageSet) -> Score:
    """The score of ``logits`` (N, classes) for the labels of ``image_set``; UserError for other classes."""
    if logits.shape[1] != len(image_set.classes):
        held = f"the images of {image_set.name} have {len(image_set.classes)}"
        raise UserError(f"the network has {logits.shape[1]} classes but {held}.")
    labels = image_set.labels
    if not logits.isfinite().all():
        return Score([False] * len(labels), diverged="its logits are not finite")
    among = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).any(1)
    return Score((logits.argmax(1) == labels).numpy(), 100 * among.sum().item() / len(labels))


def same_class(logits: Tensor, others: Tensor) -> Score:
    """The share of images to which two networks give the same class, from the logits (N, classes) of both."""
    return Score((logits.argmax(1) == others.argmax(1)).cpu().numpy())


def expected_drop(teacher_logits: Tensor, logits: Tensor) -> tuple[float, float]:
    """The drop in points that is to be expected of a student by its teacher's probabilities p; and its standard error.

    Mean over images of p(the teacher's class) - p(the student's class): the drop of accuracy on these images if each
    has the label y with probability p(y). Logits (N, classes).
    """
    p = teacher_logits.softmax(1)
    lost = 100 * (p.amax(1) - p.gather(1, logits.argmax(1, keepdim=True)).squeeze(1))
    return lost.mean().item(), (lost.std() / len(lost) ** 0.5).item()


def predict(network: nn.Module, image_set: ImageSet, normalise: Normalise, batch: int | None = None) -> Tensor:
    """Logits (N, classes) on the CPU, computed in eval mode; the network's mode is restored afterwards.

    Under the precision bfloat16 the low bits of a student are computed as such; a float network stays in float32.

    ``normalise`` turns pixels into the network's input: a teacher, or a function. ``batch`` defaults to
    :func:`images_per_pass`.
    """
    prepare = normalise.normalise if isinstance(normalise, Teacher) else normalise
    device, training = next(network.parameters()).device, network.training
    batch = batch or images_per_pass(image_set.pixels.shape[-1])
    scaled = scale_weights(network.eval())
    if precision.used() == "bfloat16":
        scaled = in_low_bits(scaled)
    try:
        with torch.inference_mode():
            return torch.cat(
                [scaled(channels_last(prepare(x).to(device))) for x in image_set.pixels.split(batch)]
            ).cpu()
    finally:
        network.train(training)


def images_per_pass(size: int) -> int:
    """Batch size for images ``size`` pixels wide where no gradient is needed.

    On a CPU, twice as many small images take a sixth longer each: they no longer fit its caches.
    """
    return 125 if size <= 64 else 50
