"""What a run leaves behind, and how it becomes tables beside the published values."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from dfqlib.data.image_sets import DATASETS, load_test
from dfqlib.errors import UserError
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import MODELS
from dfqlib.notebook.run import Run, plain
from dfqlib.papers import profiles, published
from dfqlib.papers.profiles import Profile
from dfqlib.report import collect, tables
from dfqlib.runner import preflight

PARAMETERS = {
    "profile": "quick",
    "dataset": "cifar10",
    "model": "resnet20_cifar10",
    "seed": 0,
    "device": "cpu",
    "out": "",
}


def make_run(out: Path | str = "", seed: int = 0, fp32_top1: float = 93.0, **parameters) -> Run:
    return Run("gdfq", PARAMETERS | {"seed": seed} | parameters, out=out, fp32_top1=fp32_top1)


def test_rows_are_filled_from_the_run():
    run = make_run(seed=3)
    run.row(4, 4, top1=88.0, top1_best=89.0, seconds=12.5, images=1000)
    run.row(3, 3, top1=70, variant="without L_BNS")
    first, second = run.rows
    expected = {"method": "gdfq", "scheme": "qat", "dataset": "cifar10", "model": "resnet20_cifar10", "seed": 3}
    assert {name: first[name] for name in expected} == expected
    assert first["fp32_top1"] == 93.0 and first["top1_best"] == 89.0 and first["images"] == 1000
    assert second["top1_best"] == 70  # the only evaluation is the best one


@pytest.mark.parametrize("top1", [float("nan"), -1.0, 100.5, None])
def test_a_top1_that_is_no_percentage_leaves_no_row(top1):
    run = make_run()
    with pytest.raises(ValueError, match="is not a percentage"):
        run.row(4, 4, top1=top1)
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
    run.row(4, 4, top1=88.0)
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


def test_unknown_paper_missing_folder_and_impossible_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match="batch=0 is out of range; allowed: a number from 2"):
        make_run(batch=0)
    with pytest.raises(UserError, match=r"iterations=2\.5 is not a whole number"):
        make_run(iterations=2.5)
    with pytest.raises(UserError, match="did you mean 'gdfq'"):
        Run("gdqf", PARAMETERS)
    with pytest.raises(UserError, match="is not a folder"):
        make_run(out=tmp_path / "none")


def test_plain_keeps_what_json_knows():
    value = {1: (np.float32(0.5), torch.tensor(2)), "path": Path("a"), "flag": True, "none": None}
    assert plain(value) == {"1": [0.5, 2], "path": "a", "flag": True, "none": None}


def test_table_shows_ours_beside_the_published():
    frames = []
    for seed, top1 in ((0, 88.0), (1, 90.0)):
        run = make_run(seed=seed)
        run.row(4, 4, top1=top1, top1_best=top1 + 1, seconds=10)
        run.row(4, 4, top1=top1 - 20, variant="without L_BNS")
        run.row(top1=93.0)
        frames.append(run.frame())
    shown = tables.present(pd.concat(frames, ignore_index=True))
    line = shown.iloc[0]
    # 89 is our mean, 90.11 the published value, 93 our teacher, 93.89 theirs.
    expected = {
        "bits": "W4A4",
        "top-1": "89.00 ± 1.41",
        "best": "90.00",
        "published": "90.11",
        "difference": "-1.11",
        "teacher": "93.00",
        "drop": "4.00",
        "published drop": "3.78",
        "seeds": "0 1",
        "seconds": "10",
    }
    assert {name: line[name] for name in expected} == expected
    assert shown.iloc[1]["published"] == "" and shown.iloc[1]["variant"] == "without L_BNS"
    assert shown.iloc[2]["bits"] == "FP32" and shown.iloc[2]["published"] == "93.89"


def test_reduced_schedule_is_labelled(kit):
    run = make_run(iterations=10)
    run.row(4, 4, top1=88.0)
    assert tables.present(run.frame()).loc[0, "schedule"] == "quick: reduced"
    assert "Schedule quick, reduced: iterations 10 (published 100)." in tables.caption(run.frame())
    run = make_run(iterations=100, profile="paper")
    run.row(4, 4, top1=88.0)
    assert tables.present(run.frame()).loc[0, "schedule"] == "paper: as published"


def test_schemes_stand_apart_and_missing_published_values_are_told():
    run = Run("dsg", PARAMETERS, fp32_top1=93.0)
    run.row(4, 4, top1=80.0, scheme="ptq")
    assert "scheme" not in tables.present(run.frame())
    run.row(4, 4, top1=85.0, scheme="qat")
    shown = tables.present(run.frame())
    assert shown["scheme"].tolist() == ["PTQ", "QAT"] and shown["top-1"].tolist() == ["80.00", "85.00"]
    told = "No published value stands beside these rows: dsg is published for imagenet only."
    assert "published" not in shown and told in tables.caption(run.frame())
    frame = run.frame().assign(dataset="imagenet", model="resnet18")
    assert tables.present(frame)["published"].tolist() == ["39.90", "62.18"]
    assert told not in tables.caption(frame)


def test_table_of_a_notebook_is_html_with_its_caption():
    run = make_run()
    run.row(4.2, 8, top1=88.0, variant="mixed precision")
    html = run.table().to_html()
    assert "W4.2A8" in html and "fair measure" in html


def test_markdown_escapes_and_aligns():
    table = tables.markdown(pd.DataFrame({"data": ["a|b"], "top-1": ["1.00"]}))
    assert table == "| data | top-1 |\n| --- | ---: |\n| a\\|b | 1.00 |\n"


def test_published_rows_are_those_of_the_file():
    with open(Path(published.__file__).with_name("published.csv"), encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(published.rows()) == len(lines) == 70
    assert all(row.source and 2 <= row.weight_bits <= 8 and 2 <= row.activation_bits <= 8 for row in published.rows())
    own, quoted = published.find("gdfq", "cifar100", "resnet20_cifar100", 4, 4, "qat")
    assert (own.top1, quoted.top1) == (63.58, 63.75)
    assert published.find("gdfq", "cifar100", "resnet20_cifar100", 4, 4, "ptq") == []
    assert len(published.find("dsg", "imagenet", "resnet18", 4, 4)) == 2  # both schemes


def test_where_sources_disagree_both_are_named():
    row = {"variant": "", "method": "gdfq", "dataset": "cifar100", "model": "resnet20_cifar100", "scheme": "qat"}
    beside = tables.beside(row | {"weight_bits": 4, "activation_bits": 4})
    assert beside["published"] == 63.58 and "63.75 in SynQ paper table 1" in beside["published_source"]


def test_planning_knows_the_models_and_data_sets_that_the_library_knows():
    """Planning must not import torch, so it goes by the published rows: they name every model and data set there is."""
    assert {row.model for row in published.rows()} == set(MODELS)
    assert {row.dataset for row in published.rows()} == set(DATASETS)
    for row in published.rows():
        assert MODELS[row.model].dataset == row.dataset


def finished(results: Path, name: str, seed: int, top1: float, code: str, finished: str, **parameters) -> str:
    """A finished GDFQ run in a results folder; returns its identity."""
    folder = results / "quick" / "gdfq" / name
    folder.mkdir(parents=True)
    run = make_run(out=folder, seed=seed, **parameters)
    run.row(3, 3, top1=top1)
    metrics = json.loads(run.save().read_text())
    metrics["provenance"]["finished"] = finished
    metrics["run"] = {
        "id": name,
        "identity": name,
        "depends": {"code": code, "teacher": "t", "data": "d"},
        "seconds": 1,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "notebook.ipynb").touch()
    return name


def test_a_table_never_mixes_versions(kit, tmp_path):
    """Of several codes and schedules, those of this call are shown; else of the present code; else the latest."""
    paper = profiles.paper("gdfq")
    now = collect.code_identity(paper.notebook)
    for seed in (0, 1):
        finished(tmp_path, f"old{seed}", seed, 50, "other code", "2026-01-03", iterations=1)
        finished(tmp_path, f"now{seed}", seed, 60 + seed, now, "2026-01-01", iterations=1)
        finished(tmp_path, f"long{seed}", seed, 70, now, "2026-01-02", iterations=2)

    def shown(*present: str) -> list[float]:
        return list(collect.collect(tmp_path, ["quick"], [paper], set(present))["top1"])

    assert shown() == [70, 70]
    assert shown("now0") == [60, 61]
    assert shown("old0", "old1") == [50, 50]
    rows = collect.collect(tmp_path, ["quick"], [paper], {"old0"})
    assert all("(older code)" in schedule for schedule in rows["schedule"])


def test_tables_of_papers_that_did_not_run_stay(kit, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "zeroq.md").write_text("## ZeroQ\n\n![f](../figures/f.png)\n")
    finished(tmp_path, "a", 0, 60, "code", "2026-01-01")
    written = collect.write(tmp_path, Profile("quick", "", ["cifar10"]), set(), {})
    assert list(written) == ["gdfq"]
    text = (tmp_path / "README.md").read_text()
    assert "![f](figures/f.png)" in text and "| gdfq | resnet20_cifar10 | W3A3 |" in text
    assert (tmp_path / "tables" / "gdfq.csv").is_file()


def test_unfinished_runs_are_no_results(kit, tmp_path):
    finished(tmp_path, "a.unfinished", 0, 60, "code", "2026-01-01")
    finished(tmp_path, "b", 0, 60, "code", "2026-01-01")
    (tmp_path / "quick" / "gdfq" / "b" / "notebook.ipynb").unlink()
    assert collect.collect(tmp_path, ["quick"], [profiles.paper("gdfq")], set()).empty


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("DFQ_DATA", raising=False)
    assert preflight.missing("cifar10", "resnet20_cifar10") == ""
    assert "needs the test images of imagenet" in preflight.missing("imagenet", "resnet18")
    assert "00_teachers.ipynb" in preflight.missing("cifar100", "resnet34_cifar100")
    (tmp_path / "imagenet").mkdir()
    monkeypatch.setenv("DFQ_DATA", str(tmp_path))
    assert preflight.missing("imagenet", "resnet18") == "" and preflight.downloads("resnet18")
