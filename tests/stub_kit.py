"""A table of two small notebooks that import nothing heavy, for tests of the runner."""

from __future__ import annotations

import json
from pathlib import Path

PARAMETERS = """\
profile = "quick"
dataset = "cifar10"
model = "resnet20_cifar10"
bits = ["w4a4", "w3a3"]
seed = 0
device = "auto"
out = ""
data_folder = ""
weights = ""
iterations = 10  # loop length
lr = 0.1
cosine = True
"""

SAVE = """\
import json, pathlib
rows = [
    dict(method="{key}", scheme="{scheme}", dataset=dataset, data=dataset + "-2k", model=model, weight_bits=int(b[1]),
         activation_bits=int(b[3]), variant="", ranges="", seed=seed, top1=60.0 + seed, top1_best=61.0 + seed,
         fp32_top1=90.0, seconds=1.0)
    for b in bits
]
pathlib.Path(out, "curve.png").write_bytes(b"picture")
pathlib.Path(out, "metrics.json").write_text(json.dumps(dict(
    paper="{key}", profile=profile, schedule="reduced: iterations 10 (published 100)",
    parameters=dict(profile=profile, dataset=dataset, model=model, bits=bits, seed=seed, iterations=iterations),
    provenance=dict(commit="0123", hardware="a machine", finished="2026-01-01T00:00:00"),
    rows=rows, records={{}}, figures=["curve"])))
"""

TABLE = """\
[profiles.smoke]
about = "seconds"
datasets = ["cifar10"]
bits = ["w4a4"]
rehearsal = true

[profiles.quick]
about = "minutes"
datasets = ["cifar10"]

[profiles.paper]
about = "days"

[zeroq]
notebook = "a.ipynb"
title = "ZeroQ"
methods = ["zeroq"]
scheme = "ptq"
smoke = { iterations = 1 }
paper = { iterations = 100, imagenet = { iterations = 200 }, resnet50 = { lr = 0.5 } }

[gdfq]
notebook = "b.ipynb"
title = "GDFQ"
methods = ["gdfq"]
scheme = "qat"
smoke = { iterations = 1 }
paper = { iterations = 100 }
"""


def write_notebook(path: Path, key: str, scheme: str, body: str) -> None:
    """A notebook with a parameters cell, ``body``, and a cell that writes metrics.json and a figure."""
    sources = [("parameters", PARAMETERS), ("", body), ("", SAVE.format(key=key, scheme=scheme))]
    cells = [
        {
            "id": f"c{i}",
            "cell_type": "code",
            "metadata": {"tags": [tag]} if tag else {},
            "source": source,
            "outputs": [],
            "execution_count": None,
        }
        for i, (tag, source) in enumerate(sources)
    ]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}))


def write_kit(folder: Path, zeroq: str = "1 + 1", gdfq: str = "1 + 1") -> Path:
    """The table and its notebooks in ``folder``; returns the table, for ``$DFQ_PROFILES``."""
    folder.mkdir(exist_ok=True)
    write_notebook(folder / "a.ipynb", "zeroq", "ptq", zeroq)
    write_notebook(folder / "b.ipynb", "gdfq", "qat", gdfq)
    table = folder / "profiles.toml"
    table.write_text(TABLE)
    return table
