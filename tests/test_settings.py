"""What is typed is checked once, before any work, in one sentence that names the parameter."""

import json
import math
import re
import typing

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from dfqlib.bits import BitWidths
from dfqlib.errors import UserError
from dfqlib.notebook.start import start
from dfqlib.papers.parameters import NOTEBOOKS
from dfqlib.runner.plan import Selection, plan

NUMBERS = [
    pytest.param(key, name, kind, id=f"{key}-{name}")
    for key, settings in NOTEBOOKS.items()
    for name, kind in settings.kinds().items()
    if {kind, *typing.get_args(kind)} & {int, float}
]


def test_bit_widths_are_read_in_either_case_and_printed_as_in_the_papers():
    assert BitWidths.parse("w4a8") == BitWidths.parse("W4A8") == BitWidths(4, np.int64(8))
    widths = [BitWidths(4, 8), BitWidths(None, None), BitWidths(None, 8)]
    assert list(map(str, widths)) == ["W4A8", "FP32", "W32A8"]
    assert BitWidths({"conv1": 4, "conv2": None}, 8).weight == {"conv1": 4, "conv2": None}


@pytest.mark.parametrize("width", [1, 9, 4.0, "4", True])
def test_widths_that_no_quantizer_has_are_refused(width):
    with pytest.raises(UserError, match=r"^activation bits=.* is not a supported bit width; allowed: whole number"):
        BitWidths(4, width)
    with pytest.raises(UserError, match=r"^weight bits\['conv1'\]="):
        BitWidths({"conv1": width}, 4)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("bits", "w4a4", "bits='w4a4' is not a list; allowed: a list such as ['W4A4']."),
        ("bits", ["w4a4", "w9a4"], "bits='w9a4' is not supported; allowed: names such as 'W4A8', 2 to 8 bits each."),
        ("bits", [], "bits=[] is empty; allowed: a list such as ['W4A4']."),
        ("batch", "64", "batch='64' is not a whole number; allowed: a whole number from 2 to "),
        ("batch", 64.0, "batch=64.0 is not a whole number"),
        ("kl_mean_over_classes", "no", "kl_mean_over_classes='no' is of another type; allowed: True or False."),
        ("decay", "linear", "decay='linear' is unknown; allowed: step, late_step, cosine, constant."),
        ("profile", "Quick", "profile='Quick' is unknown (did you mean 'quick'?); allowed: smoke, quick, fast, paper."),
        ("device", "gpu", "device='gpu' is unknown; allowed: auto, cpu, cuda, cuda:<number>, mps."),
        ("precision", "half", "precision='half' is unknown; allowed: float32, bfloat16, auto."),
        ("evaluations", 0, "evaluations=0 is out of range; allowed: a whole number from 1 to "),
        ("student_lr", math.nan, "student_lr=nan is out of range"),
        ("train_from", 10**8, "observe_iterations=800, train_from=100000000, iterations=80000 leave nothing"),
        ("data_folder", "/does/not/exist", "data_folder='/does/not/exist' is not a folder"),
        ("model", "resnet20", "model='resnet20' is unknown (did you mean 'resnet20_cifar10'?)"),
    ],
)
def test_a_notebook_refuses_what_it_cannot_run_with(name, value, sentence):
    with pytest.raises(UserError, match="^" + re.escape(sentence)) as refused:
        start("gdfq", {name: value})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"bits": ["w9a4"]}, "bits='w9a4' is not supported"),
        ({"profile": "Quick"}, "profile='Quick' is unknown (did you mean 'quick'?)"),
        ({"models": ["resnet20"]}, "models='resnet20' is unknown (did you mean 'resnet20_cifar10'?)"),
        ({"batch": "many"}, "batch='many' is not a whole number"),
        ({"kl_mean_over_classes": "no"}, "kl_mean_over_classes='no' is of another type"),
        ({"device": "gpu"}, "device='gpu' is unknown"),
        ({"student_lr": "nan"}, "student_lr='nan' is not a number"),
        ({"student_lr": "1" * 400}, f"student_lr={'1' * 400} is not a number"),
        ({"student_lr": "{[]: 1}"}, "student_lr='{[]: 1}' is not a number"),
        ({"kl_weight": "0", "ce_weight": "0"}, "kl_weight and ce_weight are both 0"),
    ],
)
def test_a_plan_refuses_the_same(asked, sentence):
    asked = asked if asked.keys() <= {"bits", "profile", "models"} else {"settings": asked}
    with pytest.raises(UserError, match="^" + re.escape(sentence)):
        plan(Selection(papers=["gdfq"], **asked))


@pytest.mark.parametrize(("key", "name", "kind"), NUMBERS)
def test_limits_hold_at_the_edge(key, name, kind):
    settings = NOTEBOOKS[key]
    limits, listed = settings.__dataclass_fields__[name].metadata, typing.get_origin(kind) is list
    for limit, beyond in ((limits["low"], -math.inf), (limits["high"], math.inf)):
        real = float in (kind, *typing.get_args(kind))
        outside = math.nextafter(limit, beyond) if real else limit + (1 if beyond > 0 else -1)
        inside, outside = ([value] * 2 if listed else value for value in (limit, outside))
        assert settings.parse(name, repr(inside)) == inside
        with pytest.raises(UserError, match=rf"^{name}=.* is out of range; allowed: a "):
            settings.of({name: outside})


@pytest.mark.parametrize("key", NOTEBOOKS)
def test_settings_survive_json(key):
    settings = NOTEBOOKS[key]()
    assert type(settings).of(json.loads(json.dumps(settings.values()))) == settings


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("bits", "w4a4,W3A3", [BitWidths(4, 4), BitWidths(3, 3)]),
        ("ablation_iterations", "28", 28),
        ("student_lr", "1e-3", 1e-3),
        ("kl_mean_over_classes", "True", True),
        ("data_folder", "12", "12"),
    ],
)
def test_text_is_read_as_the_parameter_is_declared(name, text, value):
    assert NOTEBOOKS["gdfq"].parse(name, text) == value


def test_a_notebook_starts_with_all_that_it_needs(capsys):
    teacher, test, run, settings = start("zeroq", {"bits": ["w4a8"], "per_class": 2, "name of a notebook's own": 1})
    assert capsys.readouterr().out == f"resnet20_cifar10: {run.fp32_top1:.2f} % of {test.name} (20 images)\n"
    assert teacher.name == "resnet20_cifar10" and settings.bits == [BitWidths(4, 8)] and settings.images == 32
    assert run.parameters["bits"] == ["W4A8"] and run.parameters["synthesis_iterations"] == 500


def test_a_refusal_in_ipython_is_its_sentence_without_a_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell(config=Config(HistoryManager={"enabled": False}))
    shell.run_cell("from dfqlib.errors import check_range; check_range('p', 2, 0, 1)")
    assert capsys.readouterr().out == "UserError: p=2 is out of range; allowed: a number from 0 to 1.\n"
