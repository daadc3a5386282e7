"""Tables whose rows are measured one by one, some in a process of their own."""

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dfqlib import files
from dfqlib.errors import first_line


def add(path: Path, rows: pd.DataFrame, key: Sequence[str]) -> pd.DataFrame:
    """Put ``rows`` of one ``key`` into the table in ``path``, in place of earlier ones of that key; returns all."""
    if path.exists():
        before = pd.read_csv(path)
        same = (before[list(key)].astype(str) == rows[list(key)].iloc[0].astype(str)).all(axis=1)
        rows = pd.concat([before[~same], rows], ignore_index=True)
    files.write_text(path, rows.to_csv(index=False, float_format="%.6g"))
    return rows


def in_process(
    measure: Callable[..., Mapping[str, Any]], *parts: Any, seconds: float, start: str = "spawn"
) -> Mapping[str, Any]:
    """``measure(*parts)`` on one thread in a process of its own, so that a failure costs this row alone.

    ``{"why": reason}`` where it raises, dies or takes more than ``seconds``; ``start`` is how the process is made.
    """
    context: Any = multiprocessing.get_context(start)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, measure, parts))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else {"why": f"not done after {seconds:g} s"}
    except EOFError:
        return {"why": "its process died"}
    finally:
        process.kill()
        process.join()


def _send(end: Connection, measure: Callable[..., Mapping[str, Any]], parts: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    try:
        end.send(measure(*parts))
    except Exception as error:  # the row tells whatever went wrong
        end.send({"why": f"{type(error).__name__}: {first_line(error)}"})


def markdown(rows: Sequence[Sequence[str]], words: int) -> str:
    """A GitHub table of ``rows``, titles first, whose columns after the first ``words`` are aligned right."""
    rule = ["---"] * words + ["---:"] * (len(rows[0]) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]]) + "\n"
