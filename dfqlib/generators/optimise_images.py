"""The loop that optimises images themselves: ZeroQ and every later method that needs no generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfqlib.device import fused
from dfqlib.errors import check_range
from dfqlib.loss_terms import detach_with_terms, to_finite_floats
from dfqlib.progress import track


def synthesise(
    images: Tensor,
    loss_function: Callable[[Tensor], Tensor],
    learning_rate: float,
    iterations: int,
    patience: int,
    min_learning_rate: float,
    label: str = "synthesis",
) -> tuple[Tensor, list[float]]:
    """Minimise ``loss_function`` over the pixels of ``images`` with Adam, the learning rate falling on a plateau.

    ``images`` is (B, 3, H, W), normalised, and stays as given; ``loss_function`` maps it to a scalar. The learning rate
    is divided by 10 when more than ``patience`` iterations in a row brought no gain, down to ``min_learning_rate``.
    Returns the images after the last iteration and the loss before each one. UserError for a setting out of range;
    Diverged, naming the iteration and the term that broke, as soon as a loss that is not finite is read.
    """
    check_range("learning_rate", learning_rate, 1e-12, 1e6)
    check_range("iterations", iterations, 1, 10**9)
    check_range("patience", patience, 0, 10**9)
    check_range("min_learning_rate", min_learning_rate, 0, learning_rate)
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=learning_rate, fused=fused([images]))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=patience, min_lr=min_learning_rate)
    advice = (
        f"; learning_rate={learning_rate:g} may be too high, or the teacher's weights or the images hold values that "
        "are not finite."
    )
    history: list[float] = []
    unread: list[Tensor] = []
    for iteration in track(range(iterations), label):
        loss = loss_function(images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        unread.append(detach_with_terms(loss))
        # Reading a loss waits for the device. The learning rate cannot fall before so many more losses are in, so
        # reading them all only then changes nothing and leaves an accelerator free to run ahead.
        if len(unread) > patience - plateau.num_bad_epochs or iteration == iterations - 1:
            for value in to_finite_floats(unread, f"{label}: the loss is", advice, len(history)):
                plateau.step(value)
                history.append(value)
            unread.clear()
    return images.detach(), history
