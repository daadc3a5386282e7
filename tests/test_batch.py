"""Planning and watching runs: what a selection means, what makes a run another one, progress on screen and pipe."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from rich.console import Console
from rich.text import Text

from dfqlib import progress
from dfqlib.errors import UserError
from dfqlib.papers import profiles, published
from dfqlib.runner import execute, plan, preflight, run_folder
from dfqlib.runner.plan import Selection
from dfqlib.runner.screen import Row, Screen


def names(selection: Selection) -> list[str]:
    return [run.name for run in plan.plan(selection)]


def test_profiles_choose_data_models_and_bits(kit):
    assert names(Selection()) == [
        "zeroq cifar10 resnet20_cifar10 W4A4 W3A3 seed 0",
        "gdfq cifar10 resnet20_cifar10 W4A4 W3A3 seed 0",
    ]
    assert names(Selection("smoke", papers=["gdfq"])) == ["gdfq cifar10 resnet20_cifar10 W4A4 seed 0"]
    every = names(Selection("paper", papers=["gdfq"]))
    assert "gdfq cifar100 resnet20_cifar100 W4A4 W3A3 seed 0" in every
    assert {name.split()[2] for name in every} == {row.model for row in published.rows() if row.method == "gdfq"}


def test_selection_overrides_the_profile(kit):
    assert names(Selection(papers=["gdfq"], datasets=["cifar100"], seeds=[0, 2], bits=["W5A5"])) == [
        "gdfq cifar100 resnet20_cifar100 W5A5 seed 0",
        "gdfq cifar100 resnet20_cifar100 W5A5 seed 2",
    ]
    given = Selection("paper", papers=["gdfq"], datasets=["imagenet"], models=["resnet50"], bits=["w4a4"])
    assert names(given) == ["gdfq imagenet resnet50 W4A4 seed 0"]
    # A model alone says its data set.
    alone = Selection("paper", papers=["zeroq"], models=["resnet50"], bits=["W8A8"])
    assert names(alone) == ["zeroq imagenet resnet50 W8A8 seed 0"]
    (run,) = plan.plan(Selection(papers=["gdfq"], settings={"iterations": "7", "cosine": "false", "device": "cpu"}))
    assert (run.parameters["iterations"], run.parameters["cosine"], run.parameters["device"]) == (7, False, "cpu")


def test_teachers_run_on_the_data_sets_they_can_be_trained_on(monkeypatch):
    monkeypatch.delenv("DFQ_PROFILES", raising=False)
    assert names(Selection("paper", papers=["teachers"])) == [
        "teachers cifar10 resnet20_cifar10 seed 0",
        "teachers cifar100 resnet20_cifar100 seed 0",
    ]
    (run,) = plan.plan(Selection("paper", papers=["teachers"], models=["resnet34_cifar100"]))
    assert preflight.obstacle(run) == ""  # it trains the weights that others lack
    with pytest.raises(UserError, match="nothing to run"):
        plan.plan(Selection(papers=["teachers"], datasets=["imagenet"]))


def test_every_published_row_has_its_run(kit):
    for row in published.rows():
        if row.method in ("zeroq", "gdfq"):
            (run,) = plan.plan(Selection("paper", papers=[row.method], models=[row.model], bits=[row.bits]))
            assert run.parameters["dataset"] == row.dataset and run.parameters["bits"] == [row.bits]
    (run,) = plan.plan(Selection("paper", papers=["gdfq"], models=["torchvision/vgg16_bn"], bits=["W8A8"]))
    assert (run.parameters["dataset"], run.parameters["model"]) == ("imagenet", "torchvision/vgg16_bn")


def test_schedules_of_data_set_and_model_override_the_profile_and_departures_are_named(kit):
    parameters = {run.parameters["model"]: run.parameters for run in plan.plan(Selection("paper", papers=["zeroq"]))}
    assert (parameters["resnet18"]["iterations"], parameters["resnet18"]["lr"]) == (200, 0.1)
    assert (parameters["resnet50"]["iterations"], parameters["resnet50"]["lr"]) == (200, 0.5)
    assert profiles.describe_schedule("gdfq", {"iterations": 100, "seed": 3}) == "as published"
    assert profiles.describe_schedule("gdfq", {"iterations": 10}) == "reduced: iterations 10 (published 100)"


CELL = '{{"cells": [{{"cell_type": "code", "metadata": {{"tags": ["parameters"]}}, "source": "{}"}}]}}'


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("gdfq.ipynb", "[]", "gdfq.ipynb cannot be read (TypeError)"),
        ("gdfq.ipynb", '{"cells": [{"cell_type": "code"}]}', "gdfq.ipynb cannot be read (KeyError)"),
        ("gdfq.ipynb", CELL.format("a = b"), "notebook gdfq.ipynb: its cell tagged 'parameters' cannot be read"),
        ("gdfq.ipynb", CELL.format("a[0] = 1"), "notebook gdfq.ipynb: its cell tagged 'parameters' cannot be read"),
        ("gdfq.ipynb", CELL.format("a = ("), "notebook gdfq.ipynb: its cell tagged 'parameters' cannot be read"),
        ("profiles.toml", "", "profiles.toml' cannot be read (KeyError: 'profiles')"),
        ("profiles.toml", "[profiles]\nquick = 5", "profiles.toml' cannot be read (TypeError: "),
        ("profiles.toml", "[profiles.quick]\nabout = ''\n[gdfq]\nmethods = [5]", "cannot be read (AttributeError: "),
    ],
)
def test_notebooks_and_tables_of_another_shape_are_refused_in_a_sentence(kit, file, content, sentence):
    (kit / file).write_text(content)
    profiles._read.cache_clear()
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan.plan(Selection(papers=["gdfq"]))


def test_a_data_set_may_be_named_like_a_parameter(kit):
    assert profiles.paper("gdfq").values("paper", "iterations")["iterations"] == 100


def test_own_data_set_needs_a_folder_and_a_model(kit, tmp_path):
    (tmp_path / "flowers").mkdir()
    settings = {"data_folder": str(tmp_path / "flowers")}
    with pytest.raises(UserError, match="name its model with --models"):
        plan.plan(Selection(papers=["gdfq"], datasets=["flowers"], settings=settings))
    (run,) = plan.plan(Selection(papers=["gdfq"], datasets=["flowers"], models=["resnet18"], settings=settings))
    assert run.parameters["dataset"] == "flowers"


def test_expected_seconds_come_from_recorded_runs_of_the_kind(kit, tmp_path):
    runs = plan.plan(Selection(seeds=[0, 1, 2]))
    zeroq = [run for run in runs if run.paper.key == "zeroq"]
    for run, seconds in zip(zeroq[:2], (10.0, 30.0), strict=True):
        folder = run.folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"run": {"seconds": seconds}}))
        (folder / "notebook.ipynb").touch()
    broken = zeroq[2].folder(tmp_path)
    broken.mkdir()
    (broken / "metrics.json").write_text('{"run": {"sec')
    assert {run.kind[1]: run_folder.expected_seconds(tmp_path, *run.kind) for run in runs} == {"zeroq": 20, "gdfq": 60}
    for run in plan.plan(Selection(profile="paper", papers=["zeroq"])):
        assert run_folder.expected_seconds(tmp_path, *run.kind) is None

    assert run_folder.makespan([1, 2, 3, 4], 2) == 5 and run_folder.makespan([], 3) == 0


def test_hours_of_a_long_schedule_come_from_measured_iterations(tmp_path, monkeypatch):
    costs = tmp_path / "steps.csv"
    costs.write_text(
        "method,model,batch,ours_s\ngdfq,resnet20_cifar10,200,4\ngdfq,resnet20_cifar10,200,2\nzeroq,resnet18,32,\n"
    )
    monkeypatch.setattr(run_folder, "COSTS", [tmp_path / "none.csv", costs])
    assert run_folder.expected_seconds(tmp_path, "paper", "gdfq", "cifar100", "resnet20_cifar100") == 2 * 80_000
    assert run_folder.expected_seconds(tmp_path, "paper", "zeroq", "imagenet", "resnet18") is None  # a busy machine


def test_run_id_is_a_folder_name(kit):
    (run,) = plan.plan(Selection("paper", papers=["zeroq"], models=["torchvision/resnet18"]))
    assert run.id.startswith("imagenet-torchvision_resnet18-s0-") and "/" not in run.id


@pytest.mark.parametrize("older", [True, False])
def test_a_finished_run_is_renamed_to_its_place(tmp_path, older):
    final, partial = tmp_path / "run", tmp_path / ".run.partial"
    partial.mkdir()
    (partial / "new").touch()
    if older:
        final.mkdir()
        (final / "old").touch()
    execute.put_in_place(partial, final)
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "new"]


def test_track_reports_nested_loops_to_a_file(tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    monkeypatch.setenv(progress.FILE_VARIABLE, str(file))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_WRITES", 0)
    assert progress.read(file) == []
    for _ in progress.track("ab", "outer"):
        for i in progress.track(range(3), "inner"):
            assert progress.read(file)[1:] == [{"label": "inner", "done": i, "total": 3}]
    assert progress.read(file)[0]["done"] == 2
    for _ in progress.track(iter(range(5)), "left"):
        break
    assert list(progress.track([1, 2], "next")) == [1, 2]
    assert [loop["label"] for loop in progress.read(file)] == ["next"]


def test_track_draws_nothing_on_a_pipe_nor_minds_a_file_it_cannot_write(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv(progress.FILE_VARIABLE, raising=False)
    assert list(progress.track(range(3), "loop")) == [0, 1, 2]
    monkeypatch.setenv(progress.FILE_VARIABLE, str(tmp_path / "none" / "progress.json"))
    assert list(progress.track(range(3), "loop")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_track_draws_in_a_notebook_and_not_as_an_error(capsys, monkeypatch):
    """Where what comes by stderr is painted red."""
    monkeypatch.delenv(progress.FILE_VARIABLE, raising=False)
    kernels = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.setattr(sys, "stdout", drawn := kernels())
    assert list(progress.track(range(3), "loop")) == [0, 1, 2]
    assert "loop" in drawn.getvalue() and drawn.getvalue().endswith("\r") and capsys.readouterr().err == ""


def test_a_line_shows_how_far_cells_and_their_loops_are(tmp_path):
    file = tmp_path / "progress.json"
    file.write_text(json.dumps([{"label": "a", "done": 1, "total": 2}, {"label": "b", "done": 5, "total": 10}]))
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Screen(console, [Row("run")]) as screen:
        screen.run_starts(0, 4, file)
        assert "cell 1/4, a 1/2, b 5/10" in shown(screen)
        assert screen.tasks[0].percentage == 100 * (0.5 + 0.25) / 4
        screen.cell_ends(0)
        assert "cell 2/4" in shown(screen) and screen.tasks[0].percentage == 25 and not file.exists()


def shown(screen: Screen) -> str:
    """The text of the screen now."""
    with screen.console.capture() as drawn:
        screen.console.print(screen.get_renderable())
    return Text.from_ansi(drawn.get()).plain


def test_a_small_terminal_shows_what_matters_first(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=12)
    screen = Screen(console, [Row(f"run{index}.") for index in range(50)])
    for index in (3, 40):
        screen.run_starts(index, 3, tmp_path / "progress.json")
    screen.run_ends(45, "failed", "why")
    for index in range(20, 30):
        screen.run_ends(index, "done", "there")
    summary, *lines = shown(screen).splitlines()
    assert [line.split()[1] for line in lines] == [f"run{index}." for index in (*range(8), 40, 45)]
    states = "runs 2, failed 1, waits 37, done 10"
    assert " ".join(summary.split()) == f"11 of 50 runs ended, about 1 min left; {states}"


@pytest.mark.parametrize("terminal", [True, False])
def test_screen_in_a_terminal_and_on_a_pipe(tmp_path, terminal):
    """Brackets are no markup."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Screen(console, [Row("one [/b]"), Row("two")]) as screen:
        screen.run_starts(0, 3, tmp_path / "progress.json")
        screen.cell_ends(0)
        screen.run_ends(0, "done", "there [x]")
        screen.run_ends(1, "failed", "[why]")
    text = console.file.getvalue()
    if terminal:
        assert "done" in text and "one [/b]" in text and "[why]" in text
    else:
        overall, *lines = text.splitlines()
        assert overall == "0 of 2 runs ended, 2 not timed before"
        assert lines == ["[1/2] one [/b]: starts", "[1/2] one [/b]: done 0:00:00 there [x]", "[2/2] two: failed [why]"]


def test_the_time_left_follows_what_runs_of_the_kind_took(tmp_path, monkeypatch):
    """Six runs at two places; the clock is the test's."""
    clock = [0.0]
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    rows = [*(Row(f"a{index}", "a", 600.0) for index in range(4)), Row("b0", "b"), Row("b1", "b")]
    screen = Screen(console, rows, places=2)
    screen.get_time = lambda: clock[0]
    for index in (0, 4):
        screen.run_starts(index, 3, tmp_path / "progress.json")
    clock[0] = 120
    assert "0 of 6 runs ended, about 20 min left, 2 more not timed before" in shown(screen)
    clock[0] = 1200
    screen.run_ends(0, "done", "there")
    assert "1 of 6 runs ended, about 40 min left, 2 more not timed before" in shown(screen)
    screen.run_ends(4, "done", "there")
    assert "2 of 6 runs ended, about 40 min left" in shown(screen) and "not timed" not in shown(screen)
