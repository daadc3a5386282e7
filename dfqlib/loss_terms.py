"""A loss as the sum of named terms, which are told where it is no longer finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dfqlib.errors import Diverged


def add_up(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of one or more weighted ``terms``, in their order; it carries them along, without their graphs.

    A term that is such a sum itself counts by its own terms: named ``"KL of copies"``, or just ``"KL"`` if its own name
    is empty.
    """
    result = functools.reduce(torch.add, terms.values())
    known: dict[str, Tensor] = {}
    for name, term in terms.items():
        for part, value in getattr(term, "terms", {"": term.detach()}).items():
            known[" of ".join(filter(None, (part, name)))] = value
    result.terms = known
    return result


def detach_with_terms(loss: Tensor) -> Tensor:
    """``loss`` without its graph but with its terms, to be read later, so that no step waits for the device."""
    scalar = loss.detach()
    scalar.terms = getattr(loss, "terms", {})
    return scalar


def to_floats(losses: Sequence[Tensor]) -> list[float]:
    """Some losses as numbers, brought from the device all at once."""
    return torch.stack(list(losses)).tolist() if losses else []


def to_finite_floats(losses: Sequence[Tensor], before: str, after: str, first: int = 0) -> list[float]:
    """:func:`numbers` of some :func:`kept` losses; the terms of finite ones are forgotten, as nobody will ask again.

    Raises Diverged where one is not finite: ``before``, the loss and those of its terms that are not finite, its
    iteration, counted from ``first``, and ``after``.
    """
    values = to_floats(losses)
    for iteration, (loss, value) in enumerate(zip(losses, values, strict=True), first):
        if not math.isfinite(value):
            terms = {name: term.item() for name, term in getattr(loss, "terms", {}).items()}
            broken = ", ".join(f"{name} is {term}" for name, term in terms.items() if not math.isfinite(term))
            raise Diverged(f"{before} {value}{f' ({broken})' if broken else ''} at iteration {iteration}{after}")
        vars(loss).clear()
    return values
