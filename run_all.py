#!/usr/bin/env python
"""Run the notebooks, collect their results, and print them beside the published ones.

    python run_all.py                                     every notebook, minutes each on 2 CPU cores
    python run_all.py --papers gdfq --seeds 0 1 2         one of them, three times
    python run_all.py --datasets cifar100                 another data set
    python run_all.py --list                              every published row: what it needs, can it run here

A finished run is found again by what it depends on, so a second call runs only what is missing.
"""

import argparse
import contextlib
import functools
import gc
import io
import os
import re
import signal
import sys
from pathlib import Path
from string import ascii_letters
from typing import NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfqlib import places
from dfqlib.errors import UserError, check_choice, check_range
from dfqlib.files import KEEP
from dfqlib.papers import profiles, published
from dfqlib.papers.parameters import MAX_SEED
from dfqlib.papers.published import Failures
from dfqlib.runner import plan, preflight, run_folder

HERE = Path(__file__).resolve().parent
MAX_SEEDS = 1000  # of one range
Runs = list[plan.PlannedRun]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; python run_all.py --help shows all options.")


def parser() -> argparse.ArgumentParser:
    known, papers = profiles.load()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    about = " ".join(f"{profile.name}: {profile.about}" for profile in known.values())
    add("--profile", default="quick", metavar="NAME", help=f"{about} Default: quick.")
    add("--papers", nargs="+", default=[], metavar="NAME", help=f"notebooks to run: {', '.join(papers)} (default: all)")
    add("--datasets", nargs="+", default=[], metavar="NAME", help="cifar10, cifar100, imagenet, or a name of your own "
        "with --set data_folder=FOLDER")  # fmt: skip
    add("--models", nargs="+", default=[], metavar="NAME", help="teachers, such as resnet20_cifar10 or resnet18")
    add("--bits", nargs="+", default=[], metavar="WxAy", help="bit widths of weights and activations, such as w4a4")
    add("--seeds", nargs="+", default=["0"], metavar="N", help="a run for each, such as 0 1 2 or 0-2 (default: 0)")
    add("--set", nargs="+", default=[], action="extend", metavar="NAME=VALUE", help="any parameter of the notebooks")
    add("--results", default=str(HERE / "results" / "local"), metavar="FOLDER", help="where results go (default: "
        "results/local/, which git ignores; results/ holds those that the project publishes)")  # fmt: skip
    add("--jobs", type=int, metavar="N", help="runs at once, each with its share of the cores; 1 gives a single run "
        "all of them (default: 2). With dask: in the queue at once (default: two for each place)")  # fmt: skip
    add("--executor", default="local", metavar="NAME", help="local: this machine; dask: the workers of a Dask "
        "cluster (default: local)")  # fmt: skip
    add("--scheduler", default="", metavar="ADDRESS", help="with dask: that of a cluster, such as tcp://host:8786")
    add("--workers", type=int, metavar="N", help="with dask and no scheduler: processes to start here (default: 2)")
    add("--checkpoint-every", type=int, default=60, metavar="SECONDS", help="how often a fine-tuning is kept, to go on "
        "from there after a stop; 0: after every batch (default: 60)")  # fmt: skip
    add("--keep", type=int, nargs="?", const=100, metavar="MB", help="keep the students, generators and images of the "
        "runs that are made, in the folder kept/ of each: at most so many megabytes a run (default: 100)")  # fmt: skip
    add("--force", action="store_true", help="run again what is already there")
    add("--keep-going", action="store_true", help="after a failure, also try the other runs of the same notebook")
    add("--list", action="store_true", help="list the published rows, what each needs and whether it can run here")
    add("--dry-run", action="store_true", help="show the runs, and which of them are already there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 if a notebook failed; 2 for input that a user can correct; 130 after an interrupt."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, also where shells have that ignored
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a sign that the terminal lacks costs no run
    try:
        return call(parser().parse_args(arguments))
    except UserError as error:
        print(f"run_all.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run_all.py: interrupted", file=sys.stderr)
        return 130


def call(options: argparse.Namespace) -> int:
    check_choice("executor", options.executor, ["local", "dask"])
    if options.executor == "local" and (options.scheduler or options.workers):
        raise UserError("--scheduler and --workers are for --executor dask.")
    if options.scheduler and options.workers:
        raise UserError("--workers starts a cluster here and --scheduler names one elsewhere; give one of them.")
    for name in ("jobs", "workers"):
        if getattr(options, name) is not None:
            check_range(name, getattr(options, name), 1, 1000)
    check_range("checkpoint-every", options.checkpoint_every, 0, 10**6)
    if options.keep is not None:
        os.environ[KEEP] = str(check_range("keep", options.keep, 1, 10**6))  # its kernels inherit it
    # Brackets in a path are no markup, and lines on a pipe are not wrapped at 80 characters.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200)
    chosen = selection(options)
    runs = plan.plan(chosen)
    results = places.expand(options.results).resolve()
    if options.list:
        list_rows(console, chosen, results)
        return 0
    return (dry_run if options.dry_run else run)(console, runs, results, options)


def selection(options: argparse.Namespace) -> plan.Selection:
    """The options as a selection."""
    settings = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"--set {text} is not NAME=VALUE, such as --set iterations=200.")
        settings[name] = value
    own = {name: getattr(options, name) for name in ("profile", "papers", "datasets", "models", "bits")}
    return plan.Selection(**own, seeds=seeds(options.seeds), settings=settings)


def seeds(texts: list[str]) -> list[int]:
    """The seeds of texts such as ``3``, ``0,1,2`` and ``0-2``."""
    chosen: list[int] = []
    for text in re.split(",+", ",".join(texts).strip(",")):
        found = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", text)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last <= MAX_SEED or last - first >= MAX_SEEDS:
            allowed = f"whole numbers from 0 to {MAX_SEED}, and ranges such as 0-2 of at most {MAX_SEEDS} seeds"
            raise UserError(f"seeds={text!r} is not a seed; allowed: {allowed}.")
        chosen += range(first, last + 1)
    return chosen


def list_rows(console: Console, chosen: plan.Selection, results: Path) -> None:
    """Every published row of the requested papers, data sets, models and bits: its numbers, its cost, its source.

    Where papers print different numbers for the same setting, their rows stand one below the other.
    """
    requested = chosen.papers, chosen.datasets, chosen.models, [text.upper() for text in chosen.bits]
    expected = functools.cache(functools.partial(run_folder.expected_seconds, results, chosen.profile))
    table = Table("method", "data set", "model", "bits", "scheme", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("top-1")
    table.add_column("drop", justify="right")
    table.add_column("here", justify="right")
    table.add_column("source")
    sources: dict[str, str] = {}  # text -> number
    notes: dict[str, str] = {}  # text -> letter
    for row in sorted(published.rows(), key=lambda row: (row.method, row.dataset, row.scheme, row.model, row.bits)):
        paper = profiles.paper_of(row.method)
        values = paper and paper.key, row.dataset, row.model, row.bits
        if any(wanted and value not in wanted for wanted, value in zip(requested, values, strict=True)):
            continue
        lacking = preflight.missing(row.dataset, row.model) if paper else "no notebook for this paper yet"
        seconds = expected(paper.key, row.dataset, row.model) if paper and not lacking else None
        minutes = None if seconds is None else max(1, round(seconds / 60))
        known = "yes" if minutes is None else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
        here = "no" if lacking else known
        numbers = row.top1, row.std, row.drop, row.rerun
        top1, std, drop, rerun = ("" if number is None else f"{number:.2f}" for number in numbers)
        source = sources.setdefault(": ".join(filter(None, (row.source, row.address))), str(len(sources) + 1))
        download = "" if lacking or not preflight.downloads(row.model) else "downloads its teacher"
        again = f"{rerun} when its authors ran it again" if rerun else ""
        for text in filter(None, (lacking.removeprefix("needs "), download, again, row.note)):
            source += notes.setdefault(text, ascii_letters[len(notes)])
        setting = row.method, row.dataset, row.model, row.bits, row.scheme.split()[-1]
        table.add_row(*setting, f"{top1:>5}±{std}".rstrip("±"), drop, Text(here, "red" if lacking else "green"), source)
    console.print(table)
    console.print("\ntop-1: per cent, ± over the authors' seeds; drop: points below the full-precision network")
    console.print(
        f"here: whether it can run, or the time of its notebook under {chosen.profile} where known; hours are of"
    )
    console.print(
        "the schedule's iterations for one bit width, at what they cost in benchmarks/results (README, What it costs)"
    )
    for text, mark in (sources | notes).items():
        console.print(f"{mark:>2} {text}")
    console.print("\nTo run a row:\npython run_all.py --profile paper --papers PAPER --models MODEL --bits BITS")


def examine(runs: Runs, results: Path, options: argparse.Namespace) -> list[tuple[plan.PlannedRun, bool, str]]:
    """Each run, whether it is finished, and what prevents its start, if so; UserError if that prevents a requested run.

    ``--datasets``, ``--models`` and ``--set`` request runs; without them, only if no run can start it is an error.
    """
    examined = []
    for planned in runs:
        there = not options.force and run_folder.complete(planned.folder(results))
        why = "" if there else preflight.obstacle(planned, download=not options.dry_run)
        if why and (options.datasets or options.models or options.set):
            raise UserError(f"{planned.name}: {why}")
        examined.append((planned, there, why))
    if all(why for _, _, why in examined):
        raise UserError("none of the runs can start here; python run_all.py --list shows what each of them needs.")
    return examined


def dry_run(console: Console, runs: Runs, results: Path, options: argparse.Namespace) -> int:
    """Show what a call without --dry-run would run, and refuse what it would refuse."""
    from dfqlib.runner import batch

    batch.check_folder(next(folder for folder in (results, *results.parents) if folder.exists()))
    for planned, there, why in examine(runs, results, options):
        state = "found" if there else f"cannot run: {why}" if why else "to run"
        values = " ".join(f"{name}={value}" for name, value in planned.parameters.items())
        console.print(f"{planned.name}: {state}\n    {planned.folder(results)}\n    {values}", soft_wrap=True)
    return 0


def run(console: Console, runs: Runs, results: Path, options: argparse.Namespace) -> int:
    """Check everything, run what is missing, write and print the tables."""
    from dfqlib.runner import batch, execute
    from dfqlib.runner.screen import Row, Screen

    say = functools.partial(console.print, soft_wrap=True)
    if warning := batch.check_folder(results):
        say(warning)
    examined = examine(runs, results, options)
    failures: Failures = {}
    for planned, _, why in examined:
        if why:
            failures |= rows_of(planned, why)
            say(f"{planned.name}: not run; {why}")
    able = [planned for planned, _, why in examined if not why]
    missing = [planned for planned, there, why in examined if not there and not why]
    for sentence in run_folder.broken_files(results):
        say(sentence)
    with contextlib.ExitStack() as stack:
        executor = execute.LocalExecutor(options.jobs or 2, options.checkpoint_every)
        if options.executor == "dask" and missing:
            from dfqlib.runner.cluster import Cluster

            settings = options.scheduler, options.workers or 2, options.jobs, options.checkpoint_every
            executor = stack.enter_context(Cluster(*settings))
            if executor.empty:
                say(f"No worker is connected to {executor.address} yet; runs start when one joins.")
        count = f"{len(missing)} run{'s' * (len(missing) != 1)} to make, {len(able) - len(missing)} already there"
        for sentence in (*origins(able), f"{count}; {executor.places} at once."):
            say(sentence)
        expected = functools.cache(functools.partial(run_folder.expected_seconds, results))
        timed = [(planned, 0 if there else expected(*planned.kind)) for planned, there, why in examined if not why]
        rows = [Row(planned.name, planned.kind, seconds) for planned, seconds in timed]
        screen = stack.enter_context(Screen(console, rows, executor.places))
        work = batch.Batch(results, screen, executor, options.force, options.keep_going)
        outcomes = work.execute(able, [row.seconds for row in rows], import_report if missing else lambda: None)
    finished = [outcome.run for outcome in outcomes if outcome.state in ("done", "found")]
    for outcome in outcomes:
        if outcome.state not in ("done", "found"):
            failures |= rows_of(outcome.run, f"{outcome.state}: {outcome.message}")

    try:
        show(console, options.profile, finished, results, failures)
    except OSError as error:
        kept = "the last complete tables and all runs are kept, and the next call writes the tables again"
        print(f"run_all.py: the tables could not be written ({error}); {kept}.", file=sys.stderr)
        return 1
    return 130 if work.stopping else 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


def import_report() -> None:
    """Import what the report needs, which takes seconds, while the last runs compute."""
    from dfqlib.report import charts, collect  # noqa: F401


def origins(runs: list[plan.PlannedRun]) -> list[str]:
    """Where the test images come from, a sentence for each data set."""
    folders = {run.parameters["dataset"]: run.parameters for run in runs if run.parameters.get("dataset")}
    return [
        f"{dataset}: the images in {folder}."
        if (folder := places.data_folder(dataset, parameters))
        else f"{dataset}: the 2,000 test images in the package; for the full set put it into $DFQ_DATA/{dataset}, or "
        "name its folder with --set data_folder=FOLDER."
        for dataset, parameters in folders.items()
    ]


def rows_of(run: plan.PlannedRun, why: str) -> Failures:
    """The published rows that a run would have covered, each with ``why`` it has not."""
    return {(m, run.parameters.get("dataset", ""), run.parameters.get("model", "")): why for m in run.paper.methods}


def show(console: Console, profile_name: str, finished: Runs, results: Path, failures: Failures) -> None:
    """Write the tables and print those of the runs that this call made or found."""
    from dfqlib.report import collect, tables

    profile = profiles.load()[0][profile_name]
    written = collect.write(results, profile, {run.identity for run in finished}, failures)
    root = profile.overview_folder(results)
    for key in [key for key in dict.fromkeys(run.paper.key for run in finished) if key in written]:
        paper, rows, missing, _ = written[key]
        for part in tables.parts(rows):
            shown, caption, _ = tables.present(part)
            for column in (*tables.LEAST_NEEDED, "project", "variant"):  # the files have them
                if tables.width(shown) > console.width:
                    shown = shown.drop(columns=column, errors="ignore")
            table = Table(*shown.columns, title=paper.title, title_justify="left", caption_justify="left", box=None)
            table.caption = caption
            for line in shown.itertuples(index=False):
                table.add_row(*line)
            console.print(table, "")
        if len(missing):
            reasons = f"Reasons: {root / 'tables' / paper.key}.md"
            console.print(f"{len(missing)} published rows of this paper were not run. {reasons}", soft_wrap=True)
    page = f"; in a browser: {root / 'report.html'}" if written else ""
    console.print(f"All tables: {root / 'README.md'}{page}", soft_wrap=True)


if __name__ == "__main__":
    code = main()
    gc.freeze()  # or Python looks through all of pandas and matplotlib before it ends, for a second
    sys.exit(code)
