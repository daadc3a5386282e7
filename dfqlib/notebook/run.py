"""What a notebook run keeps: result rows, curves, figures, and where every number comes from."""

import datetime
import importlib.metadata
import io
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from IPython.display import Image
from matplotlib import pyplot
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from safetensors.torch import save_file

from dfqlib import plotting
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import ImageSet
from dfqlib.deploy.store import save_student
from dfqlib.device import code_version, describe_hardware, pick_device
from dfqlib.errors import UserError
from dfqlib.files import CHECKPOINT_SECONDS, CHECKPOINTS, KEEP, METRICS, METRICS_FORMAT, atomic_path, write_json
from dfqlib.finetuning.loop import Checkpoint
from dfqlib.models import evaluate
from dfqlib.models.teacher import Teacher
from dfqlib.papers import profiles
from dfqlib.report import tables
from dfqlib.scores import Score, pack, paired_difference

FLOAT = BitWidths(None, None)
#: A run has one row of each identity: what was quantized, how, and with which seed.
IDENTITY = [*(name for name in tables.SETTING if name != "paper"), "seed"]


class Run:
    """Results of one notebook run, which ends with ``run.table()`` and ``run.save()``.

    ``paper`` is the notebook's key in ``profiles.toml``; ``parameters`` are its checked parameters. ``teacher`` is the
    network that is quantized, ``data`` the test images of every top-1 (``None`` if the notebook has none).
    ``fp32_top1`` is the teacher's top-1 on ``data`` in percent. Files go to the folder ``parameters["out"]``; if it is
    empty (interactive work), nothing is written.
    """

    def __init__(
        self, paper: str, parameters: dict[str, Any], teacher: Teacher | None = None, data: ImageSet | None = None
    ) -> None:
        self.began = time.perf_counter()
        self.paper = profiles.paper(paper)
        self.parameters = {name: plain(value) for name, value in parameters.items() if name != "out"}
        out = parameters.get("out")
        self.teacher, self.data, self.out = teacher, data, Path(out) if out else None
        if self.out and not self.out.is_dir():
            raise UserError(f"out={str(out)!r} is not a folder; allowed: an existing one, or '' to write nothing.")
        self.fp32_top1 = evaluate.top1(teacher.network, data, teacher) if teacher and data is not None else None
        self.rows: list[dict[str, Any]] = []
        self.records: dict[str, Any] = {}
        self.figures: list[str] = []

    def row(
        self, bits: BitWidths | tuple[float, float] = FLOAT, *, top1: float, top1_best: float | None = None, **own: Any
    ) -> None:
        """Add a row: last and best top-1 in percent at ``bits``; for mixed precision these are mean bits per value.

        Of a :class:`dfqlib.models.evaluate.Score` the row also keeps top-5, standard errors (of the top-1, and of the
        drop from the teacher on the same images), and which images were classified correctly; of one that is NaN, why.
        ``own`` gives or overrides columns. ``variant`` names the departure from the paper's method; only rows without
        one are compared with the published value. ``ranges`` names the source of the activation ranges, ``seconds`` the
        time taken. Method, scheme, data set, model, seed and the teacher's top-1 are by default those of the run; other
        columns are kept as they are. A row of the same ``IDENTITY`` is replaced, since a cell may run twice. Raises
        ValueError if a top-1 is not a percentage or the bits are not two numbers.
        """
        widths = bits if isinstance(bits, tuple) else (bits.weight, bits.activation)
        weight_bits, activation_bits = (32 if width is None else width for width in widths)
        filled = {
            "method": next(iter(self.paper.methods), self.paper.key),
            "scheme": self.paper.scheme,
            "dataset": self.parameters.get("dataset", ""),
            "data": self.data.name if self.data is not None else "",
            "model": self.parameters.get("model", ""),
            "weight_bits": weight_bits,
            "activation_bits": activation_bits,
            "calibration": "published",
            "variant": "",
            "ranges": "",
            "seed": self.parameters.get("seed"),
            "top1": top1,
            "top1_best": top1 if top1_best is None else top1_best,
            "fp32_top1": self.fp32_top1,
            "seconds": None,
        }
        row = plain(filled | self._behind(top1) | own)
        if not all(isinstance(row[name], int | float) for name in ("weight_bits", "activation_bits")):
            raise ValueError(f"bits={bits!r} are not two numbers; for mixed precision give means, such as (2.5, 8).")
        for name in ("top1", "top1_best"):
            measured = isinstance(row[name], int | float) and 0 <= row[name] <= 100
            if not measured and not row.get("diverged"):
                raise ValueError(f"{name}={row[name]!r} of {self.paper.key} is not a percentage (0 to 100).")
        others = [old for old in self.rows if any(old[name] != row[name] for name in IDENTITY)]
        self.rows = [*others, row]

    def _behind(self, top1: float) -> dict[str, Any]:
        """What a row keeps of a score beside the top-1; nothing of a plain number."""
        if not isinstance(top1, Score):
            return {}
        if top1.diverged:
            return {"diverged": top1.diverged}
        kept = {"top5": top1.top5, "standard_error": top1.standard_error, "correct": pack(top1.correct)}
        if isinstance(self.fp32_top1, Score) and len(self.fp32_top1.correct) == len(top1.correct):
            kept["drop_error"] = paired_difference(self.fp32_top1, top1).standard_error
        return kept

    def checkpoint(self, name: str) -> Checkpoint | None:
        """The checkpoint of this run's fine-tuning ``name``; None outside a batch, which sets folder and interval.

        An unreadable checkpoint is discarded with a warning: a batch cannot ask.
        """
        folder = os.environ.get(CHECKPOINTS)
        if not folder:
            return None
        path = Path(folder, re.sub(r"[^\w.-]+", "-", name) + ".ckpt")
        return Checkpoint(path, seconds=float(os.environ.get(CHECKPOINT_SECONDS, 60)), anew=True)

    def keep(self, **made: torch.Tensor | torch.nn.Module) -> None:
        """Keep students, generators and images (N, 3, H, W) in the run's folder, as ``kept/<name>.safetensors``.

        Only in a batch with ``--keep``, whose megabytes are those of all files together: of images the first are kept
        for which there is room, of networks those for which there is. A student is read by
        :func:`dfqlib.deploy.store.load_student`; a generator is a state dict, and images are its tensor ``images``.
        """
        limit = float(os.environ.get(KEEP, 0)) * 1e6
        if not self.out or not limit:
            return
        folder = self.out / "kept"
        for name, each in made.items():
            path = folder / (re.sub(r"[^\w.-]+", "-", name) + ".safetensors")
            room = limit - sum(file.stat().st_size for file in folder.glob("*.safetensors") if file != path)
            if isinstance(each, torch.fx.GraphModule):
                try:
                    save_student(each, path, self.teacher)
                except UserError as error:  # such as a student that diverged before it had ranges
                    print(f"{path.name} is not kept: {error}")
                    continue
            else:
                tensors = each.state_dict() if isinstance(each, torch.nn.Module) else {"images": _first(each, room)}
                with atomic_path(path) as temporary:
                    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, temporary)
            if path.stat().st_size > room:
                path.unlink()
                print(f"{path.name} is not kept: it is larger than the {room / 1e6:.1f} MB that --keep leaves.")

    def record(self, name: str, value: Any) -> None:
        """Keep any other number, series or table under ``name``, such as a loss curve or the bits of each layer."""
        self.records[name] = plain(value)

    def figure(self, figure: Figure, name: str) -> Image:
        """Save a matplotlib figure as ``<name>.png`` and ``<name>.svg`` in the run's folder and return the image.

        As the last expression of a cell it is shown; the figure is drawn once. Its alternative text is in the PNG too.
        """
        if layout := figure.get_layout_engine():
            layout.execute(figure)
            figure.set_layout_engine("none")  # laid out once for both files
        box = figure.get_tightbbox().padded(pyplot.rcParams["savefig.pad_inches"])
        png, alt = io.BytesIO(), plotting.describe(figure, name)
        figure.savefig(png, format="png", bbox_inches=box, metadata={"Description": alt})
        if self.out:
            with atomic_path(self.out / f"{name}.png") as path:
                path.write_bytes(png.getvalue())
            with atomic_path(self.out / f"{name}.svg") as path:
                figure.savefig(path, format="svg", bbox_inches=box)
            self.figures = list(dict.fromkeys([*self.figures, name]))
        pyplot.close(figure)  # or the notebook would show it a second time
        return Image(png.getvalue(), width=round(box.width * figure.dpi), alt=alt)

    def table(self) -> Styler:
        """The rows so far beside the published values; the last expression of a notebook's results cell."""
        return tables.styled(tables.present(self.frame()))

    def frame(self) -> pd.DataFrame:
        """The rows as tidy data, with all that the tables need."""
        images = {"images": None if self.data is None else len(self.data)}
        return pd.DataFrame([self._context() | images | row for row in self.rows])

    def _context(self) -> dict[str, str]:
        """Columns that are the same for all rows that do not give their own."""
        schedule = profiles.describe_schedule(self.paper.key, self.parameters)
        return {"paper": self.paper.key, "profile": self.parameters.get("profile", ""), "schedule": schedule}

    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from: data, teacher, software, hardware, commit, time."""
        device = pick_device(self.parameters.get("device", "auto"))
        data, teacher, top1 = self.data, self.teacher, {"top1": self.fp32_top1}
        libraries = ("torch", "torchvision", "pytorchcv", "numpy")
        return {
            "data": data and {"name": data.name, "images": len(data), "source": data.source},
            "teacher": teacher and {n: getattr(teacher, n) for n in ("name", "source", "sha256")} | top1,
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
        kept = {name: getattr(self, name) for name in ("parameters", "rows", "records", "figures")}
        write_json(
            self.out / METRICS, {"format": METRICS_FORMAT} | self._context() | {"provenance": self.provenance()} | kept
        )
        return self.out / METRICS


def _first(images: torch.Tensor, room: float) -> torch.Tensor:
    """Those of the first ``images`` (N, C, H, W) that take at most ``room`` bytes in a file, its header included."""
    return images[: max(0, int((room - 1000) // (images[0].numel() * images.element_size())))]


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: tensors and arrays become lists, tables lists of rows, NaN and infinity null."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    elif isinstance(value, pd.DataFrame):
        value = value.reset_index().to_dict("records")
    elif isinstance(value, pd.Series):
        value = value.to_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
