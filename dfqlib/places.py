"""Where weights, data and the package's own files are. Nothing here imports torch."""

import os
from pathlib import Path
from typing import Any

from dfqlib.errors import UserError

PACKAGE = Path(__file__).resolve().parent
ASSETS = PACKAGE / "data" / "assets"
#: Parameters of notebooks that name a file or a folder; those of files that a run begins with.
GIVEN_WEIGHTS = ("start", "gdfq_generator", "qimera_generator")
PATH_PARAMETERS = ("data_folder", "weights", "checkpoint", *GIVEN_WEIGHTS)
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
#: The folders of class folders that hold a split, in the order in which they are looked for.
SPLIT_FOLDERS = {"test": ("test", "val", "validation"), "train": ("train",)}
#: torchvision's folders of CIFAR batches, and the files in them that hold images.
TORCHVISION_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
TORCHVISION_BATCHES = ("data_batch_*", "test_batch", "train", "test")


def expand(path: str | Path) -> Path:
    """The path with ``~`` replaced by the home folder where there is one."""
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Where the package keeps what it can compute or download again: in ``$XDG_CACHE_HOME``, else ``~/.cache``."""
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "dfqlib"


def data_root() -> Path | None:
    """``$DFQ_DATA``; None where it is not set; UserError where it names no folder."""
    root = os.environ.get("DFQ_DATA", "")
    if root and not expand(root).is_dir():
        raise UserError(f"$DFQ_DATA={root!r} is not a folder; correct it or unset it.")
    return expand(root) if root else None


def weights_file(model: str, weights: str | Path = "") -> Path | None:
    """The weights file of a teacher: ``weights``, there or not, else the package's, else ``$DFQ_DATA/teachers/``'s.

    None if the weights are the model's library's own, which are downloaded.
    """
    if weights:
        return expand(weights)
    root = data_root()
    own = [root / "teachers" / f"{model}{suffix}" for suffix in (".safetensors", ".pth")] if root else []
    return next((file for file in (ASSETS / f"{model}.safetensors", *own) if file.is_file()), None)


def data_folder(dataset: str, parameters: dict[str, Any]) -> Path | None:
    """The folder that the data set is read from: the one given, else ``$DFQ_DATA/<dataset>``; None: embedded images."""
    if parameters.get("data_folder"):
        return expand(parameters["data_folder"])
    root = data_root()
    return root / dataset if root and dataset and (root / dataset).is_dir() else None


def image_files(folder: Path) -> list[Path]:
    """The image files anywhere below ``folder``, behind links too, sorted; without hidden ones (.ipynb_checkpoints)."""
    images: list[Path] = []
    for name, folders, files in os.walk(folder, followlinks=True):
        place = Path(name)
        above = {each.resolve() for each in (place, *place.absolute().parents)}  # links to these would never end
        folders[:] = [each for each in folders if each[0] != "." and (place / each).resolve() not in above]
        images += [place / each for each in files if each[0] != "." and Path(each).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(images)


def data_files(dataset: str, folder: Path, training: bool) -> list[Path]:
    """The files that hold the images of a data set in ``folder``: those of all splits, or of the test images alone.

    They are alone only where they have a folder of their own; see :func:`dfqlib.data.image_sets.load_test`.
    """
    known = dataset in ("imagenet", *TORCHVISION_FOLDERS)
    place = folder / dataset if known and (folder / dataset).is_dir() else folder
    if batches := TORCHVISION_FOLDERS.get(dataset):
        inside = place if place.name == batches else place / batches
        if inside.is_dir():
            return sorted(file for pattern in TORCHVISION_BATCHES for file in inside.glob(pattern))
    files = image_files(place)
    tests = [file for file in files if file.relative_to(place).parts[0] in SPLIT_FOLDERS["test"]]
    return files if training or not tests else tests
