"""What a run leaves behind, and how it becomes tables beside the published values."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images

import run_all
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import DATASETS, load_test
from dfqlib.errors import UserError
from dfqlib.files import METRICS_FORMAT
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import MODELS
from dfqlib.notebook.run import Run
from dfqlib.papers import profiles, published
from dfqlib.papers.profiles import Profile
from dfqlib.report import collect, curve, reproduced, tables
from dfqlib.runner import preflight
from dfqlib.scores import Score

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
            self.weight = torch.nn.Parameter(2 * torch.eye(10)[3])

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
    shown = tables.present(run.frame()).shown
    assert shown[["top-1", "over seeds"]].to_numpy().tolist() == [["90.00", ""], ["84.00", "1.41 (2)"]]
    assert json.loads(run.save().read_text())["figures"] == ["curve"]


def test_mixed_precision_is_named_by_its_mean_bits():
    run = make_run()
    run.row((2.49, 8), top1=80.0)
    assert tables.present(run.frame()).shown["bits"].tolist() == ["W2.49A8"]
    with pytest.raises(ValueError, match="give means"):
        run.row(BitWidths({"conv1": 2, "conv2": 4}, 8), top1=80.0)


def test_unknown_paper_and_missing_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'gdfq'"):
        make_run(paper="gdqf")
    with pytest.raises(UserError, match="is not a folder"):
        make_run(out=tmp_path / "none")


def scores(*shares: float) -> list[Score]:
    """Scores on 100 images, right on the first so many."""
    return [Score([index < share for index in range(100)], top5=100) for share in shares]


def test_table_shows_ours_beside_the_published_with_its_doubt():
    frames = []
    for seed, (top1, teacher) in ((0, scores(88, 93)), (1, scores(90, 93))):
        run = make_run(seed=seed)
        run.fp32_top1 = teacher
        run.row(W4A4, top1=top1, top1_best=top1 + 1, seconds=10)
        run.row(W4A4, top1=scores(70)[0], variant="without L_BNS")
        frames.append(run.frame())
    table = tables.present(pd.concat(frames, ignore_index=True))
    # 89 is our mean; of the drop, 5 and 3 images differ: 2.18 and 1.71 on the same images, 1 of the two seeds.
    expected = {"bits": "W4A4", "top-1": "89.00 ± 3.12", "drop": "4.00 ± 2.18", "published drop": "3.78"}
    expected |= {"over seeds": "1.41 (2)", "seconds": "10"}
    assert table.shown.iloc[0][list(expected)].to_dict() == expected
    assert table.shown.iloc[1]["published drop"] == "" and table.shown.iloc[1]["variant"] == "without L_BNS"
    assert "seeds 0 1" in table.caption and "Teacher: 93.00 %" in table.caption
    assert "gdfq W4A4 90.11 (SynQ paper table 1)" in table.caption
    assert len(table.shown.columns) <= tables.MAX_COLUMNS and not {"method", "model", "data"} & set(table.shown)


def test_a_student_that_diverged_has_a_line():
    run = make_run()
    run.row(W4A4, top1=scores(88)[0])
    run.row(W3A3, top1=Score([False], diverged="student 'W3A3' diverged: KL"))
    assert run.rows[1]["diverged"] == "student 'W3A3' diverged: KL"
    assert tables.present(run.frame()).shown["top-1"].tolist() == ["88.00 ± 3.25", "diverged"]


def test_a_seed_that_diverged_is_not_counted_among_those_of_the_spread():
    run = make_run()
    run.fp32_top1 = scores(93)[0]
    for seed, score in enumerate([*scores(88, 90), Score([False], diverged="KL")]):
        run.row(W4A4, top1=score, seed=seed)
    shown = tables.present(run.frame()).shown[["over seeds", "drop"]]
    assert shown.to_numpy().tolist() == [["1.41 (2), 1 diverged", "4.00 ± 2.18"]]  # as of the two others alone


def test_what_this_machine_measured_stands_beside_the_project_with_the_difference():
    ours, theirs = make_run(), make_run()
    ours.row(W4A4, top1=scores(88)[0])
    ours.row(W3A3, top1=70)
    theirs.row(W4A4, top1=scores(84)[0])
    rows = [run.frame().assign(images=100) for run in (ours, theirs)]
    assert tables.present(*rows).shown["project"].tolist() == ["84.00 (+4.00 ± 1.96)", ""]
    seeds = [pd.concat([each, each.assign(seed=1)], ignore_index=True) for each in rows]
    assert tables.present(*seeds).shown["project"].tolist() == ["84.00 (+4.00 ± 1.96)", ""]  # on the same images
    seeds[1].loc[1, "top1"] = float("nan")  # theirs diverged: the other seed remains
    assert tables.present(*seeds).shown["project"].tolist() == ["84.00 (+4.00 ± 1.96)", ""]
    older = rows[1].drop(columns="correct")  # before runs kept which images were right
    assert tables.present(rows[0], older).shown["project"].tolist() == ["84.00 (+4.00)", ""]


def test_departures_from_the_published_schedule_are_told_once(kit):
    run = make_run(iterations=10)
    run.row(W4A4, top1=88.0)
    assert tables.present(run.frame()).caption.count("reduced") == 1
    assert "Schedule quick, reduced: iterations 10 (published 100)." in tables.present(run.frame()).caption
    run = make_run(iterations=100, profile="paper")
    run.row(W4A4, top1=88.0)
    assert "Schedule paper, as published." in run.table().to_html() and "fair measure" in run.table().to_html()


@pytest.mark.parametrize(("iterations", "batch", "share"), [(800, 100, "0.5"), (79999, 200, "100"), (9**6, 99, "329")])
def test_rates_and_weights_that_depart_are_retuned_and_images_seen_a_share(iterations, batch, share):
    own = {"iterations": iterations, "batch": batch, "student_lr": 5e-6, "dataset": "cifar10"}
    told = profiles.describe_schedule("gdfq", own)
    seen = f"reduced ({share} % of the published images seen), retuned: iterations {iterations} (published 80000)"
    assert told.startswith(seen) and tables.short(told) == "reduced, retuned"


def test_a_rehearsal_shows_no_published_numbers():
    run = make_run(profile="smoke")
    run.row(W4A4, top1=88.0)
    assert "published drop" not in tables.present(run.frame()).shown


def test_a_comparison_is_a_grid():
    run = make_run(paper="compare")
    for width, source, use, top1 in [
        (W4A4, "zeroq", "ranges", 80),
        (W4A4, "dsg", "ranges", 70),
        (W3A3, "zeroq", "gdfq", 60),
    ]:
        run.row(width, top1=top1, method="compare", variant=f"{source}: {use}", ranges=source)
    shown = tables.present(run.frame()).shown
    assert list(shown.columns) == ["source", "calibration", "W4A4 ranges", "W3A3 gdfq"]
    assert shown.to_numpy().tolist() == [["zeroq", "published", "80.0", "60.0"], ["dsg", "published", "70.0", ""]]
    rows = pd.concat([run.frame().assign(**own) for own in ({"data": "cifar10-2k"}, {"data": "cifar10", "top1": None})])
    two_sizes = tables.present(rows.reset_index(drop=True))
    assert two_sizes.shown.iloc[2].tolist() == ["zeroq", "published", "cifar10", "diverged", "diverged"]
    assert two_sizes.rows[2] == [3, 5] and "data" not in two_sizes.caption


def test_schemes_stand_apart_and_missing_published_values_are_told():
    run = make_run(paper="dsg")
    run.row(W4A4, top1=80.0, scheme="ptq")
    assert "scheme" not in tables.present(run.frame()).shown
    run.row(W4A4, top1=85.0, scheme="qat")
    shown, caption, _ = tables.present(run.frame())
    assert shown["scheme"].tolist() == ["PTQ", "QAT"] and shown["top-1"].tolist() == ["80.00", "85.00"]
    told = "No published value to compare with: dsg is published for imagenet only."
    assert "published drop" not in shown and told in caption
    frame = run.frame().assign(dataset="imagenet", model="resnet18")
    assert tables.present(frame).shown["published drop"].tolist() == ["31.57", "9.29"]
    assert told not in tables.present(frame).caption


def test_markdown_escapes_and_aligns():
    table = tables.markdown(pd.DataFrame({"data": ["a|b"], "top-1": ["1.00"]}))
    assert table == "| data | top-1 |\n| --- | ---: |\n| a\\|b | 1.00 |\n"


def test_published_rows_have_sources_and_notebooks_and_where_these_disagree_all_are_named():
    assert all(row.source and 2 <= row.weight_bits <= 8 and 2 <= row.activation_bits <= 8 for row in published.rows())
    homes = {method: paper.datasets for paper in profiles.load()[1].values() for method in paper.methods}
    assert all(row.dataset in (homes[row.method] or [row.dataset]) for row in published.rows())  # and so can be run
    own, quoted = published.find("gdfq", "cifar100", "resnet20_cifar100", 4, 4, scheme="qat")
    assert (own.top1, quoted.top1) == (63.58, 63.75)
    assert published.find("gdfq", "cifar100", "resnet20_cifar100", 4, 4, scheme="ptq") == []
    assert len(published.find("dsg", "imagenet", "resnet18", 4, 4)) == 2  # both schemes
    row = {"variant": "", "method": "gdfq", "dataset": "cifar100", "model": "resnet20_cifar100", "scheme": "qat"}
    beside = tables.beside(row | {"profile": "quick", "weight_bits": 4, "activation_bits": 4, "top1": 63.0})
    assert beside["published"] == 63.58 and "63.75 (SynQ paper table 1)" in beside["published_source"]


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


QUICK = Profile("quick", "", ["cifar10"])


def write(results: Path) -> None:
    collect.write(results, QUICK, (), {})


def test_a_table_never_mixes_versions(kit, tmp_path):
    """Of several codes and schedules, those of this call are shown; else the latest."""
    for seed in (0, 1):
        finished(tmp_path, f"old{seed}", 50, "other code", "2026-01-01", seed=seed, iterations=1)
        finished(tmp_path, f"long{seed}", 70, time="2026-01-02", seed=seed, iterations=2)

    def shown(*present: str) -> list[float]:
        return list(collect.collect(tmp_path, QUICK, present)["top1"])

    assert shown() == [70, 70]
    assert shown("old0", "old1") == [50, 50]


@pytest.mark.parametrize("own", [{}, {"schedule": "as its card tells"}])
def test_rows_of_older_code_say_so_even_with_a_schedule_of_their_own(kit, tmp_path, own):
    finished(tmp_path, "a", code="other code", time="2026-01-01", **own)
    finished(tmp_path, "b", time="2026-01-02", dataset="cifar100")
    write(tmp_path)
    old, new = pd.read_csv(tmp_path / "results.csv")["schedule"]
    assert "(older code)" in old and old.startswith(own.get("schedule", "as published")) and "older" not in new


@pytest.mark.parametrize(("again", "standing"), [(60, [0, 1]), (60.01, [0])])
def test_seeds_of_older_code_stand_where_the_latest_code_gave_the_same_for_another_seed(kit, tmp_path, again, standing):
    for seed in (0, 1):
        finished(tmp_path, f"old{seed}", 60, "other code", seed=seed)
    finished(tmp_path, "new0", again, time="2026-01-02", seed=0)
    rows = collect.collect(tmp_path, QUICK, ())
    assert list(rows["seed"]) == standing and not rows["schedule"].str.contains("older").any()
    assert rows["run"].iloc[0] == "new0"


def test_a_teacher_that_scores_the_same_says_nothing_of_older_code(kit, tmp_path):
    for name, code, seed in (("old0", "other code", 0), ("old1", "other code", 1), ("new0", "code", 0)):
        finished(tmp_path, name, code=code, time=f"2026-01-0{1 + (code == 'code')}", seed=seed)
        file = tmp_path / "quick" / "gdfq" / name / "metrics.json"
        file.write_text(file.read_text().replace('"weight_bits": 3', '"weight_bits": 32'))
    assert list(collect.collect(tmp_path, QUICK, ())["run"]) == ["new0"]


def test_all_overviews_are_made_from_the_measurements_alone(kit, tmp_path):
    """A clone holds each run's metrics.json and no notebook: the same tables, and a new seed stands beside."""
    measured_there, clone = tmp_path / "project", tmp_path / "clone"
    finished(measured_there, "ten", 61.123456789012345)
    finished(measured_there, "hundred", 31.5, dataset="cifar100")
    write(measured_there)
    shutil.copytree(measured_there, clone, ignore=shutil.ignore_patterns("notebook.ipynb", "curve.png", "tables"))
    write(clone)
    for path in measured_there.glob("**/*.[mc][ds]*"):
        assert (clone / path.relative_to(measured_there)).read_text() == path.read_text()
    finished(clone, "again", 62, time="2026-01-02", seed=1)
    write(clone)
    rows = pd.read_csv(clone / "results.csv")[["dataset", "top1", "run"]]
    assert rows.to_numpy().tolist() == [
        ["cifar10", 61.123456789012345, "ten"],
        ["cifar10", 62, "again"],
        ["cifar100", 31.5, "hundred"],
    ]
    text = (clone / "tables" / "gdfq.md").read_text()
    figures = {path.name: path.read_bytes() for path in (clone / "figures").iterdir()}
    names = [f"gdfq-quick-{dataset}-resnet20_cifar10-curve.png" for dataset in ("cifar10", "cifar100")]
    assert figures == dict(zip(names, (b"ten", b"hundred"), strict=True))
    assert all(f"(../figures/{name})" in text for name in figures)
    page = (clone / "report.html").read_text()
    assert '<details id="hundred">' in page and "quick/gdfq/again/metrics.json" in page


def test_the_published_overviews_are_those_of_the_committed_measurements(tmp_path):
    """What results/ and README.md show is made again from results/*/*/*/metrics.json without a difference."""
    results = tmp_path / "results"
    runs = [path for path in (ROOT / "results").glob("*/*/*/metrics.json") if "local" not in path.parts]
    for path in runs:
        copy = results / path.relative_to(ROOT / "results")
        copy.parent.mkdir(parents=True)
        shutil.copyfile(path, copy)
    shutil.copytree(ROOT / "results" / "figures", results / "figures")
    shutil.copy(ROOT / "README.md", tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "PROJECT", results)
        write(results)
    assert runs
    made = [path.relative_to(tmp_path) for path in (results, *results.glob("tables")) for path in path.glob("*.[mc]*")]
    for name in ("README.md", *made):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name
    for name in ("reproduced.png", "curve.png"):
        assert compare_images(ROOT / "results" / name, results / name, tol=1) is None


def test_every_published_cell_is_reached_near_short_or_not_run():
    frames = []
    measured = [(W4A4, "gdfq", 90), (W3A3, "gdfq", 72), (W4A4, "qimera", 90), (W3A3, "qimera", 60)]
    for width, method, right in measured:
        run = make_run(paper=method)
        run.fp32_top1 = scores(93)[0]
        run.row(width, top1=scores(right)[0])
        frames.append(run.frame())
    cells = reproduced.cells(pd.concat(frames)).set_index(["method", "dataset", "weight_bits"])
    states = {("gdfq", 4): "reached", ("qimera", 4): "near", ("gdfq", 3): "within error", ("qimera", 3): "short"}
    states |= {("hast", 3): "not run"}
    assert {(method, bits): cells.loc[(method, "cifar10", bits), "state"] for method, bits in states} == states
    two_papers = cells.loc[("hast", "cifar10", 3)]  # that print different numbers
    assert len(two_papers["sources"]) == 2 and two_papers["published_drop"] == pytest.approx(93.89 - 88.34)
    told = reproduced.sentence(cells.reset_index())
    expected = f"1 of {len(cells)} with the published calibration, 1 more within half a point, "
    expected += "1 more within the 95 % interval, 1 short by"
    assert told.startswith(f"Published CIFAR cells reached: {expected}") and f"{len(cells) - 4} not run" in told
    both = pd.concat([*frames, frames[1].assign(calibration="corrected", top1=80, drop_error=1)])
    told = reproduced.sentence(reproduced.cells(both))
    assert f"1 of {len(cells)} with the corrected calibration" in told


def test_the_curve_has_a_point_for_each_profile_and_calibration_of_a_published_cell():
    frames = []
    for profile, calibration, seconds, right in [("quick", "corrected", 60, 85), ("fast", "corrected", 600, 91)]:
        run = make_run(profile=profile)
        run.row(W4A4, top1=scores(right)[0], calibration=calibration, seconds=seconds)
        run.row(W4A4, top1=70.0, variant="ablated", seconds=5)  # no published cell
        run.row(W3A3, top1=70.0)  # without a time
        frames.append(run.frame())
    rows = pd.concat(frames, ignore_index=True)
    points = curve.points(rows, reproduced.cells(rows))
    assert points[["profile", "seconds", "drop"]].to_numpy().tolist() == [["quick", 60, 8], ["fast", 600, 2]]
    assert points["published_drop"].tolist() == pytest.approx([3.78, 3.78]) and len(curve.picture(points).axes) == 2
    assert curve.points(rows.iloc[:0], reproduced.cells(rows)).empty


@pytest.mark.parametrize(("images", "told"), [(2000, ", 2,000 images"), (10_000, "")])
def test_of_several_sets_of_test_images_the_largest_counts(images, told):
    run = make_run()
    run.row(W4A4, top1=88.0)
    part = {"data": "cifar10, 10 per class", "images": 100, "top1": 60.0}
    rows = pd.concat([run.frame().assign(**own) for own in (part, {"data": "cifar10-2k", "images": images})])
    cells = reproduced.cells(rows).query("method == 'gdfq' and dataset == 'cifar10' and weight_bits == 4")
    assert cells["drop"].tolist() == [5.0]
    assert reproduced.present(cells)["schedule"].str.endswith(f"seeds 0{told}").all()


def test_measurements_of_a_newer_kit_are_refused_and_older_ones_read(kit, tmp_path):
    finished(tmp_path, "a")
    path = tmp_path / "quick" / "gdfq" / "a" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in metrics.items() if name != "format"}))
    assert len(collect.collect(tmp_path, QUICK, ())) == 1
    path.write_text(json.dumps(metrics | {"format": METRICS_FORMAT + 1}))
    with pytest.raises(UserError, match=r"a/metrics\.json has format \d+, of a newer dfqlib"):
        collect.collect(tmp_path, QUICK, ())


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("nowhere", 2)])
def test_the_report_s_command_makes_no_folder(tmp_path, monkeypatch, argument, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dfqlib.report", run_name="__main__")
    assert ended.value.code == code and not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("git") is None, reason="no git on this machine")
def test_git_sees_only_the_published_results(kit, tmp_path):
    """What an ordinary call writes is ignored; of a call into results/ overviews and measurements are seen."""
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
        "results/tables/zeroq.md",
        "results/reproduced.csv",
        "results/reproduced.png",
        "results/quick/gdfq/a/metrics.json",
        "results/figures/gdfq-quick-cifar10-resnet20_cifar10-curve.png",
    }


def test_unfinished_runs_are_no_results(kit, tmp_path):
    finished(tmp_path, "a.unfinished")
    assert collect.collect(tmp_path, QUICK, ()).empty


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DFQ_DATA", raising=False)
    assert preflight.missing("cifar10", "resnet20_cifar10") == ""
    assert "needs the test images of imagenet" in preflight.missing("imagenet", "resnet18")
    assert "00_teachers.ipynb" in preflight.missing("cifar100", "resnet34_cifar100")
    (tmp_path / "imagenet").mkdir()
    monkeypatch.setenv("DFQ_DATA", str(tmp_path))
    assert preflight.missing("imagenet", "resnet18") == "" and preflight.downloads("resnet18")
