"""Fine-tuning by reconstruction: each residual unit of the student is to give what the teacher's unit gives.

BRECQ (Li et al., ICLR 2021) reconstructs one block after the other, as do QDrop and Genie, on calibrated ranges; here
all blocks learn at once, end to end, so that later ones see what earlier ones still get wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dfqlib.bits import BitWidths
from dfqlib.finetuning.loop import Checkpoint, History, Student, finetune
from dfqlib.finetuning.network_views import NetworkProbe
from dfqlib.finetuning.streams import ImageStream
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.loss_terms import add_up
from dfqlib.methods.hast import refined
from dfqlib.methods.saft import BatchWithTeacherView, WithTeacherView
from dfqlib.models.teacher import Teacher
from dfqlib.quantizers.calibrate import corrected
from dfqlib.quantizers.layers import FakeQuantize
from dfqlib.schedules import CalibratedSchedule, Corrections
from dfqlib.scores import Score

CALIBRATED_ON = 512  # images
RANGE_LR = 5e-3  # of Adam on the ranges, as a share of them


def output_gap(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over ``student`` and ``teacher``, outputs f of a batch, of ||f_S - f_T||^2 / ||f_T||^2.

    Relative, so that one learning rate serves all units, networks and data sets. Source: BRECQ, block reconstruction.
    """
    gaps = [
        (ours - theirs).square().sum() / theirs.square().sum() for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(gaps).mean()


def reconstruction_loss(_: nn.Module, batch: BatchWithTeacherView, student: NetworkProbe) -> Tensor:
    """:func:`output_gap` of the residual units (B, C, h, w) + that of the logits (B, classes), which end the network.

    ``student`` probes the network. The logits' mean over classes is no answer, and is left out. A network without
    residual units learns by its logits alone.
    """
    ours = student(batch.images)
    logits = [each - each.mean(1, keepdim=True) for each in (ours.logits, batch.teacher_logits)]
    parts = {"outputs of units": output_gap(ours.outputs, batch.seen.outputs)} if ours.outputs else {}
    return add_up(parts | {"logits": output_gap(logits[:1], logits[1:])})


def make_student(network: nn.Module, lr: float = 5e-4, decay: str = "cosine") -> Student:
    """How ``network``, a calibrated quantized copy of a teacher, learns by :func:`reconstruction_loss`, with Adam.

    Activation ranges learn with it, at ``RANGE_LR``.
    """
    probe = NetworkProbe(network)
    for module in network.modules():
        if isinstance(module, FakeQuantize):
            module.learn_range()
    loss = partial(reconstruction_loss, student=probe)
    return Student(network, lr, decay, weight_decay=0.0, loss=loss, optimizer="adam", range_lr=RANGE_LR)


def reconstruct(
    teacher: Teacher,
    students: Mapping[str, Student],
    images: Tensor,
    iterations: int,
    batch: int,
    score: Callable[[nn.Module], Score] | None = None,
    vary: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    label: str = "reconstruction",
    checkpoint: Checkpoint | None = None,
) -> History:
    """Let ``students`` of :func:`make_student` learn from the teacher on ``images`` (N, C, H, W), in place.

    Each batch of ``batch`` images is changed by ``vary``. With ``score``, the scores before and after.
    """
    unlabelled = torch.zeros(len(images), dtype=torch.long, device=images.device)
    stream = ImageStream(teacher.network, images, unlabelled, min(batch, len(images)), vary, seed)
    seen = WithTeacherView(stream, NetworkProbe(teacher.network), saliency=False)
    spans = CalibratedSchedule(iterations=iterations + 1, train_from=1, batch=batch)
    return finetune(seen, students, spans, score, spans.iterations, label=label, checkpoint=checkpoint)


def tune(
    teacher: Teacher,
    pool: SyntheticImages,
    bits: Sequence[BitWidths],
    schedule: Corrections,
    score: Callable[[nn.Module], Score],
    vary: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    label: str = "reconstruction",
    checkpoint: Checkpoint | None = None,
) -> History:
    """The scores of students that are :func:`corrected` on the images of ``pool``, before and after reconstruction.

    They are calibrated on the first 512 images as they are and tuned on all of them, each batch changed by ``vary``.
    With ``corrected_refinement`` the images are :func:`dfqlib.methods.hast.refined` first.
    """
    if schedule.corrected_refinement:
        pool = refined(
            teacher, pool, schedule.corrected_refinement, f"{label}: refining images", schedule.corrected_mixed, seed
        )
    images, lr = pool.images, schedule.corrected_lr
    students = {str(w): make_student(corrected(teacher.network, w, images[:CALIBRATED_ON]), lr) for w in bits}
    spans = schedule.corrected_iterations, schedule.corrected_batch
    return reconstruct(teacher, students, images, *spans, score, vary, seed, label, checkpoint)
