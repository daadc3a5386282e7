"""What a notebook leaves behind: rows of results, curves, figures, and where every number came from.

A notebook makes one :class:`Run`, gives it rows and figures as they arise, and ends with ``run.table()`` and
``run.save()``. With ``out=""`` (someone works in the notebook) nothing is written; ``run_all.py`` sets ``out`` to the
run's folder.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from dfqlib.device import code_version, describe_hardware, pick_device
from dfqlib.errors import UserError
from dfqlib.files import CHECKPOINT_SECONDS, CHECKPOINTS, atomic_path, write_json
from dfqlib.papers import profiles
from dfqlib.report import tables

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.figure import Figure
    from pandas.io.formats.style import Styler

    from dfqlib.data.image_sets import ImageSet
    from dfqlib.finetuning.loop import Checkpoint
    from dfqlib.models.teacher import Teacher
METRICS = "metrics.json"


class Run:
    """Results of one notebook run.

    ``paper`` is its key in ``profiles.toml``; ``parameters`` all values of its parameters cell; ``teacher`` and
    ``data`` the network that was quantized and the test images behind every top-1 (``None`` where a notebook has
    none); ``fp32_top1`` the teacher's top-1 on ``data`` in percent, measured here if it is not given.
    """

    def __init__(
        self,
        paper: str,
        parameters: dict[str, Any],
        teacher: Teacher | None = None,
        data: ImageSet | None = None,
        out: str | Path = "",
        fp32_top1: float | None = None,
    ) -> None:
        self.began = time.perf_counter()
        self.paper = profiles.paper(paper)
        self.parameters = {name: plain(value) for name, value in parameters.items() if name != "out"}
        self.teacher, self.data, self.out = teacher, data, Path(out) if out else None
        if self.out and not self.out.is_dir():
            raise UserError(f"out={str(out)!r} is not a folder; give an existing one, or '' to write nothing.")
        self.fp32_top1 = fp32_top1
        if fp32_top1 is None and teacher is not None and data is not None:
            from dfqlib.models.evaluate import top1

            self.fp32_top1 = top1(teacher.network, data, teacher)
        self.rows: list[dict[str, Any]] = []
        self.records: dict[str, Any] = {}
        self.figures: list[str] = []

    def row(
        self,
        weight_bits: float = 32,
        activation_bits: float = 32,
        *,
        top1: float,
        top1_best: float | None = None,
        variant: str = "",
        ranges: str = "",
        seconds: float | None = None,
        **extra: Any,
    ) -> None:
        """Add one row: last and best top-1 in percent at these bit widths (32 = float, a mean for mixed precision).

        ``variant`` says what differs from the paper's method; only rows with an empty one are held against the
        published value. ``ranges`` names the source of the activation ranges. Method, scheme, data set, model, seed and
        the teacher's top-1 come from the run unless ``extra`` names them; other entries of ``extra`` are kept as they
        are. Raises ValueError for a top-1 that is no percentage, so that a broken run leaves no row.
        """
        filled = {
            "method": self.paper.methods[0] if self.paper.methods else self.paper.key,
            "scheme": self.paper.scheme,
            "dataset": self.parameters.get("dataset", ""),
            "data": self.data.name if self.data is not None else "",
            "model": self.parameters.get("model", ""),
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "variant": variant,
            "ranges": ranges,
            "seed": self.parameters.get("seed"),
            "top1": top1,
            "top1_best": top1 if top1_best is None else top1_best,
            "fp32_top1": self.fp32_top1,
            "seconds": seconds,
        }
        row = {name: plain(value) for name, value in (filled | extra).items()}
        for name in ("top1", "top1_best"):
            if not isinstance(row[name], int | float) or not 0 <= row[name] <= 100:
                raise ValueError(f"{name}={row[name]!r} of {self.paper.key} is not a percentage (0 to 100).")
        self.rows.append(row)

    def checkpoint(self, name: str) -> Checkpoint | None:
        """Where the fine-tuning ``name`` of this run is kept against a stop; None outside a batch.

        ``run_all.py`` names the folder in ``DFQ_CHECKPOINTS``: it outlives the run's own until the run is complete. It
        is written every ``DFQ_CHECKPOINT_SECONDS``; one that cannot be read is begun anew, since a batch could not ask.
        """
        from dfqlib.finetuning.loop import Checkpoint

        folder = os.environ.get(CHECKPOINTS)
        if not folder:
            return None
        path = Path(folder, re.sub(r"[^\w.-]+", "-", name) + ".ckpt")
        return Checkpoint(path, seconds=float(os.environ.get(CHECKPOINT_SECONDS, 60)), anew=True)

    def record(self, name: str, value: Any) -> None:
        """Keep any other number, series or table under ``name``: curves, bit widths per layer, sensitivities."""
        self.records[name] = plain(value)

    def figure(self, figure: Figure, name: str) -> Image:
        """Save a matplotlib figure as ``<name>.png`` and ``<name>.svg`` in the run's folder, and return the picture.

        Last expression of a notebook's cell. What the notebook shows is the file: a figure is drawn no second time. Its
        name stands for it where it is not seen.
        """
        from IPython.display import Image
        from matplotlib import pyplot

        if layout := figure.get_layout_engine():
            layout.execute(figure)
            figure.set_layout_engine("none")  # laid out once for both files
        box = figure.get_tightbbox().padded(pyplot.rcParams["savefig.pad_inches"])
        png = io.BytesIO()
        figure.savefig(png, format="png", bbox_inches=box)
        if self.out:
            with atomic_path(self.out / f"{name}.png") as path:
                path.write_bytes(png.getvalue())
            with atomic_path(self.out / f"{name}.svg") as path:
                figure.savefig(path, format="svg", bbox_inches=box)
            self.figures.append(name)
        pyplot.close(figure)  # or the notebook would show it a second time
        return Image(png.getvalue(), width=round(box.width * figure.dpi), alt=name.replace("_", " "))

    def table(self) -> Styler:
        """The results so far, ours beside the published values; last expression of a notebook's results cell."""
        return tables.styled(tables.present(self.frame()), tables.caption(self.frame()))

    def frame(self) -> pd.DataFrame:
        """The rows with everything the tables need, as tidy data; seconds and schedule are per run."""
        context = {
            "paper": self.paper.key,
            "profile": self.parameters.get("profile", ""),
            "schedule": profiles.describe_schedule(self.paper.key, self.parameters),
        }
        return pd.DataFrame([context | row for row in self.rows])

    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from: data, teacher, software, hardware, commit, time."""
        device = pick_device(self.parameters.get("device", "auto"))
        libraries = ("torch", "torchvision", "pytorchcv", "numpy")
        return {
            "data": {"name": self.data.name, "images": len(self.data), "source": self.data.source}
            if self.data
            else None,
            "teacher": {
                "name": self.teacher.name,
                "source": self.teacher.source,
                "sha256": self.teacher.sha256,
                "top1": self.fp32_top1,
            }
            if self.teacher
            else None,
            "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in libraries},
            "hardware": describe_hardware(device),
            "device": str(device),
            "commit": code_version(),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.began, 1),
        }

    def save(self) -> Path | None:
        """Write ``metrics.json`` into the run's folder and return its path; without a folder, do nothing."""
        if self.out is None:
            return None
        path = self.out / METRICS
        content = {
            "paper": self.paper.key,
            "profile": self.parameters.get("profile", ""),
            "schedule": profiles.describe_schedule(self.paper.key, self.parameters),
            "parameters": self.parameters,
            "provenance": self.provenance(),
            "rows": self.rows,
            "records": self.records,
            "figures": self.figures,
        }
        write_json(path, content)
        return path


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: tensors and arrays become lists, tables lists of rows, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, pd.DataFrame):
        return plain(value.reset_index().to_dict("records"))
    if isinstance(value, pd.Series):
        return plain(value.to_dict())
    if isinstance(value, torch.Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
