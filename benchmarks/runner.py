"""What the runner costs beside the work: ``python -m benchmarks.runner``.

A batch of notebooks that only sleep, against the time that their sleep takes; then calls that find all of their runs
made already, to see that the time for each stays the same. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dfqlib.device import code_version, describe_hardware, pick_device
from dfqlib.runner import plan, run_folder
from tests.stub_kit import ROOT, write_kit


def call(results: Path, seeds: int, *arguments: str) -> float:
    """Seconds of a call of run_all.py for so many seeds of the sleeping notebook."""
    options = ["--results", os.fspath(results), "--papers", "zeroq", "--seeds", *map(str, range(seeds)), *arguments]
    began = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "run_all.py", *options], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def overhead(folder: Path, runs: int, seconds: float, jobs: int) -> str:
    """A table line: how much longer than its runs' sleep a batch takes."""
    write_kit(folder, zeroq=f"import time\ntime.sleep({seconds})")
    took, ideal = call(folder / f"results-{runs}", runs, "--jobs", str(jobs)), runs * seconds / jobs
    beside = jobs * (took - ideal) / runs
    return (
        f"| {runs} | {seconds:g} | {jobs} | {ideal:.1f} | {took:.1f} | {100 * (took / ideal - 1):.2f} | {beside:.3f} |"
    )


def finding(folder: Path, runs: int) -> str:
    """A table line: how long it takes to plan so many runs, and to find them and write the tables over all of them."""
    write_kit(folder)
    results = folder / f"found-{runs}"
    call(results, 1)
    (made,) = results.glob("quick/zeroq/*")
    metrics = json.loads((made / run_folder.METRICS).read_text())
    began = time.perf_counter()
    planned = plan.plan(plan.Selection(papers=["zeroq"], seeds=list(range(runs))))
    planning = time.perf_counter() - began
    for run in planned:
        copy = run.folder(results)
        copy.mkdir(exist_ok=True)
        metrics["run"] |= {"id": run.id, "identity": run.identity}
        metrics["rows"] = [row | {"seed": run.parameters["seed"]} for row in metrics["rows"]]
        (copy / run_folder.METRICS).write_text(json.dumps(metrics))
        for name in (run_folder.NOTEBOOK, "curve.png"):
            (copy / name).write_bytes((made / name).read_bytes())
    call(results, runs)  # the page of figures is drawn once
    took = call(results, runs)
    return f"| {runs} | {1e3 * planning / runs:.2f} | {took:.2f} | {1e3 * took / runs:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runner", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100, help="sleeping notebooks (default: 100)")
    parser.add_argument("--seconds", type=float, default=10.0, help="sleep of each (default: 10)")
    parser.add_argument("--jobs", type=int, default=2, help="at once (default: 2)")
    parser.add_argument("--planned", type=int, nargs="*", default=[100, 500, 2000], help="runs that are found")
    options = parser.parse_args()
    print(f"{describe_hardware(pick_device('cpu'))}, commit {code_version()}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DFQ_PROFILES"] = os.fspath(folder / "profiles.toml")
        print("| runs | sleep, s | at once | all sleep, s | the batch, s | overhead, % | beside each, s |")
        print("| ---: " * 7 + "|")
        print(overhead(folder, options.runs, options.seconds, options.jobs), flush=True)
        print("\n| runs found | planning one, ms | the call, s | of it for one, ms |")
        print("| ---: " * 4 + "|")
        for runs in options.planned:
            print(finding(folder, runs), flush=True)


if __name__ == "__main__":
    main()
