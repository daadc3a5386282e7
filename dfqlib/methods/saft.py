"""The fine-tuning of HAST, SynQ and SaFT: students answer and look as the teacher does, also on harder images.

One recipe with weights (:class:`dfqlib.schedules.AlignmentWeights`): SaFT on a few real images, SynQ on low-pass
filtered synthetic ones, HAST on synthetic ones without saliency.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import Student
from dfqlib.finetuning.network_views import Internals, NetworkProbe
from dfqlib.finetuning.streams import Batch, FirstThen, Stream, read_losses
from dfqlib.loss_terms import add_up
from dfqlib.losses import difficulty, distillation_kl
from dfqlib.methods import gdfq
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.convert import quantize_model
from dfqlib.schedules import AlignmentWeights, GeneratorSchedule

# HAST has cross-entropy on every image and no saliency; SynQ has SaFT's weights.
HAST = {"ce_weight": 1.0, "easy_below": 2.0, "saliency_weight": 0.0}
HAST_BY_DATASET = {  # CIFAR-100 has SaFT's two
    "cifar10": {"attention_weight": 1000.0, "epsilon": 0.01},
    "imagenet": {"attention_weight": 4000.0, "epsilon": 0.01},
}


def hast_weights(dataset: str, as_released: bool = False) -> dict[str, float]:
    """What HAST changes in :class:`AlignmentWeights` on ``dataset``, by its configurations.

    ``as_released=True`` is a quirk of its code: cross-entropy is computed and left out of the sum.
    """
    return HAST | HAST_BY_DATASET.get(dataset, {}) | ({"ce_weight": 0.0} if as_released else {})


def after_generated_ranges(teacher: Teacher, stream: Stream, iterations: int, seed: int = 0) -> Stream:
    """``stream`` behind ``iterations`` batches of 16 images of a GDFQ generator in training, to learn ranges from.

    Source: the code of HAST, SynQ and SaFT, which take 800; their papers do not say.
    """
    schedule = GeneratorSchedule(batch=16, generator_iterations=iterations)
    return FirstThen(gdfq.make_stream(teacher, schedule, seed=seed), iterations, stream)


def selective_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, easy_below: float = 0.5) -> Tensor:
    """CE(S(x), y), mean over the samples whose difficulty for the teacher is below ``easy_below``; 0 without any.

    Logits (B, classes), labels (B,) integers. The student learns difficult samples from the teacher's logits alone:
    hard labels mislead where the teacher errs. Above 1 every sample counts.
    Source: SynQ, soft labels for difficult samples.
    """
    easy = (difficulty(teacher, labels) < easy_below).to(student.dtype)
    losses = F.cross_entropy(student, labels, reduction="none")
    return (easy * losses).sum() / easy.sum().clamp(min=1)


def attention_gap(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """FA: the mean squared gap between channel attentions (B, C), summed over the residual units; 0 without any.

    Source: HAST, feature alignment.
    """
    gaps = [F.mse_loss(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
    return torch.stack(gaps).sum() if gaps else torch.zeros(())


def agreement(
    student: Internals, teacher: Internals, labels: Tensor, weights: AlignmentWeights, attention: bool = True
) -> Tensor:
    """A = alpha tau^2 KL(T || S) + lambda_CE CE|easy + lam FA, FA only with ``attention``; labels (B,) integers.

    Source: SynQ, equation 6; SaFT; FA from HAST, feature alignment.
    """
    parts = {}
    if weights.kl_weight:
        parts["KL"] = weights.kl_weight * distillation_kl(teacher.logits, student.logits, weights.temperature)
    if weights.ce_weight:
        easy = selective_cross_entropy(student.logits, teacher.logits, labels, weights.easy_below)
        parts["CE"] = weights.ce_weight * easy
    if weights.attention_weight and attention:
        parts["FA"] = weights.attention_weight * attention_gap(student.attentions, teacher.attentions)
    return add_up(parts) if parts else student.logits.new_zeros(())


def promote(images: Tensor, loss: Tensor, epsilon: float) -> Tensor:
    """x + eps sign(dL/dx): ``images`` (B, 3, H, W) moved to where the student's ``loss`` on them is higher.

    The images must require a gradient; ``loss`` keeps its graph. The teacher counts as constant.
    Source: HAST, sample difficulty promotion.
    """
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    return images.detach() + epsilon * gradient.sign()


@dataclass(frozen=True)
class BatchWithTeacherView(Batch):
    """A batch with what the teacher makes of it, computed once for all students; no gradients."""

    seen: Internals


class WithTeacherView:
    """``stream`` with the teacher's :class:`Internals` of each batch; its state and its losses are the stream's.

    Without ``saliency`` no maps are computed.
    """

    def __init__(self, stream: Stream, teacher: NetworkProbe, saliency: bool = True) -> None:
        self.stream, self.teacher, self.saliency = stream, teacher, saliency
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict
        self.read_losses = partial(read_losses, stream)

    def next_batch(self) -> BatchWithTeacherView:
        batch = self.stream.next_batch()  # with gradients: a generator may be in training behind it
        with torch.no_grad():
            seen = self.teacher(batch.images, saliency=self.saliency).detach()
        return BatchWithTeacherView(batch.images, batch.labels, seen.logits, seen)


def alignment_loss(
    _: nn.Module, batch: BatchWithTeacherView, teacher: NetworkProbe, student: NetworkProbe, weights: AlignmentWeights
) -> Tensor:
    """A(x) + lambda_pert A(x') + lambda_CAM MSE(map of S, map of T), A being :func:`agreement`, ``student`` a probe.

    x' are the promoted copies of x, on which both networks run again; each map is of the network's own top class.
    Source: SaFT; SynQ, equation 6.
    """
    moves = weights.epsilon * weights.perturbed_weight > 0 and (
        weights.kl_weight or weights.ce_weight or weights.attention_weight
    )
    images = batch.images.detach().requires_grad_(bool(moves))
    ours = student(images, saliency=weights.saliency_weight > 0)
    parts = {"": agreement(ours, batch.seen, batch.labels, weights)}
    if moves:
        harder = promote(images, parts[""], weights.epsilon)
        with torch.no_grad():
            theirs = teacher(harder)
        copies = agreement(student(harder), theirs, batch.labels, weights, weights.perturbed_attention)
        parts["perturbed copies"] = weights.perturbed_weight * copies
    if weights.saliency_weight:
        parts["saliency"] = weights.saliency_weight * F.mse_loss(ours.saliency, batch.seen.saliency)
    return add_up(parts)


def make_student(
    teacher: Teacher,
    probe: NetworkProbe,
    bits: BitWidths,
    weights: AlignmentWeights,
    lr: float = 1e-5,
    decay: str = "late_step",
    network: nn.Module | None = None,
) -> Student:
    """A quantized copy of ``teacher`` that learns by :func:`alignment_loss`; ``probe`` is the teacher's, same layer.

    Moving-average ranges and SGD are GDFQ's; ``lr`` and ``decay`` SaFT's. ``network``, a quantized copy that is
    calibrated already, takes the place of the new one. UserError if FA is asked for and the teacher has no residual
    units.
    """
    if weights.attention_weight and not probe.units:
        lam = f"attention_weight={weights.attention_weight:g}"
        raise UserError(f"{lam} aligns residual units, of which this network has none; allowed: 0, and hast_bits=[].")
    network = network or quantize_model(teacher.network, bits)
    student = NetworkProbe(network, weights.saliency_of, cam=weights.cam)
    return Student(network, lr, decay, loss=partial(alignment_loss, teacher=probe, student=student, weights=weights))
