"""A loss as the sum of named terms, so that a message can name the term that is no longer finite."""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfqlib.errors import Diverged


def add_up(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of one or more weighted ``terms``, in their order; it carries them as ``terms``, without their graphs.

    A term that is such a sum counts by its own terms: named ``"KL of copies"``, or ``"KL"`` if its own name is empty.
    """
    result = functools.reduce(torch.add, terms.values())
    result.terms = {  # type: ignore[attr-defined]
        " of ".join(filter(None, (part, name))): value
        for name, term in terms.items()
        for part, value in getattr(term, "terms", {"": term.detach()}).items()
    }
    return result


def detach_with_terms(loss: Tensor) -> Tensor:
    """``loss`` without its graph but with its terms: it can be read later, so that no step waits for the device."""
    scalar = loss.detach()
    scalar.terms = getattr(loss, "terms", {})  # type: ignore[attr-defined]
    return scalar


def to_floats(losses: Sequence[Tensor]) -> list[float]:
    """The values of ``losses``, read from the device all at once."""
    return torch.stack(list(losses)).tolist() if losses else []


def to_finite_floats(losses: Sequence[Tensor], before: str, after: str, first: int = 0) -> list[float]:
    """:func:`to_floats` of losses from :func:`detach_with_terms`; the terms of finite ones are dropped.

    Diverged where one is not finite: ``before``, the loss and its terms that are not finite, its iteration, counted
    from ``first``, and ``after``.
    """
    values = to_floats(losses)
    for iteration, (loss, value) in enumerate(zip(losses, values, strict=True), first):
        if not math.isfinite(value):
            terms = {name: term.item() for name, term in getattr(loss, "terms", {}).items()}
            broken = ", ".join(f"{name} is {term}" for name, term in terms.items() if not math.isfinite(term))
            raise Diverged(f"{before} {value}{f' ({broken})' if broken else ''} at iteration {iteration}{after}")
        vars(loss).clear()
    return values
