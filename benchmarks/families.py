"""DSG's whole path on the networks of its table that are no ResNets, random weights: ``python -m benchmarks.families``.

Margins, images, calibration at W4A4, then a generator and a student in training, on 8 images. Writes ``families.csv``
and ``families.md``, and needs Linux, for the peak memory.
"""

import argparse
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.growth import random_teacher
from benchmarks.rows import in_process, markdown
from benchmarks.steps import RESULTS, provenance
from dfqlib.bits import BitWidths
from dfqlib.files import write_text
from dfqlib.finetuning.loop import finetune
from dfqlib.methods import dsg, gdfq
from dfqlib.models.zoo import MODELS, build
from dfqlib.quantizers.calibrate import calibrated
from dfqlib.schedules import DiverseImageSchedule, GeneratorSchedule

MODELS_OF_DSG = ["shufflenet_g1_w1", "sqnxt23_w2", "inceptionv3"]
IMAGES, ITERATIONS, BITS = 8, 2, BitWidths(4, 4)
SECONDS = 3600  # for one network, on a machine that may do other things too


def megabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def measure(model: str) -> Mapping[str, Any]:
    """CPU seconds of each part, of one iteration where it iterates, and memory beyond the network's, in MB."""
    torch.manual_seed(0)
    entry, row = MODELS[model], {}
    teacher = random_teacher(build(model), entry.classes, entry.input_size, torch.device("cpu"))
    before = megabytes()

    def timed(part: str, work: Callable[[], Any], iterations: int = 1) -> Any:
        began = time.process_time()
        made = work()
        row[part] = (time.process_time() - began) / iterations
        return made

    images = DiverseImageSchedule(images=IMAGES, synthesis_iterations=ITERATIONS)
    gaps = timed("margins, s", lambda: dsg.noise_gaps(teacher, IMAGES))
    made = timed("images, s", lambda: dsg.synthesise_diverse(teacher, gaps, images), ITERATIONS)
    timed("calibration, s", lambda: calibrated(teacher.network, BITS, made.images, observer=dsg.RANGE_RULES["ema"]))
    spans = {"iterations": ITERATIONS + 1, "observe_iterations": 1, "train_from": 1, "batch": IMAGES}
    tuning = GeneratorSchedule(**spans, generator_iterations=ITERATIONS + 1)
    stream, student = dsg.make_stream(teacher, tuning, gaps), gdfq.make_student(teacher, BITS, tuning)
    timed("tuning, s", lambda: finetune(stream, {"": student}, tuning), ITERATIONS + 1)
    return row | {"memory, MB": megabytes() - before}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS_OF_DSG, help="default: all three")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for families.csv and families.md")
    arguments, rows = parser.parse_args(), []
    for model in arguments.models:
        found = dict(in_process(measure, model, seconds=SECONDS))
        rows.append(
            provenance(torch.device("cpu"), model) | {"pixels": MODELS[model].input_size} | found | {"threads": 1}
        )
        print(model, found, flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(arguments.out / "families.csv", index=False, float_format="%.4g")
    shown = [name for name in table if name in ("model", "pixels", "why") or name.endswith((", s", ", MB"))]
    table["memory, MB"] = table["memory, MB"].round().astype("Int64")
    cells = [[f"{each:.3g}" if isinstance(each, float) else str(each) for each in row] for row in table[shown].values]
    first = rows[0]
    told = f"{first['hardware']}, torch {first['torch']}, commit {first['commit']}, {first['date'][:10]}."
    about = f"DSG at W4A4 on {IMAGES} images, random weights, CPU seconds (of one iteration where there are several)."
    text = f"{about}\n\n{markdown([shown, *cells], words=1)}\n{told}\n"
    write_text(arguments.out / "families.md", text)


if __name__ == "__main__":
    main()
