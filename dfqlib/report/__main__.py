"""``python -m dfqlib.report [FOLDER]``: make a results folder's tables, figures and report again; runs nothing."""

import sys
from pathlib import Path

from dfqlib.papers import profiles
from dfqlib.report import collect

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else collect.PROJECT
if not collect.write(folder, profiles.load()[0]["quick"], (), {}):
    sys.exit(f"{folder} holds no finished run.")
print(f"Written: {folder / 'README.md'}, tables/, {folder / 'report.html'}")
