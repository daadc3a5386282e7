"""The badges for Colab and Binder, on copies: README and every notebook get them once, and nothing else changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def sources(root: Path) -> dict[str, list[str]]:
    """The cells of every notebook, and README as one more."""
    files = {path.name: json.loads(path.read_text()) for path in sorted((root / "notebooks").glob("*.ipynb"))}
    cells = {name: ["".join(cell["source"]) for cell in file["cells"]] for name, file in files.items()}
    return cells | {"README.md": [(root / "README.md").read_text()]}


def test_badges_are_written_once_and_follow_the_repository(tmp_path):
    for name in ("README.md", "notebooks", "docs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    before = sources(tmp_path)
    for repository in ("someone/first", "someone/kit", "someone/kit"):
        subprocess.run([sys.executable, tmp_path / "docs" / "badges.py", repository], check=True)
    for name, (first, *rest) in sources(tmp_path).items():
        heading, _, below = before[name][0].partition("\n\n")
        if name == "README.md":  # its badges ask for the repository
            asking, _, below = below.partition("\n\n")
            assert "(https://colab.research.google.com/github/)" in asking and "(https://mybinder.org/)" in asking
        line = first.removeprefix(heading).removesuffix(below).strip()
        assert first == f"{heading}\n\n{line}\n\n{below}" and rest == before[name][1:]
        path = f"notebooks/{'02_gdfq.ipynb' if name == 'README.md' else name}"
        assert f"(https://colab.research.google.com/github/someone/kit/blob/main/{path})" in line
        assert f"(https://mybinder.org/v2/gh/someone/kit/main?urlpath=lab/tree/{path})" in line
        assert ("%pip install git+https://github.com/someone/kit" in line) == (name != "README.md")
    wrong = subprocess.run([sys.executable, tmp_path / "docs" / "badges.py", "kit"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "'kit' is no repository" in wrong.stderr
