"""A batch that never loses a run: files cut in half, a full disk, losses that break, checkpoints at chosen times."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import random
import re
import subprocess
import time
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import torch
from stub_kit import ROOT, call, kill_family, start, wait_for, write_kit
from test_finetune import make_stream, make_student, small_teacher, spans

from dfqlib.checkpoint import load_checkpoint, save_checkpoint
from dfqlib.errors import Diverged
from dfqlib.files import CHECKPOINT_SECONDS, CHECKPOINTS, METRICS
from dfqlib.finetuning.loop import Checkpoint, Student, finetune
from dfqlib.finetuning.streams import Batch, FirstThen
from dfqlib.generators.optimise_images import synthesise
from dfqlib.loss_terms import add_up, detach_with_terms, to_finite_floats
from dfqlib.methods.saft import WithTeacherView
from dfqlib.papers.notebook_source import notebook_sources
from dfqlib.runner.execute import LocalExecutor, Watcher, checkpoints_of
from dfqlib.runner.plan import Selection, plan
from dfqlib.runner.run_folder import broken_files, complete, read_metrics
from dfqlib.schedules import ImageSchedule
from dfqlib.scores import Score

matplotlib.use("Agg")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_with_a_broken_metrics_file_is_run_again_and_kept(kit, tmp_path, capsys, share):
    results = tmp_path / "results"
    assert call(results, "--papers", "gdfq", "--seeds", "0", "1") == 0
    (broken,) = results.glob("quick/gdfq/*-s0-*")
    metrics = (broken / "metrics.json").read_bytes()
    half = metrics[: int(share * len(metrics))]
    (broken / "metrics.json").write_bytes(half)
    capsys.readouterr()

    assert call(results, "--papers", "gdfq", "--seeds", "1") == 0  # it is not asked for, so it stays as it is
    printed = capsys.readouterr().out
    assert f"{broken / 'metrics.json'} is broken: its run counts as not finished" in printed
    table = pd.read_csv(results / "tables" / "gdfq.csv")
    assert list(table["seeds"].astype(int)) == [1, 1]

    assert call(results, "--papers", "gdfq", "--seeds", "0", "1") == 0
    printed = capsys.readouterr().out
    assert printed.count(": done") == 1 and printed.count(": found") == 1
    assert read_metrics(broken)["run"]["id"] == broken.name
    aside = broken.with_name(f"{broken.name}.broken")
    assert (aside / "metrics.json").read_bytes() == half and (aside / "notebook.ipynb").is_file()
    assert not list(broken_files(results))


def test_what_is_made_from_the_measurements_is_made_again_whole(kit, tmp_path):
    results = tmp_path / "results"
    assert call(results, "--papers", "zeroq") == 0
    made = [results / name for name in ("results.csv", "README.md", "tables/zeroq.csv", "tables/zeroq.md")]
    whole = [path.read_text() for path in made]
    for path in (*made, results / "report.html"):
        path.write_bytes(path.read_bytes()[:-9])
    assert call(results, "--papers", "zeroq") == 0
    assert [path.read_text() for path in made] == whole
    assert (results / "report.html").read_text().endswith("</html>")


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_broken_checkpoint_in_a_batch_is_begun_anew(tmp_path, monkeypatch, share):
    from dfqlib.notebook.run import Run

    monkeypatch.setenv(CHECKPOINTS, str(tmp_path))
    monkeypatch.setenv(CHECKPOINT_SECONDS, "9")
    run = Run("gdfq", {})
    checkpoint = run.checkpoint("GDFQ w4a4")
    assert checkpoint.seconds == 9
    save_checkpoint(checkpoint.path, {}, {"a": torch.ones(99)})
    whole = checkpoint.path.read_bytes()
    checkpoint.path.write_bytes(whole[: int(share * len(whole))])
    with pytest.warns(UserWarning, match=r"GDFQ-w4a4\.ckpt' cannot be read .*: the computation begins anew"):
        student = make_student(small_teacher())
        history = finetune(make_stream(small_teacher()), {"s": student}, spans(3, 1), checkpoint=checkpoint)
    assert len(history.students["s"]) == 2 and drawn(checkpoint.path) == 3


def test_a_checkpoint_is_written_after_so_many_seconds(tmp_path, monkeypatch):
    """Each batch takes a second of the clock; before it comes a look at the checkpoint."""
    clock, path, written, stream = [0.0], tmp_path / "run.ckpt", [], make_stream(small_teacher())
    draw = stream.next_batch

    def next_batch() -> Batch:
        clock[0] += 1
        written.append(drawn(path) if path.exists() else 0)
        return draw()

    monkeypatch.setattr("dfqlib.finetuning.loop.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(stream, "next_batch", next_batch)
    finetune(stream, {"s": make_student(small_teacher())}, spans(8, 1), checkpoint=Checkpoint(path, seconds=3))
    assert written == [0, 0, 0, 3, 3, 3, 6, 6] and drawn(path) == 8


def test_checkpoint_every_reaches_the_notebooks(kit, tmp_path):
    write_kit(kit, zeroq=f"import os\nassert os.environ['{CHECKPOINT_SECONDS}'] == '7'")
    assert call(tmp_path / "results", "--papers", "zeroq", "--checkpoint-every", "7") == 0


TUNING = f"""
import json, pathlib, sys, time
sys.path.insert(0, {os.fspath(ROOT / "tests")!r})
from test_finetune import make_stream, make_student, small_teacher, spans
from dfqlib.checkpoint import load_checkpoint
from dfqlib.finetuning.loop import finetune
from dfqlib.notebook.run import Run

kept = Run("zeroq", dict(seed=seed, out=out)).checkpoint("tuning")
began_at = (load_checkpoint(kept.path, {{}}) or {{"drawn": 0}})["drawn"]
student = make_student(small_teacher())
scored = []
def slowly(network):
    # The call that is to be killed waits for that near its end.
    scored.append(network)
    time.sleep(600 if len(scored) > 25 and pathlib.Path(out).parts[-4] == "killed" and not began_at else 0.05)
    return 50.0
history = finetune(make_stream(small_teacher(), 30), {{"s": student}}, spans(30, 2), slowly, 1, checkpoint=kept)
weights = {{name: value.tolist() for name, value in student.network.state_dict().items()}}
numbers = dict(losses=history.students, generator=history.generator, scores=history.scores, weights=weights)
pathlib.Path(out, "numbers.json").write_text(json.dumps([began_at, numbers]))
"""


def test_a_run_killed_at_a_random_point_and_called_again_ends_with_the_same_numbers(kit, tmp_path):
    """It is killed while it computes, however slow the machine is: it would not end by itself."""
    write_kit(kit, zeroq=TUNING)
    arguments = ["--papers", "zeroq", "--checkpoint-every", "0"]
    assert call(tmp_path / "whole", *arguments) == 0

    results, point = tmp_path / "killed", random.Random(5).randrange(1, 25)
    process = start(results, *arguments)
    files = functools.partial(results.glob, "quick/zeroq/.*.checkpoints/tuning.ckpt")
    wait_for(lambda: any(drawn(file) >= point for file in files()), 300, process)
    kill_family(process)
    process.communicate()
    assert not list(results.glob("quick/zeroq/[!.]*"))
    assert call(results, *arguments) == 0

    ends = [next(tmp_path.glob(f"{name}/quick/zeroq/*/numbers.json")) for name in ("whole", "killed")]
    (from_nothing, numbers), (from_checkpoint, same) = (json.loads(end.read_text()) for end in ends)
    assert from_nothing == 0 and point <= from_checkpoint < 30
    assert numbers == same and len(numbers["losses"]["s"]) == 28


def drawn(checkpoint: Path) -> int:
    """How many batches a fine-tuning had drawn when it wrote its checkpoint."""
    return load_checkpoint(checkpoint, {})["drawn"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "dfqlib-test", os.fspath(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can be mounted by root on Linux only")
    yield folder
    subprocess.run(["umount", "--lazy", os.fspath(folder)], check=True)


def test_a_full_disk_fails_a_run_and_leaves_the_others(kit, small_disk, capsys):
    results = small_disk / "results"
    assert call(results, "--papers", "gdfq") == 0
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    write_kit(kit, zeroq=f"open({str(small_disk / 'filler')!r}, 'wb', buffering=0).write(bytes(2**24))")
    capsys.readouterr()
    assert call(results) == 1
    printed = capsys.readouterr()
    assert "No space left on device" in printed.out.partition(": failed")[2].partition("\n")[0]
    assert "Traceback" not in printed.out + printed.err
    assert {path: path.read_bytes() for path in before} == before

    with open(small_disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert call(results) == 1  # not even room to begin
    printed = capsys.readouterr()
    assert "No space left on device" in printed.out + printed.err and "Traceback" not in printed.out + printed.err
    assert {path: path.read_bytes() for path in before} == before

    (small_disk / "filler").unlink()
    write_kit(kit)
    assert call(results) == 0
    assert (results / "tables" / "zeroq.csv").is_file() and len(list(results.glob("quick/*/[!.]*/metrics.json"))) == 2


def test_a_full_disk_is_named_by_a_checkpoint(small_disk):
    path = small_disk / "run.ckpt"
    save_checkpoint(path, {}, {"a": 1})
    with pytest.raises(OSError, match="No space left on device"):
        save_checkpoint(path, {}, {"a": torch.zeros(10**7)})
    assert load_checkpoint(path, {}) == {"a": 1} and list(small_disk.iterdir()) == [path]


def test_the_seconds_of_a_run_are_those_of_its_cells(kit, tmp_path, monkeypatch):
    """Its page is drawn here in three seconds more."""
    write_kit(kit, zeroq="import time\ntime.sleep(1)")
    monkeypatch.setattr("dfqlib.runner.notebook_page.as_page", lambda notebook: time.sleep(3) or "")
    assert call(tmp_path / "results", "--papers", "zeroq") == 0
    (run,) = tmp_path.glob("results/quick/zeroq/[!.]*")
    assert 1 <= read_metrics(run)["run"]["seconds"] < 3


def test_a_page_that_cannot_be_made_costs_no_measurement(kit, tmp_path, monkeypatch, capsys):
    def broken(notebook):
        raise ValueError("no such formula")

    monkeypatch.setattr("dfqlib.runner.notebook_page.as_page", broken)
    assert call(tmp_path / "results", "--papers", "zeroq") == 0
    assert "; without notebook.html (ValueError: no such formula)" in capsys.readouterr().out
    (run,) = tmp_path.glob("results/quick/zeroq/[!.]*")
    assert complete(run)


def test_with_force_too_a_run_goes_on_after_its_worker_was_lost(kit, tmp_path, monkeypatch):
    (run,) = plan(Selection(papers=["zeroq"]))
    checkpoints = checkpoints_of(run.folder(tmp_path))
    checkpoints.mkdir(parents=True)
    monkeypatch.setattr(LocalExecutor, "_execute", lambda *_: checkpoints.exists())
    assert LocalExecutor(1).execute(run, tmp_path, True, Watcher(print, print), resume=True)


def test_a_kernel_needs_no_home(kit, tmp_path, monkeypatch):
    """As in a container whose user has none; here there is a file where it should be, and none can be made."""
    (tmp_path / "file").touch()
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    process = start(tmp_path / "results", "--papers", "zeroq")
    assert "done" in process.communicate(timeout=120)[0] and process.returncode == 0


def test_a_file_system_without_locks_is_told_and_used(kit, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)  # no file system of this kind can be relied on to be here
    assert call(tmp_path / "results") == 0
    printed = capsys.readouterr().out
    assert printed.count("is on a file system without locks") == 1 and printed.count(": done") == 2


def test_terms_of_sums_of_sums_and_the_first_loss_that_breaks():
    one, nan, inf = (torch.tensor(value) for value in (1.0, float("nan"), float("inf")))
    inner = add_up({"KL": one, "CE": one})
    assert inner == 2
    outer = add_up({"": inner, "copies": add_up({"KL": nan, "CE": inf}), "saliency": one})
    losses = [detach_with_terms(inner), detach_with_terms(outer), detach_with_terms(nan)]
    with pytest.raises(Diverged) as error:
        to_finite_floats(losses, "It is", "!", 10)
    assert str(error.value) == "It is nan (KL of copies is nan, CE of copies is inf) at iteration 11!"
    with pytest.raises(Diverged, match="It is nan at iteration 0"):
        to_finite_floats([detach_with_terms(nan)], "It is", "!")
    assert to_finite_floats([detach_with_terms(one)], "", "") == [1.0] and to_finite_floats([], "", "") == []


def test_synthesis_names_the_term_that_breaks():
    count = iter(range(100))

    def loss(images):
        cross_entropy = torch.tensor(float("inf") if next(count) == 7 else 0.0)
        return add_up({"statistics": images.square().sum(), "CE": cross_entropy})

    schedule = ImageSchedule(synthesis_lr=0.1, synthesis_iterations=20, synthesis_patience=3)
    with pytest.raises(Diverged, match=r"the loss is inf \(CE is inf\) at iteration 7; synthesis_lr=0\.1"):
        synthesise(torch.zeros(1, 3, 2, 2), loss, schedule)


def breaks_at(iteration):
    """A statistics loss for a generator that is no number at one iteration, counted from 1."""
    count = iter(range(1, 100))

    def loss(logits, labels, layers):
        bns = layers[0][1].square().mean() * (float("nan") if next(count) == iteration else 1.0)
        return add_up({"CE": logits.square().mean(), "L_BNS": bns})

    return loss


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: FirstThen(s, 99, None), lambda s: WithTeacherView(s, None)])
def test_the_generator_is_named_with_its_term_also_behind_other_streams(wrap):
    stream = make_stream(small_teacher(), iterations=6, loss=breaks_at(3))
    for _ in range(4):
        stream.next_batch()
    with pytest.raises(Diverged, match=r"the generator diverged: its loss is nan \(L_BNS is nan\) at iteration 3;"):
        wrap(stream).read_losses()


def test_a_student_that_diverges_is_given_up_and_named_and_the_others_go_on(tmp_path):
    calls, rounds = iter(range(1, 100)), spans(60, 2)

    def loss(network, batch):
        kl = network(batch.images).square().mean() * (float("inf") if next(calls) == 3 else 1.0)
        return add_up({"KL": kl, "CE": torch.tensor(1.0)})

    def students() -> dict[str, Student]:
        return {"wild": make_student(small_teacher(), loss=loss), "calm": make_student(small_teacher())}

    class Stop(Exception):
        pass

    def stop(history):
        if "wild" in history.diverged:
            raise Stop

    path = tmp_path / "run.ckpt"
    options = {"evaluate": lambda _: Score([True, False]), "evaluate_every": 29, "checkpoint": Checkpoint(path, 0)}
    with pytest.raises(Stop):
        finetune(make_stream(small_teacher(), 60), students(), rounds, on_evaluation=stop, **options)
    assert next(calls) < 30, "noticed within 25 batches"
    history = finetune(make_stream(small_teacher(), 60), students(), rounds, **options)
    reason = "student 'wild' diverged: its loss is inf (KL is inf) at iteration 5; lower its lr."
    assert history.diverged == {"wild": reason} and history.last("wild").diverged == reason
    assert history.last("wild") != history.last("wild") and history.last("calm") == 50
    assert len(history.students["calm"]) == 58


def test_the_real_notebook_gives_a_student_that_diverged_a_row_of_its_own(tmp_path, monkeypatch):
    monkeypatch.delenv("DFQ_PROFILES", raising=False)
    settings = {"student_lr": "1e3", "iterations": "12", "device": "cpu"}
    (run,) = plan(Selection("smoke", papers=["gdfq"], settings=settings))
    names = run.parameters | {"out": str(tmp_path)}
    with matplotlib.rc_context():
        for cell in notebook_sources(run.paper.notebook):
            exec(cell, names)
    row, corrected = json.loads((tmp_path / METRICS).read_text())["rows"]
    assert row["top1"] is None and corrected["top1"] is not None
    assert re.search(r"student 'W4A4' diverged: its loss is nan \(.*KL is nan\) at iteration \d+;", row["diverged"])
