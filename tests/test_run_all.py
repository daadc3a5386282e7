"""run_all.py from end to end, on small notebooks: fresh, resumed, broken, interrupted, two at once, and wrong input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import psutil
import pytest
from PIL import Image
from stub_kit import ROOT, call, run_folders, start, wait_for, write_kit

from dfqlib.papers import published
from dfqlib.report import tables
from dfqlib.runner import execute
from dfqlib.runner.kernels import cores
from dfqlib.runner.run_folder import complete


def test_fresh_then_resumed_then_another_seed(kit, tmp_path, capsys):
    results = tmp_path / "results"
    assert call(results) == 0
    printed = capsys.readouterr().out
    assert "[1/2] zeroq cifar10 resnet20_cifar10 W4A4 W3A3 seed 0: starts" in printed
    assert printed.count("cifar10: the 2,000 test images in the package; for the full set") == 1
    assert "2 runs to make, 0 already there; 2 at once.\n0 of 2 runs ended, about 1 min left\n" in printed
    assert "90.11" in printed  # the published value of GDFQ W4A4 beside ours
    first = run_folders(results)
    assert [name.partition("/")[0] for name in first] == ["gdfq", "zeroq"]
    for name in first:
        files = {path.name for path in (results / "quick" / name).iterdir()}
        assert files == {"notebook.ipynb", "notebook.html", "metrics.json", "curve.png"}
    metrics = json.loads((results / "quick" / first[0] / "metrics.json").read_text())
    assert metrics["run"]["id"] == first[0].partition("/")[2]
    assert set(metrics["run"]["depends"]) == {"code", "teacher", "data", "torch"}

    written = (results / "quick" / first[0] / "notebook.ipynb").stat().st_mtime_ns
    assert call(results) == 0
    assert capsys.readouterr().out.count(": found") == 2
    assert (results / "quick" / first[0] / "notebook.ipynb").stat().st_mtime_ns == written

    assert call(results, "--papers", "gdfq", "--seeds", "0", "1") == 0
    table = pd.read_csv(results / "tables" / "gdfq.csv")
    assert list(table["seeds"]) == ["0 1", "0 1"] and list(table["top1"]) == [60.5, 60.5]
    assert list(table["published"]) == [90.11, 75.11]

    tidy = pd.read_csv(results / "results.csv").groupby("paper", sort=False)["top1"].apply(list).to_dict()
    assert tidy == {"zeroq": [60.0, 60.0], "gdfq": [60.0, 61.0, 60.0, 61.0]}
    for notebook in results.glob("quick/zeroq/*/notebook.ipynb"):  # as in a fresh clone: only measurements are there
        notebook.unlink()
    assert call(results, "--papers", "gdfq") == 0
    assert set(pd.read_csv(results / "results.csv")["paper"]) == {"zeroq", "gdfq"}


def test_tables_name_every_published_row_run_or_not(kit, tmp_path):
    results = tmp_path / "results"
    assert call(results, "--papers", "gdfq", "--bits", "w4a4") == 0
    text = (results / "tables" / "gdfq.md").read_text()
    shown, _, missing = text.partition("## Published, not run")
    assert (
        "| W4A4 | 60.00 |" in shown
        and f"{published.find('gdfq', 'cifar10', 'resnet20_cifar10', 4, 4)[0].top1}" in shown
    )
    for row in published.rows():
        if row.method == "gdfq" and (row.dataset, row.bits) != ("cifar10", "W4A4"):
            assert f"{row.bits} {tables.number(row.top1)}".strip() in missing
    figure = "gdfq-quick-cifar10-resnet20_cifar10-curve"
    assert f"![{figure}](../figures/{figure}.png)" in text and (results / "figures" / f"{figure}.png").is_file()
    assert "| zeroq | imagenet |" in (results / "tables" / "zeroq.md").read_text()  # not asked for


def test_an_executed_notebook_shows_its_figures(kit, tmp_path):
    write_kit(kit, zeroq="import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\nfigure")
    process = start(tmp_path / "results", "--papers", "zeroq")
    assert process.communicate(timeout=120) and process.returncode == 0
    (notebook,) = tmp_path.glob("results/quick/zeroq/*/notebook.ipynb")
    assert '"image/png"' in notebook.read_text()


def test_broken_notebook_leaves_its_copy_and_the_others_go_on(kit, tmp_path, capsys):
    results = tmp_path / "results"
    write_kit(kit, zeroq="print('so far')\n1 / 0")
    assert call(results, "--seeds", "0", "1", "--jobs", "1") == 1
    printed = capsys.readouterr().out
    assert "failed" in printed and "ZeroDivisionError: division by zero" in printed
    assert printed.count("skipped") == 1  # the broken notebook's second seed
    (unfinished,) = results.glob("quick/zeroq/*.unfinished")
    assert "so far" in (unfinished / "notebook.ipynb").read_text()
    assert "ZeroDivisionError" in (unfinished / "error.txt").read_text()
    assert len(list(results.glob("quick/gdfq/*/metrics.json"))) == 2

    write_kit(kit)  # mended: its code is another, so it runs; the others are found
    assert call(results, "--seeds", "0", "1") == 0
    printed = capsys.readouterr().out
    assert printed.count(": found") == 2 and printed.count(": done") == 2


def test_checkpoints_outlive_a_failure_and_go_when_the_run_is_complete(kit, tmp_path):
    body = """
import os, pathlib
tries = pathlib.Path(os.environ["DFQ_CHECKPOINTS"], "tries")
tries.parent.mkdir(exist_ok=True)
before = tries.read_text() if tries.exists() else ""
tries.write_text(before + "x")
assert len(before) == 2"""
    write_kit(kit, zeroq=body)
    results = tmp_path / "results"
    for options, tries in [([], "x"), ([], "xx"), (["--force"], "x"), ([], "xx")]:
        assert call(results, "--papers", "zeroq", *options) == 1
        (folder,) = results.glob("quick/zeroq/.*.checkpoints")
        assert (folder / "tries").read_text() == tries
    assert call(results, "--papers", "zeroq") == 0
    assert not list(results.glob("quick/zeroq/.*"))


def test_keep_going_tries_the_other_runs_of_a_broken_notebook(kit, tmp_path, capsys):
    write_kit(kit, zeroq="assert seed, 'seed 0 is bad'")
    assert call(tmp_path / "results", "--papers", "zeroq", "--seeds", "0", "1", "--keep-going") == 1
    printed = capsys.readouterr().out
    assert printed.count(": failed") == 1 and printed.count(": done") == 1


LISTENING = """
import json, pathlib, psutil
from ipykernel import connect
bound = {{c.laddr.port for c in psutil.Process().net_connections("inet")}}
known = connect.get_connection_info(unpack=True)
ports = [port for name, port in known.items() if name.endswith("_port") and port in bound]
pathlib.Path({file!r}).write_text(json.dumps([known["transport"], len(ports)]))"""


def test_a_kernel_that_dies_is_reported(kit, tmp_path, capsys):
    write_kit(kit, zeroq="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert call(tmp_path / "results", "--papers", "zeroq") == 1
    assert "the kernel died" in capsys.readouterr().out
    (notebook,) = tmp_path.glob("results/quick/zeroq/*.unfinished/notebook.ipynb")
    cells = json.loads(notebook.read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells]
    assert counts[:2] == [1, 2] and counts[3] is None


@pytest.mark.skipif(os.name != "posix", reason="Windows has only ports")
@pytest.mark.parametrize(("folder", "transport", "ports"), [("short", "ipc", 0), ("x" * 100, "tcp", 5)])
def test_kernels_take_no_ports_but_where_no_socket_has_room(kit, tmp_path, monkeypatch, folder, transport, ports):
    """A port can be taken by another process first; a socket has room if the temporary folder's path is short."""
    write_kit(kit, zeroq=LISTENING.format(file=str(tmp_path / "seen")))
    with tempfile.TemporaryDirectory() as temporary:
        (folder := Path(temporary, folder)).mkdir()
        monkeypatch.setenv("TMPDIR", str(folder))
        process = start(tmp_path / "results", "--papers", "zeroq")
        assert process.communicate(timeout=60) and process.returncode == 0
        assert json.loads((tmp_path / "seen").read_text()) == [transport, ports]
        assert not list(folder.iterdir())


def test_a_notebook_that_saves_nothing_is_no_result(kit, tmp_path, capsys):
    write_kit(kit, zeroq="out = '/nowhere'; import pathlib; pathlib.Path.write_text = pathlib.Path.write_bytes = print")
    assert call(tmp_path / "results", "--papers", "zeroq") == 1
    assert "without writing metrics.json" in capsys.readouterr().out
    assert not list((tmp_path / "results").glob("quick/zeroq/[!.]*/metrics.json"))


def test_smoke_stays_out_of_the_tables(kit, tmp_path):
    results = tmp_path / "results"
    assert call(results, "--profile", "smoke", "--papers", "gdfq") == 0
    assert not (results / "tables").exists() and not (results / "README.md").exists()
    assert (results / "smoke" / "tables" / "gdfq.md").is_file()


def test_force_runs_again_and_replaces(kit, tmp_path, capsys):
    results = tmp_path / "results"
    assert call(results, "--papers", "gdfq") == 0
    (folder,) = results.glob("quick/gdfq/*")
    (folder / "old").touch()
    assert call(results, "--papers", "gdfq", "--force") == 0
    assert list(results.glob("quick/gdfq/*")) == [folder] and not (folder / "old").exists()


def test_dry_run_and_list_write_nothing(kit, tmp_path, capsys):
    results = tmp_path / "results"
    assert call(results, "--dry-run", "--set", "iterations=7", "lr=0.5") == 0
    printed = capsys.readouterr().out
    assert printed.count(": to run") == 2 and " iterations=7 " in printed and " lr=0.5 " in printed
    assert call(results, "--list") == 0
    printed = capsys.readouterr().out
    table, _, legend = printed.partition("\n\n")
    assert "the test images of imagenet (in $DFQ_DATA/imagenet" in legend and "no notebook for this paper" in legend
    assert len(table.splitlines()) == 1 + len(published.rows()) and max(map(len, table.splitlines())) <= 80
    (first, second) = re.findall(r"hast +cifar10 +resnet20_cifar10 +W3A3 .*", table)  # two papers print two numbers
    assert " 86.34 " in first and " 88.34 " in second
    assert re.search(r"gdfq +cifar100 .* W4A4 qat +63.58±0.23 +6.75 +1 min ", table)
    source = re.search(r"gdfq .* cifar10 .* W3A3 .* (\d+)", table)[1]
    (row,) = published.find("gdfq", "cifar10", "resnet20_cifar10", 3, 3)
    assert f"\n{source:>2} {row.source}: {row.address}\n" in legend
    assert not results.exists()


def test_planning_does_not_import_torch(kit):
    calls = "import sys, run_all; run_all.main(['--dry-run']); run_all.main(['--list'])"
    command = [sys.executable, "-c", f"{calls}; assert 'torch' not in sys.modules"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("stop", "background"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_an_interrupt_keeps_what_is_finished_and_prints_no_older_table(kit, tmp_path, stop, background):
    results, flag = tmp_path / "results", tmp_path / "started"
    assert call(results, "--papers", "gdfq") == 0
    (older,) = run_folders(results)
    write_kit(kit, gdfq=f"import time\nopen({str(flag)!r}, 'w').close()\ntime.sleep(600)")
    process = start(results, background=background)
    wait_for(lambda: flag.exists() and list(results.glob("quick/zeroq/[!.]*/metrics.json")), process=process)
    process.send_signal(stop)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "Interrupted: finished runs kept: 1; runs with a checkpoint to resume from: 0." in printed
    assert [line.strip() for line in printed.splitlines() if line.strip() in ("zeroq", "gdfq")] == ["zeroq"]
    for name in re.findall(r"All tables: (.*); in a browser: (.*)", printed)[0]:
        assert Path(name).is_file()
    (unfinished,) = (path for path in results.glob("quick/gdfq/[!.]*") if path.name not in older)
    assert unfinished.name.endswith(".unfinished") and (unfinished / "notebook.ipynb").is_file()
    assert (unfinished / "error.txt").read_text() == "interrupted\n"
    assert list(pd.read_csv(results / "tables" / "zeroq.csv")["top1"]) == [60.0, 60.0]


def test_an_interrupt_stops_every_run_at_work_and_no_other_begins(kit, tmp_path):
    folder, results = tmp_path / "begun", tmp_path / "results"
    folder.mkdir()
    write_kit(kit, zeroq=f"import time\nopen({str(folder)!r} + f'/{{seed}}', 'w').close()\ntime.sleep(600)")
    process = start(results, "--papers", "zeroq", "--seeds", "0", "1", "2", "3", "--jobs", "2")
    wait_for(lambda: len(list(folder.iterdir())) == 2, process=process)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.count(": starts") == printed.count(": stopped") == printed.count(": skipped") == 2
    assert len(run_folders(results)) == len(run_folders(results, ".unfinished")) == 2
    assert not list(results.glob("quick/zeroq/.*.partial"))


def test_a_container_s_quota_of_cores_counts(monkeypatch):
    monkeypatch.setattr("dask.system.cpu_count", lambda: 6)
    assert execute.LocalExecutor(2).threads == 3


def test_runs_at_once_share_the_cores(kit, tmp_path, monkeypatch):
    """Each notebook waits for the other to begin, so one after the other they would never end."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    body = """
import os, pathlib, time
folder = pathlib.Path({folder!r})
(folder / "{mine}").write_text(os.environ["OMP_NUM_THREADS"])
deadline = time.monotonic() + 60
while not (folder / "{other}").exists():
    assert time.monotonic() < deadline
    time.sleep(0.05)"""
    own = {"folder": str(tmp_path)}
    write_kit(kit, body.format(mine="a", other="b", **own), body.format(mine="b", other="a", **own))
    assert call(tmp_path / "results", "--jobs", "2") == 0
    assert {int((tmp_path / name).read_text()) for name in "ab"} == {max(1, cores() // 2)}


def test_a_batch_that_is_killed_leaves_no_kernel_and_nothing_behind_the_next_call(kit, tmp_path):
    results, pid = tmp_path / "results", tmp_path / "pid"
    body = f"""
import os, pathlib, time
pid = pathlib.Path({str(pid)!r})
if not pid.exists():
    pid.write_text(str(os.getpid()))
    time.sleep(600)"""
    write_kit(kit, zeroq=body)
    process = start(results, "--papers", "zeroq")
    wait_for(lambda: pid.exists() and pid.read_text(), process=process)
    kernel = psutil.Process(int(pid.read_text()))
    process.kill()
    process.communicate()
    wait_for(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE)
    assert list(results.glob("quick/zeroq/.*.partial"))
    assert call(results, "--papers", "zeroq") == 0
    assert not list(results.glob("quick/zeroq/.*"))


def test_two_at_once_lose_nothing(kit, tmp_path):
    results = tmp_path / "results"
    processes = [start(results, "--papers", "gdfq") for _ in range(2)]
    assert [process.communicate(timeout=120) and process.returncode for process in processes] == [0, 0]
    (folder,) = results.glob("quick/gdfq/[!.]*")
    assert json.loads((folder / "metrics.json").read_text())["run"]["id"] == folder.name
    assert not list(results.glob("quick/gdfq/.*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--profile", "quik"], "profile='quik' is unknown (did you mean 'quick'?)"),
        (["--papers", "gdqf"], "papers='gdqf' is unknown (did you mean 'gdfq'?)"),
        (["--datasets", "cifar11"], "datasets='cifar11' is unknown (did you mean 'cifar10'?)"),
        (["--models", "resnet21_cifar10"], "models='resnet21_cifar10' is unknown (did you mean 'resnet20_cifar10'?)"),
        (["--datasets", "cifar100", "--models", "resnet18"], "models='resnet18' has none for cifar100"),
        (["--bits", "w9a4"], "bits='w9a4' is not supported"),
        (["--bits", "w4a1"], "bits='w4a1' is not supported"),
        (["--bits", "4"], "bits='4' is not supported"),
        (["--jobs", "0"], "jobs=0 is out of range"),
        (["--jobs", "two"], "argument --jobs: invalid int value: 'two'"),
        (["--checkpoint-every", "-1"], "checkpoint-every=-1 is out of range"),
        (["--seeds", "-1"], "seeds='-1' is not a seed; allowed: whole numbers from 0 to 4294967295"),
        (["--seeds", "0", "one"], "seeds='one' is not a seed"),
        (["--seeds", "9" * 24], "seeds='999999999999999999999999' is not a seed"),
        (["--seeds", "2-0"], "seeds='2-0' is not a seed"),
        (["--seeds", ""], "seeds='' is not a seed"),
        (["--seeds", "0-9999999"], "ranges such as 0-2 of at most 1000 seeds"),
        (["--set", "iteration=3"], "--set='iteration' is unknown (did you mean 'iterations'?)"),
        (["--set", "iterations=many"], "iterations='many' is not a whole number"),
        (["--set", "lr=nan"], "lr='nan' is not a number"),
        (["--set", "lr=1e999"], "lr=inf is out of range"),
        (["--set", "cosine=maybe"], "cosine='maybe' is of another type; allowed: True or False"),
        (["--set", "iterations"], "--set iterations is not NAME=VALUE"),
        (["--set", "seed=3"], "--set seed=3 has an option of its own: use --seeds"),
        (["--sett", "x=1"], "unrecognized arguments: --sett x=1"),
        (["--datasets", "imagenet"], "needs the test images of imagenet"),
        (["--datasets", "cifar10", "cifar100", "--set", "data_folder=x"], "data_folder would serve cifar10, cifar100"),
        (["--set", "data_folder=/does/not/exist"], "is not a folder"),
    ],
)
def test_wrong_input_is_one_sentence_before_any_work(kit, tmp_path, capsys, arguments, sentence):
    for mode in ([], ["--dry-run"]):
        assert call(tmp_path / "results", *arguments, *mode) == 2
        printed = capsys.readouterr()
        assert sentence in printed.err and printed.err.count("\n") == 1
        assert not list((tmp_path / "results").glob("*"))


def test_seeds_are_numbers_lists_and_ranges_and_bits_are_read_in_any_case(kit, tmp_path, capsys):
    for seeds in (["0", "1", "2"], ["0,1,2"], ["0-2"], ["0,", "1-2"]):
        assert call(tmp_path / "results", "--dry-run", "--papers", "gdfq", "--seeds", *seeds) == 0
        assert re.findall(r"seed (\d): to run", capsys.readouterr().out) == ["0", "1", "2"]
    for arguments in (["--list"], ["--dry-run"]):
        printed = set()
        for bits in ("w4a4", "W4A4"):
            assert call(tmp_path / "results", *arguments, "--papers", "gdfq", "--bits", bits) == 0
            printed.add(capsys.readouterr().out)
        (text,) = printed
        assert "W4A4" in text and "W3A3" not in text


@pytest.mark.parametrize("folder", ["a [x]", "a[/b]/r", "ä – ✓", "{model} {0}"])
def test_paths_and_terminals_of_any_kind(kit, tmp_path, folder, monkeypatch):
    """Brackets are no markup, braces no parameters, and a sign that the stream cannot write is no reason to fail."""
    results = tmp_path / folder / "results"
    results.mkdir(parents=True)
    table = write_kit(tmp_path / folder / "kit", gdfq="raise ValueError('\N{GREEK SMALL LETTER ALPHA}')")
    monkeypatch.setenv("DFQ_PROFILES", str(table))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    printed, errors = start(results).communicate(timeout=120)
    assert "Traceback" not in errors and "ValueError: ?" in printed
    assert f"All tables: {results / 'README.md'}".encode("ascii", "replace").decode() in printed
    assert "failed: ValueError: α" in (results / "tables" / "gdfq.md").read_text(encoding="utf-8")
    (done,) = results.glob("quick/zeroq/*")
    assert complete(done)


def test_data_folder_and_weights_are_checked_before_any_work(kit, tmp_path, capsys):
    empty, wrong, weights = tmp_path / "empty", tmp_path / "wrong", tmp_path / "weights.safetensors"
    empty.mkdir()
    (wrong / "kittens").mkdir(parents=True)
    (wrong / "kittens" / "1.png").touch()
    weights.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for setting, sentence in [
        (f"data_folder={empty}", "is empty"),
        (f"data_folder={wrong}", "unexpected class folder kittens"),
        (f"weights={weights}", "truncated"),
        (f"weights={tmp_path / 'none.safetensors'}", "is not a file"),
        (f"weights={tmp_path / 'assets/resnet20_cifar100.safetensors'}", "not a weights file"),  # another model's
    ]:
        for mode in ([], ["--dry-run"]):
            assert call(tmp_path / "results", "--papers", "gdfq", "--set", setting, *mode) == 2
            printed = capsys.readouterr()
            assert sentence in printed.err and printed.err.count("\n") == 1
    assert not list((tmp_path / "results").glob("*"))
    for size in ((40, 30), (50, 60)):  # which the notebook crops
        Image.new("RGB", size).save(wrong / "kittens" / f"{size[0]}.png")
    (wrong / "kittens" / "1.png").unlink()
    own = ["--datasets", "pets", "--models", "resnet18", "--set", f"data_folder={wrong}"]
    assert call(tmp_path / "results", "--papers", "gdfq", "--dry-run", *own) == 0


def test_results_folder_and_table_that_cannot_be_used(kit, tmp_path, capsys, monkeypatch):
    (tmp_path / "results").write_text("a file")
    for arguments in ([], ["--dry-run"]):
        assert call(tmp_path / "results", *arguments) == 2
        printed = capsys.readouterr()
        assert "cannot be written" in printed.err and printed.err.count("\n") == 1
    monkeypatch.setenv("DFQ_PROFILES", str(tmp_path / "none.toml"))
    assert call(tmp_path / "results") == 2
    assert "DFQ_PROFILES=" in capsys.readouterr().err
