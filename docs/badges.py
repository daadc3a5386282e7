"""Write "Open in Colab" and Binder badges for a repository on GitHub: ``python docs/badges.py owner/name``.

They go under README's first heading and that of every notebook, in place of those that are there. On Colab a notebook
needs the library, which the line beside its badges installs.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLAB = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
BINDER = "[![Binder](https://mybinder.org/badge_logo.svg)]"


def badges(repository: str, path: str) -> str:
    """One line for the notebook at ``path``, seen from the repository's root."""
    colab = f"{COLAB}(https://colab.research.google.com/github/{repository}/blob/main/{path})"
    binder = f"{BINDER}(https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/{path})"
    return f"{colab} {binder}"


def below_heading(text: str, line: str) -> str:
    """``text`` with ``line`` as a paragraph under its heading, in place of the badges there."""
    heading, _, rest = text.partition("\n\n")
    if rest.startswith(COLAB):
        rest = rest.partition("\n\n")[2]
    return f"{heading}\n\n{line}\n\n{rest}"


def main(repository: str, root: Path = ROOT) -> None:
    """Write the badges into README.md and all notebooks below ``root``."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        sys.exit(f"{repository!r} is no repository; allowed: owner/name, as on GitHub.")
    readme = root / "README.md"
    first = "notebooks/02_gdfq.ipynb"
    readme.write_text(below_heading(readme.read_text(encoding="utf-8"), badges(repository, first)), encoding="utf-8")
    install = f"On Colab, begin with `%pip install git+https://github.com/{repository}`."
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        cell = notebook["cells"][0]
        line = f"{badges(repository, f'notebooks/{path.name}')} {install}"
        cell["source"] = below_heading("".join(cell["source"]), line).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
