"""``python -m dfqlib.report [FOLDER]``: make a results folder's tables, figures and report again; runs nothing."""

import argparse
import sys
from pathlib import Path

from dfqlib.errors import UserError
from dfqlib.papers import profiles
from dfqlib.report import collect

parser = argparse.ArgumentParser("python -m dfqlib.report", description="Make a results folder's tables again.")
parser.add_argument("folder", nargs="?", type=Path, default=collect.PROJECT, help="default: the project's results/")
folder = parser.parse_args().folder
if not folder.is_dir():
    parser.error(f"folder={str(folder)!r} is not a folder.")
try:
    if not collect.write(folder, profiles.load()[0]["quick"], (), {}):
        sys.exit(f"{folder} holds no finished run.")
except UserError as error:
    parser.error(str(error))
print(f"Written: {folder / 'README.md'}, tables/, {folder / 'report.html'}")
