"""What bfloat16 changes in labels and accuracy: ``python -m benchmarks.precision``.

Writes ``precision.csv``: GDFQ's generator and a W4A4 student on its images, per data set, seed and precision.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from benchmarks.steps import RESULTS, provenance
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import embedded_test
from dfqlib.finetuning.loop import finetune
from dfqlib.finetuning.streams import generated_pool
from dfqlib.methods import gdfq
from dfqlib.models.evaluate import top1
from dfqlib.models.teacher import Teacher, load_teacher
from dfqlib.quantizers.calibrate import corrected
from dfqlib.schedules import GeneratorSchedule
from dfqlib.speed import precision

WARMUP, POOL, CALIBRATED_ON = 100, 2000, 512
W4A4 = BitWidths(4, 4)
#: Per data set: the generator has its labels as under the fast profile, and so many images an iteration.
SETTINGS = {"cifar10": {"batch": 64, "conditional": False}, "cifar100": {"batch": 100, "conditional": True}}


def measure(teacher: Teacher, iterations: int, seed: int, batch: int, conditional: bool) -> dict[str, float]:
    """Per cent of labels that the teacher agrees with, top-1 of a student as published and as corrected, seconds."""
    spans = {"iterations": iterations - WARMUP, "observe_iterations": 8, "train_from": 8}
    rates = {"generator_lr": 4e-3, "student_lr": 5e-6, "kl_weight": 50.0, "decay": "cosine"}
    schedule = GeneratorSchedule(**spans, **rates, generator_iterations=iterations, batch=batch)
    stream = gdfq.make_stream(teacher, schedule, seed=seed, conditional=conditional)
    student, began = gdfq.make_student(teacher, W4A4, schedule), time.process_time()
    finetune(stream, {"W4A4": student}, schedule, generator_warmup=WARMUP)
    seconds, pool = time.process_time() - began, generated_pool(stream, POOL)
    precision.use("float32")
    with torch.no_grad():
        classes = torch.cat([teacher.network(images).argmax(1) for images in pool.images.split(125)])
    test, calibrated = (
        embedded_test(teacher.entry.dataset),
        corrected(teacher.network, W4A4, pool.images[:CALIBRATED_ON]),
    )
    return {
        "labels_agreed": 100 * (classes == pool.labels).double().mean().item(),
        "student": float(top1(student.network, test, teacher)),
        "corrected": float(top1(calibrated, test, teacher)),
        "cpu_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.partition("\n")[0])
    parser.add_argument("--datasets", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="default: both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--iterations", type=int, default=200, help="of the generator (default: 200)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for precision.csv")
    options = parser.parse_args()
    rows = []
    for dataset in options.datasets:
        teacher = load_teacher(f"resnet20_{dataset}")
        for seed in options.seeds:
            for name in ("float32", "bfloat16"):
                precision.use(name)
                found = measure(teacher, options.iterations, seed, **SETTINGS[dataset])
                rows.append({"dataset": dataset, "seed": seed, "precision": name} | found)
                print(rows[-1], flush=True)
    table = pd.DataFrame(rows).assign(**provenance(teacher.device, "resnet20"), iterations=options.iterations)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "precision.csv", index=False, float_format="%.6g")
    about = ["labels_agreed", "student", "corrected", "cpu_s"]
    print(table.groupby(["dataset", "precision"], sort=False)[about].agg(["mean", "std"]).round(2).to_string())


if __name__ == "__main__":
    main()
