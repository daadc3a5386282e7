"""README keeps its word: its rows are those of the results tables, its files exist, its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_examples_quantize_a_model_of_ones_own_and_give_a_file(tmp_path, monkeypatch, capsys):
    _, _, section = README.partition("### Your own model")
    quantize, deploy = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[:2]
    random = np.random.default_rng(0)
    for label in range(10):
        folder = tmp_path / "path" / "to" / "validation" / f"class{label}"
        folder.mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / "0.png")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)]
    exec(quantize, names := {"network": nn.Sequential(*layers)})
    printed = capsys.readouterr().out
    assert "linear" in printed and 0 <= float(printed.splitlines()[-1]) <= 100
    exec(deploy, names)
    assert "ONNX Runtime" in capsys.readouterr().out and (tmp_path / "student.onnx").exists()
