"""PLF (Fan et al., CVPR 2024): pseudo-labels by how sure the teacher is of an image, and equal features.

The images are optimised with plain cross-entropy: :func:`dfqlib.methods.hast.hard_images` with beta 10 and gamma 0.
"""

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.finetuning.loop import Student
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import Stateful
from dfqlib.loss_terms import add_up
from dfqlib.losses import distillation_kl
from dfqlib.methods.saft import BatchWithTeacherView, WithTeacherView, attention_gap
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.convert import quantize_model


def self_entropy(logits: Tensor) -> Tensor:
    """H (B,) of the predicted probabilities: 0 where the teacher is sure, 1 where all classes are alike to it.

    ``logits`` (B, classes). Source: PLF, equation 3.
    """
    return torch.special.entr(logits.softmax(1)).sum(1) / math.log(logits.shape[1])


def pseudo_labels(logits: Tensor, threshold: float) -> Tensor:
    """(B, classes): the teacher's top class where its self-entropy is at most ``threshold``, else its two best.

    These two have their probabilities' shares. ``logits`` (B, classes). Source: PLF, equations 4, 6, 8 and 10.
    """
    best = logits.softmax(1).topk(2)
    shares = F.normalize(best.values, p=1, dim=1)
    one_hot = torch.zeros_like(shares)
    one_hot[:, 0] = 1
    reliable = (self_entropy(logits) <= threshold).unsqueeze(1)
    return torch.zeros_like(logits).scatter(1, best.indices, torch.where(reliable, one_hot, shares))


class PseudoLabelled(Stateful):
    """``stream`` with :func:`pseudo_labels`; their threshold falls from ``upper`` to ``lower`` over ``iterations``.

    Source: PLF, equation 5, by iterations in place of epochs.
    """

    remembers = "stream", "drawn"

    def __init__(self, stream: WithTeacherView, iterations: int, upper: float = 0.5, lower: float = 0.2) -> None:
        self.stream, self.iterations, self.upper, self.lower = stream, iterations, upper, lower
        self.drawn = 0

    def next_batch(self) -> BatchWithTeacherView:
        batch = self.stream.next_batch()
        threshold = self.upper - self.drawn / self.iterations * (self.upper - self.lower)
        self.drawn += 1
        return replace(batch, labels=pseudo_labels(batch.teacher_logits, threshold))


def pseudo_label_loss(student: Tensor, labels: Tensor, high_weight: float = 1.0, low_weight: float = 0.3) -> Tensor:
    """CE of the reliable samples + beta CE of the others, each a mean over its samples; 0 without any.

    Logits and :func:`pseudo_labels` (B, classes); reliable are those with one class. ``low_weight`` is beta; without
    ``high_weight`` the first term is gone. Source: PLF, equations 7, 9 and 11.
    """
    losses, reliable = F.cross_entropy(student, labels, reduction="none"), (labels.amax(1) == 1).to(student.dtype)
    groups = ((high_weight, reliable), (low_weight, 1 - reliable))
    return torch.stack([weight * (group * losses).sum() / group.sum().clamp(min=1) for weight, group in groups]).sum()


def plf_loss(
    _: nn.Module,
    batch: BatchWithTeacherView,
    student: NetworkProbe,
    high_weight: float = 1.0,
    low_weight: float = 0.3,
    feature_weight: float = 100.0,
) -> Tensor:
    """KL(T || S) + :func:`pseudo_label_loss` + mu :func:`dfqlib.methods.saft.attention_gap`.

    ``student`` probes the network; ``feature_weight`` is mu. Source: PLF, equations 12 to 15. Its MSE of intermediate
    layers is read as HAST's, of the residual units' channel attention: with the mean square of their outputs, whole or
    relative, students diverge within ten iterations at the paper's mu and rate.
    """
    ours = student(batch.images)
    parts = {"KL": distillation_kl(batch.teacher_logits, ours.logits, temperature=1.0)}
    if high_weight or low_weight:
        parts["pseudo-labels"] = pseudo_label_loss(ours.logits, batch.labels, high_weight, low_weight)
    if feature_weight:
        parts["features"] = feature_weight * attention_gap(ours.attentions, batch.seen.attentions)
    return add_up(parts)


def make_student(
    teacher: Teacher, bits: BitWidths, lr: float = 1e-3, decay: str = "late_step", **weights: float
) -> Student:
    """A quantized copy of ``teacher`` that learns by :func:`plf_loss` with ``weights``; ranges and SGD are GDFQ's.

    UserError if features are to be compared and the teacher has no residual units.
    """
    network = quantize_model(teacher.network, bits)
    probe = NetworkProbe(network)
    if not probe.units and weights.get("feature_weight", True):
        raise UserError("feature_weight compares residual units, of which this network has none; allowed: 0.")
    return Student(network, lr, decay, loss=partial(plf_loss, student=probe, **weights))
