"""What a run leaves behind, and how it becomes tables beside the published values."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

import run_all
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import DATASETS, load_test
from dfqlib.errors import UserError
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import MODELS
from dfqlib.notebook.run import Run
from dfqlib.papers import profiles, published
from dfqlib.papers.profiles import Profile
from dfqlib.report import collect, tables
from dfqlib.runner import preflight

ROOT = Path(__file__).resolve().parent.parent
W3A3, W4A4 = map(BitWidths.parse, ("W3A3", "W4A4"))
PARAMETERS = {"profile": "quick", "dataset": "cifar10", "model": "resnet20_cifar10", "seed": 0, "device": "cpu"}


def make_run(out: Path | str = "", seed: int = 0, paper: str = "gdfq", **parameters) -> Run:
    run = Run(paper, PARAMETERS | {"seed": seed, "out": out} | parameters)
    run.fp32_top1 = 93.0  # as measured of a teacher
    return run


def test_rows_are_filled_from_the_run():
    run = make_run(seed=3)
    run.row(W4A4, top1=88.0, top1_best=89.0, seconds=12.5, images=1000)
    run.row(W3A3, top1=70, variant="without L_BNS")
    expected = {"method": "gdfq", "scheme": "qat", "dataset": "cifar10", "model": "resnet20_cifar10", "seed": 3}
    expected |= {"fp32_top1": 93.0, "top1_best": 89.0, "images": 1000, "variant": "", "ranges": ""}
    assert run.rows[0] | expected == run.rows[0]
    assert run.rows[1]["top1_best"] == 70  # the only evaluation is the best one


def test_a_top1_that_is_no_percentage_leaves_no_row():
    run = make_run()
    for top1 in (float("nan"), -1.0, 100.5, None):
        with pytest.raises(ValueError, match="is not a percentage"):
            run.row(W4A4, top1=top1)
    assert run.rows == []


def test_teacher_is_measured_on_the_data():
    class Always(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(10)[3])

        def forward(self, x):
            return self.weight.expand(len(x), 10)

    teacher = Teacher.from_module(Always(), 10, (0.5,) * 3, (0.5,) * 3)
    run = Run("gdfq", PARAMETERS, teacher, load_test("cifar10"))
    assert run.fp32_top1 == 10.0
    provenance = run.provenance()
    assert provenance["data"]["images"] == 2000 and provenance["teacher"]["sha256"] == teacher.sha256
    assert provenance["device"] == "cpu" and provenance["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_everything_is_written_and_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figure = Figure(layout="constrained")
    figure.add_subplot()
    run = make_run()
    assert run.figure(figure, "curve").data.startswith(b"\x89PNG")
    assert run.save() is None and not list(tmp_path.iterdir())

    run = make_run(out=tmp_path)
    run.row(W4A4, top1=88.0)
    run.record("loss", torch.tensor([1.0, float("nan")]))
    run.record("bits per layer", pd.DataFrame({"bits": np.array([2, 8])}, index=["conv1", "conv2"]))
    picture = run.figure(figure, "curve")
    metrics = json.loads(run.save().read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"curve.png", "curve.svg", "metrics.json"}
    assert picture.data == (tmp_path / "curve.png").read_bytes() and picture.alt == "curve"
    assert metrics["records"]["loss"] == [1.0, None]
    assert metrics["records"]["bits per layer"] == [{"index": "conv1", "bits": 2}, {"index": "conv2", "bits": 8}]
    assert "out" not in metrics["parameters"] and metrics["figures"] == ["curve"]
    assert {"commit", "hardware", "versions", "finished", "seconds"} <= set(metrics["provenance"])


def test_a_cell_that_runs_again_replaces_its_rows_and_figures(tmp_path):
    run = make_run(out=tmp_path)
    for top1 in (80.0, 90.0):
        run.row(W4A4, top1=top1)
        run.row(W4A4, top1=top1 - 5, variant="control")
        run.row(W4A4, top1=top1 - 7, variant="control", seed=1)
        figure = Figure(layout="constrained")
        figure.add_subplot()
        run.figure(figure, "curve")
    assert tables.present(run.frame())["top-1"].tolist() == ["90.00", "84.00 ± 1.41"]
    assert json.loads(run.save().read_text())["figures"] == ["curve"]


def test_mixed_precision_is_named_by_its_mean_bits():
    run = make_run()
    run.row((2.49, 8), top1=80.0)
    assert tables.present(run.frame())["bits"].tolist() == ["W2.49A8"]
    with pytest.raises(ValueError, match="give means"):
        run.row(BitWidths({"conv1": 2, "conv2": 4}, 8), top1=80.0)


def test_unknown_paper_and_missing_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'gdfq'"):
        make_run(paper="gdqf")
    with pytest.raises(UserError, match="is not a folder"):
        make_run(out=tmp_path / "none")


def test_table_shows_ours_beside_the_published():
    frames = []
    for seed, top1 in ((0, 88.0), (1, 90.0)):
        run = make_run(seed=seed)
        run.row(W4A4, top1=top1, top1_best=top1 + 1, seconds=10)
        run.row(W4A4, top1=top1 - 20, variant="without L_BNS")
        run.row(top1=93.0)
        frames.append(run.frame())
    shown = tables.present(pd.concat(frames, ignore_index=True))
    # 89 is our mean, 90.11 the published value, 93 our teacher, 93.89 theirs.
    expected = {"bits": "W4A4", "top-1": "89.00 ± 1.41", "best": "90.00", "published": "90.11", "difference": "-1.11"}
    expected |= {"teacher": "93.00", "drop": "4.00", "published drop": "3.78", "seeds": "0 1", "seconds": "10"}
    assert shown.iloc[0][list(expected)].to_dict() == expected
    assert shown.iloc[1]["published"] == "" and shown.iloc[1]["variant"] == "without L_BNS"
    assert shown.iloc[2]["bits"] == "FP32" and shown.iloc[2]["published"] == "93.89"


def test_reduced_schedule_is_labelled(kit):
    run = make_run(iterations=10)
    run.row(W4A4, top1=88.0)
    assert tables.present(run.frame()).loc[0, "schedule"] == "quick: reduced"
    assert "Schedule quick, reduced: iterations 10 (published 100)." in tables.caption(run.frame())
    run = make_run(iterations=100, profile="paper")
    run.row(W4A4, top1=88.0)
    assert tables.present(run.frame()).loc[0, "schedule"] == "paper: as published"
    assert "W4A4" in run.table().to_html() and "fair measure" in run.table().to_html()


def test_schemes_stand_apart_and_missing_published_values_are_told():
    run = make_run(paper="dsg")
    run.row(W4A4, top1=80.0, scheme="ptq")
    assert "scheme" not in tables.present(run.frame())
    run.row(W4A4, top1=85.0, scheme="qat")
    shown = tables.present(run.frame())
    assert shown["scheme"].tolist() == ["PTQ", "QAT"] and shown["top-1"].tolist() == ["80.00", "85.00"]
    told = "No published value to compare with: dsg is published for imagenet only."
    assert "published" not in shown and told in tables.caption(run.frame())
    frame = run.frame().assign(dataset="imagenet", model="resnet18")
    assert tables.present(frame)["published"].tolist() == ["39.90", "62.18"]
    assert told not in tables.caption(frame)


def test_markdown_escapes_and_aligns():
    table = tables.markdown(pd.DataFrame({"data": ["a|b"], "top-1": ["1.00"]}))
    assert table == "| data | top-1 |\n| --- | ---: |\n| a\\|b | 1.00 |\n"


def test_published_rows_have_sources_and_where_these_disagree_all_are_named():
    assert all(row.source and 2 <= row.weight_bits <= 8 and 2 <= row.activation_bits <= 8 for row in published.rows())
    own, quoted = published.find("gdfq", "cifar100", "resnet20_cifar100", 4, 4, scheme="qat")
    assert (own.top1, quoted.top1) == (63.58, 63.75)
    assert published.find("gdfq", "cifar100", "resnet20_cifar100", 4, 4, scheme="ptq") == []
    assert len(published.find("dsg", "imagenet", "resnet18", 4, 4)) == 2  # both schemes
    row = {"variant": "", "method": "gdfq", "dataset": "cifar100", "model": "resnet20_cifar100", "scheme": "qat"}
    beside = tables.beside(row | {"weight_bits": 4, "activation_bits": 4, "top1": 63.0})
    assert beside["published"] == 63.58 and "63.75 in SynQ paper table 1" in beside["published_source"]


def test_planning_knows_the_models_and_data_sets_that_the_library_knows():
    """Planning must not import torch, so it goes by the published rows: they name every model and data set there is."""
    assert {row.model: row.dataset for row in published.rows()} == {name: m.dataset for name, m in MODELS.items()}
    assert {row.dataset for row in published.rows()} == set(DATASETS)


def finished(results: Path, name: str, top1: float = 60, code: str = "code", time: str = "2026-01-01", **given) -> str:
    """A finished GDFQ run with a figure in a results folder; returns its identity."""
    row = {key: given.pop(key) for key in ("schedule",) if key in given}
    folder = results / "quick" / "gdfq" / name
    folder.mkdir(parents=True)
    run = make_run(out=folder, **given)
    run.row(W3A3, top1=top1, **row)
    run.figures.append("curve")
    (folder / "curve.png").write_bytes(name.encode())
    metrics = json.loads(run.save().read_text())
    metrics["provenance"]["finished"] = time
    depends = {"code": code, "teacher": "t", "data": "d"}
    metrics["run"] = {"id": name, "identity": name, "depends": depends, "seconds": 1}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "notebook.ipynb").touch()
    return name


def write(results: Path) -> None:
    collect.write(results, Profile("quick", "", ["cifar10"]), set(), {})


def test_a_table_never_mixes_versions(kit, tmp_path):
    """Of several codes and schedules, those of this call are shown; else of the present code; else the latest."""
    paper = profiles.paper("gdfq")
    now = collect.code_identity(paper.notebook)
    for seed in (0, 1):
        finished(tmp_path, f"old{seed}", 50, "other code", "2026-01-03", seed=seed, iterations=1)
        finished(tmp_path, f"now{seed}", 60 + seed, now, "2026-01-01", seed=seed, iterations=1)
        finished(tmp_path, f"long{seed}", 70, now, "2026-01-02", seed=seed, iterations=2)

    def shown(*present: str) -> list[float]:
        return list(collect.collect(tmp_path, ["quick"], [paper], set(present))["top1"])

    assert shown() == [70, 70]
    assert shown("now0") == [60, 61]
    assert shown("old0", "old1") == [50, 50]


@pytest.mark.parametrize("own", [{}, {"schedule": "as its card tells"}])
def test_rows_of_older_code_say_so_even_with_a_schedule_of_their_own(kit, tmp_path, own):
    finished(tmp_path, "a", code="other code", **own)
    write(tmp_path)
    (schedule,) = pd.read_csv(tmp_path / "results.csv")["schedule"]
    assert "(older code)" in schedule and schedule.startswith(own.get("schedule", "as published"))


def test_rows_and_figures_without_a_run_here_stay(kit, tmp_path):
    """A clone holds the published tables but not their runs: a call there replaces only the groups that it measures."""
    published_there = tmp_path / "project"
    model = {"model": "resnet20_cifar10"}
    finished(published_there, "ten", 61.123456789012345, **model)
    finished(published_there, "hundred", 31.5, dataset="cifar100", **model)
    write(published_there)
    clone = tmp_path / "clone"
    shutil.copytree(published_there, clone, ignore=shutil.ignore_patterns("quick"))
    shown = {path.relative_to(clone): path.read_text() for path in clone.glob("**/*.[mc][ds]*")}
    write(clone)
    assert {path: (clone / path).read_text() for path in shown} == shown  # every digit of every overview
    finished(clone, "again", 62, seed=1, **model)
    write(clone)
    rows = pd.read_csv(clone / "results.csv")[["dataset", "top1", "run"]]
    assert rows.to_numpy().tolist() == [["cifar10", 62, "again"], ["cifar100", 31.5, "hundred"]]
    table = pd.read_csv(clone / "tables" / "gdfq.csv")
    assert table[table["status"] == "run"]["top1"].tolist() == [62, 31.5]
    text = (clone / "README.md").read_text()
    figures = {path.name: path.read_bytes() for path in (clone / "figures").iterdir()}
    names = [f"gdfq-quick-{dataset}-resnet20_cifar10-curve.png" for dataset in ("cifar10", "cifar100")]
    assert figures == dict(zip(names, (b"again", b"hundred"), strict=True))
    assert all(f"(figures/{name})" in text for name in figures)
    page = (clone / "report.html").read_text()
    assert '<details id="hundred">' in page and "quick/gdfq/again/metrics.json" in page


@pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")
def test_git_sees_only_the_published_results(kit, tmp_path):
    """What an ordinary call writes is ignored; of a call into results/ the overviews are seen, the runs are not."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)

    def seen_after_a_call_into(folder: str | Path) -> set[str]:
        finished(tmp_path / folder, "a")
        write(tmp_path / folder)
        (tmp_path / folder / "smoke").mkdir()
        (tmp_path / folder / "smoke" / "README.md").touch()
        command = ["git", "ls-files", "--others", "--exclude-standard", "results"]
        return set(subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split())

    assert seen_after_a_call_into(Path(run_all.parser().get_default("results")).relative_to(ROOT)) == set()
    assert seen_after_a_call_into("results") == {
        "results/README.md",
        "results/results.csv",
        "results/tables/gdfq.csv",
        "results/tables/gdfq.md",
        "results/figures/gdfq-quick-cifar10-resnet20_cifar10-curve.png",
    }


def test_unfinished_runs_are_no_results(kit, tmp_path):
    finished(tmp_path, "a.unfinished")
    (tmp_path / "quick" / "gdfq" / finished(tmp_path, "b") / "notebook.ipynb").unlink()
    assert collect.collect(tmp_path, ["quick"], [profiles.paper("gdfq")], set()).empty


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DFQ_DATA", raising=False)
    assert preflight.missing("cifar10", "resnet20_cifar10") == ""
    assert "needs the test images of imagenet" in preflight.missing("imagenet", "resnet18")
    assert "00_teachers.ipynb" in preflight.missing("cifar100", "resnet34_cifar100")
    (tmp_path / "imagenet").mkdir()
    monkeypatch.setenv("DFQ_DATA", str(tmp_path))
    assert preflight.missing("imagenet", "resnet18") == "" and preflight.downloads("resnet18")
