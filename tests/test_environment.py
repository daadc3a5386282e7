"""The ways to install agree: pyproject.toml gives ranges, requirements.txt exact versions, environment.yml both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from setuptools import find_namespace_packages

from dfqlib.runner.kernels import cores

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.11", "3.12", "3.13"]


def pins(python: str, system: str) -> dict[str, str]:
    """Package -> version that requirements.txt installs on some Python and system."""
    where = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": system}
    where |= {"platform_system": system.capitalize(), "platform_machine": "arm64" if system == "darwin" else "x86_64"}
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"no exact pin: {line}"
            if requirement.marker is None or requirement.marker.evaluate(where):
                assert requirement.name not in found, f"two pins of {requirement.name} on {python}, {system}"
                found[requirement.name] = str(requirement.specifier)[2:]
    return found


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_pin_within_its_range(python, system):
    found = pins(python, system)
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["dev"], *extras["deploy"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(found[requirement.name]), text


def test_conda_environment_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    packages = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = (item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert environment["name"] == PROJECT["name"]
    assert pip == ["-r requirements.txt", "-e ."] and "pip" in packages
    (python,) = (Requirement(item) for item in packages if item.startswith("python"))
    assert [p for p in ["3.10", *PYTHONS, "3.14"] if p in python.specifier] == PYTHONS


def test_binder_takes_torch_for_a_cpu_from_conda_and_the_rest_from_the_package():
    environment = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text())
    assert "python=3.11" in environment["dependencies"], "Binder needs one version, not a range"
    found = {item.name: item for item in map(Requirement, environment["dependencies"][1:])}
    ranges = {item.name: item.specifier for item in map(Requirement, PROJECT["dependencies"])}
    assert found["pytorch-cpu"].specifier == ranges["torch"]
    assert found["torchvision"].specifier == ranges["torchvision"]
    steps = ROOT / "binder" / "postBuild"
    assert steps.stat().st_mode & 0o111 and "pip install --quiet --editable ." in steps.read_text()


def test_binder_tells_its_kernels_how_many_cores_they_may_use():
    """A container on Binder has a quota of a machine's many cores, and torch would start a thread for each of them."""
    place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [ROOT / "binder" / "start", "printenv", "OMP_NUM_THREADS"]
    environment = os.environ | {"PATH": place, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "77"}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(printed) == cores()


def test_no_file_names_a_host_to_install_from():
    binder = ("binder/environment.yml", "binder/postBuild", "binder/start")
    for name in ("requirements.txt", "environment.yml", "pyproject.toml", "Makefile", ".ci/run", *binder):
        text = (ROOT / name).read_text()
        assert "://" not in text and "index-url" not in text.replace("--no-emit-index-url", ""), name


def test_the_package_carries_its_data_files():
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    carried = set()
    for package, patterns in configuration["package-data"].items():
        carried |= {path for pattern in patterns for path in ROOT.joinpath(*package.split(".")).glob(pattern)}
    present = {p for p in (ROOT / "dfqlib").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert present - carried == set()
    found = find_namespace_packages(str(ROOT), **configuration["packages"]["find"])
    assert {p.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in ROOT.glob("dfqlib/**/*.py")} <= set(found)
