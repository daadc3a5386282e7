"""Errors, files, hardware and seeds: what every other part relies on."""

import pytest
import torch

from dfqlib.device import seed_everything
from dfqlib.errors import UserError, check_choice, check_range
from dfqlib.files import atomic_path, write_json, write_text


def test_unknown_choice_names_parameter_value_and_what_is_allowed():
    with pytest.raises(UserError, match=r"dataset='cifar11' is unknown \(did you mean 'cifar10'\?\); allowed: cifar10"):
        check_choice("dataset", "cifar11", ["cifar10", "imagenet"])
    with pytest.raises(UserError, match=r"\(did you mean 'resnet20_cifar10'\?\)"):
        check_choice("model", "resnet20", ["resnet50", "resnet20_cifar10"])
    assert check_choice("dataset", "imagenet", ["cifar10", "imagenet"]) == "imagenet"


def test_values_out_of_range_are_refused():
    for value in (-0.1, 1.1, float("nan"), "0.5", False):
        with pytest.raises(UserError, match=r"p=.*from 0 to 1"):
            check_range("p", value, 0, 1)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "result.json"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(ValueError):
        write_json(target, {"top1": float("nan")})  # no number of JSON
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_seed_repeats_the_numbers():
    seed_everything(5)
    first = torch.rand(3)
    seed_everything(5)
    assert torch.equal(first, torch.rand(3))
