"""The fine-tuning of HAST, SynQ and SaFT: students are to answer and look as the teacher does, also on harder images.

One recipe with weights (:class:`dfqlib.schedules.AlignmentWeights`): SaFT on a few real images, SynQ on low-pass
filtered synthetic ones, HAST on synthetic ones without saliency. The loop is :func:`dfqlib.finetuning.loop.finetune`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import Student
from dfqlib.finetuning.network_views import Internals, NetworkProbe
from dfqlib.finetuning.streams import Batch, Stream, read_losses
from dfqlib.loss_terms import add_up
from dfqlib.losses import difficulty, distillation_kl
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.convert import quantize_model
from dfqlib.schedules import AlignmentWeights

# HAST has cross-entropy on every image and no saliency; SynQ has SaFT's weights.
HAST = {"ce_weight": 1.0, "easy_below": 2.0, "saliency_weight": 0.0}


def selective_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, easy_below: float = 0.5
) -> Tensor:
    """CE(S(x), y), mean over the samples whose difficulty for the teacher is below ``easy_below``; 0 without any.

    Logits (B, classes), labels (B,) integers. Hard labels of samples on which the teacher errs mislead: the student
    learns those from the teacher's logits alone. Above 1 every sample counts. Source: SynQ, soft labels for difficult
    samples.
    """
    easy = (difficulty(teacher_logits, labels) < easy_below).to(student_logits.dtype)
    losses = F.cross_entropy(student_logits, labels, reduction="none")
    return (easy * losses).sum() / easy.sum().clamp(min=1)


def attention_gap(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """FA: the mean squared gap between channel attentions (B, C), summed over the residual units, at least one.

    Both hold one attention per unit, in the same order. Source: HAST, feature alignment.
    """
    return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]).sum()


def agreement(
    student: Internals, teacher: Internals, labels: Tensor, weights: AlignmentWeights, attention: bool = True
) -> Tensor:
    """A = alpha tau^2 KL(T || S) + lambda_CE CE|easy + lam FA, of one batch of images; labels (B,) integers.

    ``attention=False`` leaves FA out. Source: SynQ, equation 6; SaFT; FA from HAST, feature alignment.
    """
    parts = {}
    if weights.kl_weight:
        parts["KL"] = weights.kl_weight * distillation_kl(teacher.logits, student.logits, weights.temperature)
    if weights.ce_weight:
        cross_entropy = selective_cross_entropy(student.logits, teacher.logits, labels, weights.easy_below)
        parts["CE"] = weights.ce_weight * cross_entropy
    if weights.attention_weight and attention:
        parts["FA"] = weights.attention_weight * attention_gap(student.attentions, teacher.attentions)
    return add_up(parts) if parts else student.logits.new_zeros(())


def promote(images: Tensor, loss: Tensor, epsilon: float) -> Tensor:
    """x + eps sign(dL/dx): ``images`` (B, 3, H, W) moved to where the student's ``loss`` on them is higher.

    The images must require a gradient, and ``loss`` keeps its graph. The teacher's part in the loss is taken as
    constant. Source: HAST, sample difficulty promotion.
    """
    (gradient,) = torch.autograd.grad(loss, images, retain_graph=True)
    return images.detach() + epsilon * gradient.sign()


@dataclass(frozen=True)
class BatchWithTeacherView(Batch):
    """A batch with what the teacher makes of it, computed once for all students; no gradients."""

    seen: Internals


class WithTeacherView:
    """``stream`` with the teacher's :class:`Internals` of each batch, among them its logits."""

    def __init__(self, stream: Stream, teacher: NetworkProbe) -> None:
        self.stream, self.teacher = stream, teacher

    def next_batch(self) -> BatchWithTeacherView:
        batch = self.stream.next_batch()  # with gradients: a generator may be in training behind it
        with torch.no_grad():
            seen = self.teacher(batch.images, saliency=True).detach()
        return BatchWithTeacherView(batch.images, batch.labels, seen.logits, seen)

    def read_losses(self) -> list[float]:
        return read_losses(self.stream)

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


class Alignment:
    """A student's loss on a :class:`BatchWithTeacherView`: A(x) + A(x') + lambda_CAM MSE(map of S, map of T).

    A is :func:`agreement`; x' are the promoted copies of x, on which both networks run again; each map is of the
    network's own top class. UserError if FA is asked for and ``teacher`` has no residual units. Source: SaFT; SynQ,
    equation 6.
    """

    def __init__(self, teacher: NetworkProbe, student: NetworkProbe, weights: AlignmentWeights) -> None:
        self.teacher, self.student, self.weights = teacher, student, weights
        if weights.attention_weight and not teacher.units:
            raise UserError(
                f"attention_weight={weights.attention_weight:g} aligns residual units, of which this network has none; "
                "allowed: 0."
            )

    def __call__(self, network: nn.Module, batch: BatchWithTeacherView) -> Tensor:
        weights = self.weights
        moves = weights.epsilon > 0 and (weights.kl_weight or weights.ce_weight or weights.attention_weight)
        images = batch.images.detach().requires_grad_(bool(moves))
        ours = self.student(images, saliency=weights.saliency_weight > 0)
        parts = {"": agreement(ours, batch.seen, batch.labels, weights)}
        if moves:
            harder = promote(images, parts[""], weights.epsilon)
            with torch.no_grad():
                theirs = self.teacher(harder)
            copies = agreement(self.student(harder), theirs, batch.labels, weights, weights.perturbed_attention)
            parts["perturbed copies"] = copies
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
) -> Student:
    """A quantized copy of ``teacher`` that learns by ``weights``; ``probe`` is the teacher's, of the same layer.

    Moving-average ranges and SGD are GDFQ's; ``lr`` and ``decay`` SaFT's.
    """
    network = quantize_model(teacher.network, bits)
    return Student(network, lr, decay, loss=Alignment(probe, NetworkProbe(network, weights.saliency_of), weights))
