"""The loop that optimises the pixels of images: ZeroQ and every later method without a generator."""

from collections.abc import Callable

import torch
from torch import Tensor

from dfqlib.device import fused
from dfqlib.generators.synthetic_images import SyntheticImages
from dfqlib.loss_terms import detach_with_terms, to_finite_floats
from dfqlib.progress import track
from dfqlib.schedules import ImageSchedule


def synthesise(
    images: Tensor, loss_function: Callable[[Tensor], Tensor], schedule: ImageSchedule, label: str = "synthesis"
) -> SyntheticImages:
    """Minimise ``loss_function`` over the pixels of ``images`` with Adam; the learning rate falls on plateaus.

    ``images`` (B, 3, H, W), normalised, are left unchanged; ``loss_function`` maps images to a scalar. The learning
    rate is divided by 10 after more than ``synthesis_patience`` iterations in a row without gain, down to
    ``synthesis_min_lr``. Returns the images after the last iteration, without labels, and the loss before each one.
    Diverged, naming the iteration and the term, as soon as a loss that is not finite is read.
    """
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=schedule.synthesis_lr, fused=fused([images]))
    patience = schedule.synthesis_patience
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=schedule.synthesis_min_lr)
    hint = f"; synthesis_lr={schedule.synthesis_lr:g} may be too high, or the weights or images may not be finite."
    history: list[float] = []
    unread: list[Tensor] = []
    for iteration in track(range(schedule.synthesis_iterations), label):
        loss = loss_function(images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        unread.append(detach_with_terms(loss))
        # Reading a loss waits for the device. The learning rate cannot fall before so many more losses are in: reading
        # them together then changes nothing, and an accelerator can run ahead.
        if len(unread) > patience - plateau.num_bad_epochs or iteration == schedule.synthesis_iterations - 1:
            for value in to_finite_floats(unread, f"{label}: the loss is", hint, len(history)):
                plateau.step(value)
                history.append(value)
            unread.clear()
    return SyntheticImages(images.detach(), losses=[history])
