"""What makes a run another one: its code, parameters, weights, images and torch, and nothing that only people read."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from stub_kit import write_kit

from dfqlib import places
from dfqlib.errors import UserError
from dfqlib.runner import identity, plan

ZEROQ = '''"""Text."""
from ..models import top1
from . import loss
from dfqlib.report import tables
'''
LOSS = """
def f(x):
    if not x:
        raise ValueError(f"no {x!r}: " + "why")
    print("x", f"is {x}")
"""
EVALUATE = '''
def top1():
    """Doc."""
    import dfqlib.data.sets
    return dfqlib.data.sets.x["key"]
'''
TREE = {
    "__init__.py": '"""The kit."""\n__version__ = "1"\n',
    "methods/__init__.py": "",
    "methods/zeroq.py": ZEROQ,
    "methods/loss.py": LOSS,
    "methods/gdfq.py": "x = 1\n",
    "models/__init__.py": "from .evaluate import top1\n",
    "models/evaluate.py": EVALUATE,
    "data/__init__.py": "",
    "data/sets.py": "x = {'key': 1}\n",
    "report/__init__.py": "",
    "report/tables.py": "x = 1\n",
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A notebook and a small kit that it imports, both as files; returns the code's identity after a change of one."""
    monkeypatch.setattr(places, "PACKAGE", tmp_path)
    sources = {"lr": "lr = 0.1", "run": "%matplotlib inline\nfrom dfqlib.methods.zeroq import top1\ntop1()  # why"}
    tags = {"lr": {"tags": ["parameters"]}, "run": {}}

    def code(name: str = "", old: str = "", new: str = "") -> str:
        for path, text in TREE.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text.replace(old, new) if path == name else text)
        texts = sources | ({name: sources[name].replace(old, new)} if name in sources else {})
        cells = [{"cell_type": "code", "metadata": tags[cell], "source": text} for cell, text in texts.items()]
        (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
        return identity.code_identity(tmp_path / "n.ipynb")

    return code


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("data/sets.py", "1", "2"),  # through a relative import, a re-export and an import inside a function
        ("models/evaluate.py", '"key"', '"other"'),
        ("models/__init__.py", "top1", "top1, top1 as t"),
        ("methods/loss.py", "not x", "x"),
        ("methods/__init__.py", "", "x = 1"),
        ("run", "top1()", "top1() + 1"),
        ("run", "inline", "widget"),
    ],
)
def test_changed_code_is_another_run(tree, name, old, new):
    assert tree() != tree(name, old, new)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("methods/gdfq.py", "1", "2"),
        ("report/tables.py", "1", "2"),
        ("__init__.py", '"1"', '"2"'),
        ("methods/zeroq.py", "Text", "Other text"),
        ("models/evaluate.py", '    """Doc."""\n', ""),
        ("methods/loss.py", "no ", "there is no "),
        ("methods/loss.py", '"why"', '"because"'),
        ("methods/loss.py", '"x"', '"X"'),
        ("methods/loss.py", "is ", "was "),
        ("run", "# why", "# because"),
        ("lr", "0.1", "0.2"),  # a run's parameters are hashed by their values
    ],
)
def test_changed_words_and_unrelated_code_are_the_same_run(tree, name, old, new):
    assert tree() == tree(name, old, new)


@pytest.mark.parametrize("source", ["from ...x import a", "from .x import a\0"])
def test_what_python_could_not_import_either_is_not_followed(source):
    assert identity.imported(source, "dfqlib") == set() and identity.normalise(source)


def run_identity(**selection: object) -> str:
    return plan.plan(plan.Selection(papers=["gdfq"], **selection))[0].identity


def test_a_run_depends_on_its_parameters_weights_and_torch(kit, tmp_path, monkeypatch):
    first = run_identity()
    assert run_identity() == first
    others = {run_identity(seeds=[1]), run_identity(bits=["w5a5"]), run_identity(settings={"lr": "0.2"})}
    weights = tmp_path / "own.safetensors"
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        others.add(run_identity(settings={"weights": str(weights)}))
    write_kit(kit, gdfq="1 + 2")
    others.add(run_identity())
    write_kit(kit)
    installed = importlib.metadata.version
    for version in ("2.98.0", "2.99.0+cpu"):
        monkeypatch.setattr(importlib.metadata, "version", {"torch": version}.get)
        others.add(run_identity())
    assert len(others - {first}) == 8
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{installed(name).partition('+')[0]}+other")
    assert run_identity() == first


@pytest.mark.parametrize(("paper", "name"), [("teachers", "start"), ("qimera", "qimera_generator")])
def test_files_that_a_run_begins_with_count_by_content(tmp_path, monkeypatch, paper, name):
    monkeypatch.delenv("DFQ_PROFILES", raising=False)
    file = tmp_path / "start.safetensors"
    selection = plan.Selection(papers=[paper], datasets=["cifar10"], settings={name: str(file)})
    with pytest.raises(UserError, match=rf"--set {name}=.*start.safetensors is not a file"):
        plan.plan(selection)
    file.write_bytes(b"one")
    (before,) = plan.plan(selection)
    file.write_bytes(b"two")
    (after,) = plan.plan(selection)
    assert before.parameters == after.parameters and before.identity != after.identity


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of images of two classes; ``$XDG_CACHE_HOME`` is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("cat/1.png", "dog/1.PNG"):
        write(tmp_path / "images" / name, b"pixels")
    return tmp_path / "images"


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


IMAGES = ["cat/1.png", "cat/2.png", "bird/1.bmp"]


@pytest.mark.parametrize("name", [*IMAGES, ".DS_Store", "cat/README.md", "cat/.1.png", ".ipynb_checkpoints/1.png"])
def test_other_pixels_or_images_are_other_data_and_other_files_are_not(images, name):
    before = identity.data_identity("pets", images)
    write(images / name, b"slexip")
    assert (identity.data_identity("pets", images) != before) == (name in IMAGES)


def test_training_images_count_for_trainings_alone(images):
    identities = []
    for split in ("test", "train"):
        write(images / split / "cat" / "1.png", b"pixels")
        identities.append([identity.data_identity("pets", images, training) for training in (False, True)])
    before, after = identities
    assert before[0] == after[0] and before[1] != after[1]


def test_cifar_batches_are_the_data(images):
    identities = []
    for name, content in (("test_batch", b"pixels"), ("readme.html", b"text"), ("test_batch", b"slexip")):
        write(images / "cifar-10-batches-py" / name, content)
        identities.append(identity.data_identity("cifar10", images))
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize("cache", ["kept", "broken", "unwritable", "no home"])
def test_images_are_known_again_with_any_cache(images, monkeypatch, cache):
    first = identity.data_identity("pets", images)
    (file,) = places.cache_folder().iterdir()
    if cache == "broken":
        file.write_text(file.read_text()[:-5])
    elif cache == "unwritable":
        monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    elif cache == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", "/nowhere/at/all")
    assert identity.data_identity("pets", images) == first


def test_home_is_expanded_wherever_a_place_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "data" / "teachers" / "own.pth", b"")
    write(tmp_path / "data" / "pets" / "cat" / "1.png", b"")
    monkeypatch.setenv("DFQ_DATA", "~/data")
    assert places.weights_file("own") == tmp_path / "data" / "teachers" / "own.pth"
    assert places.weights_file("own", "~/w.pth") == tmp_path / "w.pth"
    assert places.data_folder("pets", {}) == tmp_path / "data" / "pets"
    assert places.data_folder("pets", {"data_folder": "~/images"}) == images
