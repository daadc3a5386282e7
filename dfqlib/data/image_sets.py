"""Data sets as one uint8 tensor each, and where they are found.

The name of an :class:`ImageSet` says which images it holds: ``cifar10`` is the full test set, ``cifar10-2k`` the
balanced subset in the package, ``cifar10-10shot`` ten real training images per class.
"""

import functools
import hashlib
import importlib
import math
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dfqlib import places
from dfqlib.errors import UserError, check_choice, check_range

EMBEDDED_PER_CLASS = {"cifar10": 200, "cifar100": 20}  # 2,000 test images of each
FEW_SHOT = 10  # embedded training images per class
CROP = 0.875  # centre crop over resized shorter side: 224 of 256, 299 of 342


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: ``pixels`` uint8 (N, 3, H, W), 0 to 255; ``labels`` int64 (N,); ``classes`` the names."""

    name: str
    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor | slice) -> "ImageSet":
        """The images that ``index`` (numbers, or a mask) selects, under the same name."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """What is known about a data set before it is read; only its name if it is not among ``DATASETS``."""

    name: str
    size: int | None = None  # height and width in pixels
    counts: dict[str, int] = field(default_factory=dict)  # images of each full split
    classes: tuple[str, ...] = ()  # the names of its class folders, in label order
    torchvision_folder: str | None = None  # of CIFAR's batches


def _known(name: str, size: int, train: int, test: int) -> Dataset:
    names = tuple((places.ASSETS / f"{name}-classes.txt").read_text(encoding="utf-8").split())
    return Dataset(name, size, {"train": train, "test": test}, names, places.TORCHVISION_FOLDERS.get(name))


DATASETS: dict[str, Dataset] = {
    "cifar10": _known("cifar10", 32, 50_000, 10_000),
    "cifar100": _known("cifar100", 32, 50_000, 10_000),
    "imagenet": _known("imagenet", 224, 1_281_167, 50_000),
}


def load_test(
    dataset: str = "cifar10",
    data_folder: str | Path | None = None,
    download: bool = False,
    size: int | None = None,
    split: str = "test",
) -> ImageSet:
    """Test (validation) images, from the first of: ``data_folder``, ``$DFQ_DATA/<dataset>``, the package, a download.

    ``data_folder`` is a torchvision layout (``cifar-10-batches-py`` or ``cifar-100-python``) or an ImageFolder tree
    (class folders, or ``test/`` or ``val/`` with class folders inside), or holds one in a folder named ``dataset``;
    ``$DFQ_DATA/<dataset>`` likewise. Folders of some of a known data set's classes (of ImageNet, synsets such as
    n01440764) keep those classes' labels. The package has 2,000 test images of CIFAR-10 and of CIFAR-100;
    ``download=True`` asks for all 10,000 instead, through torchvision. A name that is not in ``DATASETS`` stands for
    an ImageFolder tree with any classes.

    ``size`` (pixels, default 224 for imagenet) is the centre crop of an ImageFolder tree's images after their shorter
    side is resized to ``size / 0.875``; images that already have that size are left as they are. All of ImageNet's
    validation images at 224 pixels take 7.5 GB. Raises :class:`UserError` for data that cannot be found or has the
    wrong classes.
    """
    known = DATASETS.get(dataset, Dataset(dataset))
    if known.torchvision_folder and size not in (None, known.size):
        raise UserError(f"size={size!r} does not fit {dataset}, whose images have {known.size} pixels; leave it out.")
    if size is not None:
        check_range("size", size, 1, 4096)
    if data_folder:
        return _read_folder(known, split, places.expand(data_folder), f"data_folder={str(data_folder)!r}", size)
    root = places.data_root()
    place = (root or places.cache_folder()) / dataset
    if root and place.is_dir():
        return _read_folder(known, split, place, f"$DFQ_DATA/{dataset}={str(place)!r}", size)
    check_choice("dataset", dataset, [*DATASETS, "or any name with data_folder= an ImageFolder tree"])
    if download and known.torchvision_folder:
        if not (place / known.torchvision_folder).is_dir():
            _download(known, place)
        return _read_folder(known, split, place, f"data_folder={str(place)!r}", size)
    if split == "test" and dataset in EMBEDDED_PER_CLASS:
        return embedded_test(dataset)
    ways = "download=True, " if known.torchvision_folder else ""
    raise UserError(
        f"dataset={dataset!r}: its {split} images are neither on this machine nor in the package; allowed: {ways}"
        f"data_folder= their folder, or the environment variable DFQ_DATA= a folder that holds {dataset}/."
    )


#: All training images, found as :func:`load_test` finds test images; the package has only those of :func:`few_shot`.
load_train = functools.partial(load_test, split="train")


def embedded_test(dataset: str = "cifar10") -> ImageSet:
    """The package's 2,000 test images, ``cifar10-2k`` or ``cifar100-2k``, whatever else is on this machine."""
    return _read_sheet(dataset, "2k", "test")


def few_shot(dataset: str = "cifar10", per_class: int = FEW_SHOT) -> ImageSet:
    """The package's real training images, ``per_class`` (1 to 10) of each class, class by class in turn."""
    check_range("per_class", per_class, 1, FEW_SHOT)
    shots = _read_sheet(dataset, f"{FEW_SHOT}shot", "training")
    source = f"the package's {per_class} real {dataset} training images per class"
    shots = replace(shots, name=f"{dataset}-{per_class}shot", source=source)
    return shots.select(slice(per_class * len(shots.classes)))


def real_images(dataset: str, test: ImageSet) -> ImageSet:
    """Real images to compare synthetic ones with: the package's training images, else ``test``, named as such."""
    return few_shot(dataset) if dataset in EMBEDDED_PER_CLASS else replace(test, name=f"{test.name}, test images")


def balanced_subset(image_set: ImageSet, per_class: int, name: str, seed: int = 0) -> ImageSet:
    """``per_class`` images of each of the C classes in turn, so that any multiple of C from the front is balanced.

    C counts classes that have images. The choice depends on ``seed`` and the images' pixels (:func:`_drawn`).
    """
    drawn = {label: each for label, each in zip(image_set.classes, _drawn(image_set, seed), strict=True) if each}
    for label, members in drawn.items():
        if len(members) < per_class:
            held = f"{len(members)} images of {label!r}"
            raise UserError(f"per_class={per_class} is more than the {held}; allowed: at most that number.")
    index = torch.tensor([[i for _, i in members[:per_class]] for members in drawn.values()]).T.flatten()
    source = f"{per_class} images per class of {image_set.source}"
    return replace(image_set.select(index), name=name, source=source)


def some(image_set: ImageSet, count: int, seed: int = 0) -> ImageSet:
    """``count`` images, or all if there are fewer, as evenly from all classes as possible, drawn by ``seed``.

    The first ``count`` if they are balanced already, as in the package's sets, whose classes take turns.
    """
    of_class = image_set.labels[:count].bincount(minlength=len(image_set.classes))
    if count >= len(image_set) or of_class.max() - of_class.min() <= 1:
        return image_set.select(slice(count))
    turns = sorted((turn, *one) for members in _drawn(image_set, seed) for turn, one in enumerate(members))
    return image_set.select(torch.tensor([i for *_, i in turns[:count]]))


def _drawn(image_set: ImageSet, seed: int) -> list[list[tuple[bytes, int]]]:
    """The (digest, index) of each class's images, sorted by the digest: the SHA-256 of seed and pixels.

    Thus a choice depends neither on the order of the images nor on the version of a random generator.
    """
    drawn: list[list[tuple[bytes, int]]] = [[] for _ in image_set.classes]
    for i, (label, pixels) in enumerate(zip(image_set.labels.tolist(), image_set.pixels, strict=True)):
        drawn[label].append((hashlib.sha256(b"%d" % seed + pixels.numpy().tobytes()).digest(), i))
    return [sorted(members) for members in drawn]


def require_network(url: str, wanted: str) -> None:
    """Raise :class:`UserError`, which says what is ``wanted``, unless ``url`` answers within 15 seconds."""
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "dfqlib"})
    try:
        urllib.request.urlopen(request, timeout=15).close()
    except urllib.error.HTTPError:
        pass  # an answer; what it refuses to a HEAD request it may still give to the download
    except OSError as error:
        reason = getattr(error, "reason", error)  # of a URLError
        raise UserError(f"{wanted} could not be downloaded: {url} does not answer ({reason}).") from None


def _read_sheet(dataset: str, kind: str, split: str) -> ImageSet:
    """An embedded set: a lossless sheet of tiles, read row by row; tile i shows class i mod C."""
    known = DATASETS[check_choice("dataset", dataset, EMBEDDED_PER_CLASS)]
    with Image.open(places.ASSETS / f"{dataset}-{kind}.webp") as file:
        sheet = torch.from_numpy(np.array(file.convert("RGB")))
    tiles = sheet.unflatten(0, (-1, known.size)).unflatten(2, (-1, known.size))  # rows, y, columns, x, RGB
    pixels = tiles.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous()
    source = f"the package's balanced subset of {len(pixels):,} {dataset} {split} images"
    return ImageSet(f"{dataset}-{kind}", pixels, torch.arange(len(pixels)) % len(known.classes), known.classes, source)


def data_set_of(data_folder: str | Path, classes: int, size: int | None) -> str | None:
    """The known data set of so many ``classes`` to which all class folders in ``data_folder`` belong, None without one.

    Some of ImageNet's synsets then keep their labels, for a network of its 1,000 classes. CIFAR's images have one
    ``size`` (pixels) alone.
    """
    place = _find_split(Dataset("own"), "test", places.expand(data_folder), f"data_folder={str(data_folder)!r}")
    folders = {entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    fitting = (known for known in DATASETS.values() if len(known.classes) == classes)
    fitting = (known for known in fitting if not known.torchvision_folder or known.size == size)
    return next((known.name for known in fitting if folders <= set(known.classes)), None)


def check_folder(dataset: str, data_folder: str | Path) -> None:
    """Raise the :class:`UserError` that :func:`load_test` would for ``data_folder``, but read one image only."""
    known, told = DATASETS.get(dataset, Dataset(dataset)), f"data_folder={str(data_folder)!r}"
    place = _find_split(known, "test", places.expand(data_folder), told)
    if place.name != known.torchvision_folder:
        _, files, _ = _list_tree(known, place, told)
        _read_image(files[0])


def _find_split(known: Dataset, split: str, folder: Path, told: str) -> Path:
    """Where in ``folder`` the class folders of the split are, or the folder of torchvision's layout."""
    if not folder.is_dir():
        raise UserError(f"{told} is not a folder.")
    for name in (known.name if known.name in DATASETS else None, known.torchvision_folder):
        folder = folder / name if name and (folder / name).is_dir() else folder
    if folder.name == known.torchvision_folder:
        return folder
    inside = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")}
    if not inside:
        raise UserError(f"{told} is empty.")
    wanted = places.SPLIT_FOLDERS[split]
    if here := [name for name in wanted if name in inside]:
        return folder / here[0]
    if inside <= set().union(*places.SPLIT_FOLDERS.values()):
        raise UserError(f"{told} has no {' or '.join(f'{name}/' for name in wanted)} beside {min(inside)}/.")
    return folder


def _torchvision_class(known: Dataset) -> Any:
    return getattr(importlib.import_module("torchvision.datasets"), known.name.upper())  # here: it takes seconds


def _download(known: Dataset, folder: Path) -> None:
    """The full data set through torchvision, into ``folder``."""
    dataset_class = _torchvision_class(known)
    require_network(dataset_class.url, f"dataset={known.name!r}")
    try:
        dataset_class(folder, download=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"dataset={known.name!r} could not be downloaded to {folder}: {error}") from None


def _read_folder(known: Dataset, split: str, folder: Path, told: str, size: int | None) -> ImageSet:
    """The split in ``folder``, a torchvision layout or an ImageFolder tree; ``told`` names the folder in errors."""
    place = _find_split(known, split, folder, told)
    if place.name == known.torchvision_folder:
        try:  # torchvision compares each file with its published MD5 before it reads it
            read = _torchvision_class(known)(place.parent, train=split == "train")
        except RuntimeError:
            raise UserError(f"{told} holds an incomplete or damaged {place.name}; download it again.") from None
        pixels = torch.from_numpy(np.ascontiguousarray(read.data.transpose(0, 3, 1, 2)))
        source = f"all {len(pixels):,} {known.name} {split} images in {place}"
        return ImageSet(known.name, pixels, torch.tensor(read.targets), known.classes, source)
    names, files, labels = _list_tree(known, place, told)
    if known.torchvision_folder:
        pixels = _read_images(files, told, None, (known.size, known.size))
    else:
        pixels = _read_images(files, told, size or known.size)
    name = known.name if known.counts.get(split) in (None, len(files)) else f"{known.name}-{len(files)}"
    return ImageSet(name, pixels, torch.tensor(labels), names, f"{len(files):,} {split} images in {place}")


def read_images(folder: str | Path, size: int | tuple[int, int]) -> Tensor:
    """All images below ``folder``, without labels: uint8 (N, 3, H, W), cropped to a square ``size`` as by load_test.

    ``size`` as (height, width) is that which they must have. UserError for no images, and for others.
    """
    told = f"images={str(folder)!r}"
    if not (files := places.image_files(places.expand(folder))):
        raise UserError(f"{told} holds no images ({', '.join(sorted(places.IMAGE_SUFFIXES))}).")
    return _read_images(files, told, size) if isinstance(size, int) else _read_images(files, told, None, size)


def _read_images(files: Sequence[Path], told: str, crop: int | None, shape: tuple[int, int] | None = None) -> Tensor:
    """The images in ``files``, uint8 (N, 3, H, W), all of ``shape`` (height, width), else of the first one's."""
    read_image = functools.partial(_read_image, size=crop)
    height, width = shape or read_image(files[0]).shape[1:]
    pixels = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for i, image in enumerate(pool.map(read_image, files)):
            if image.shape != (3, height, width):
                allowed = f"{width} x {height}" + ("" if shape else " like the others, or size= a crop")
                found = f"{image.shape[2]} x {image.shape[1]} pixels"
                raise UserError(f"{told}: image {files[i]} has {found}; allowed: {allowed}.")
            pixels[i] = image
    return pixels


def _list_tree(known: Dataset, folder: Path, told: str) -> tuple[tuple[str, ...], list[Path], list[int]]:
    """Class names, and the image files of all class folders with their labels.

    A known data set's names and labels are its own, whichever of them have a folder; others are the class folders in
    alphabetical order.

    Not torchvision's ImageFolder, which takes hidden files and folders for images and classes; a run's identity lists
    the same files as this.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        loose = len(places.image_files(folder))
        held = f"{loose} images without class folders" if loose else "no class folders"
        raise UserError(f"{told} holds {held}; allowed: one folder of images per class.")
    if known.classes and (odd := [name for name in names if name not in known.classes]):
        unexpected = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        named = f"{known.classes[0]} to {known.classes[-1]}"
        raise UserError(f"{told}: unexpected class folder {unexpected}; allowed: the classes of {known.name}, {named}.")
    classes, files, labels = known.classes or tuple(names), [], []
    for name in names:
        if not (inside := places.image_files(folder / name)):
            suffixes = ", ".join(sorted(places.IMAGE_SUFFIXES))
            raise UserError(f"{told}: class folder {name!r} holds no images ({suffixes}).")
        files += inside
        labels += [classes.index(name)] * len(inside)
    return classes, files, labels


def _read_image(path: Path, size: int | None = None) -> Tensor:
    """One image as uint8 (3, H, W); with ``size``, shorter side resized to size / 0.875, then the centre crop.

    Of 16 bits the upper 8 are kept, which is what Pillow does in colour; in grey it would clip them.
    """
    try:
        with Image.open(path) as file:
            if file.mode in ("I", "F"):
                raise UserError(f"image {path} has 32 bits a pixel; allowed: 8 or 16 bits a channel.")
            if file.mode.startswith("I;16"):
                file = Image.fromarray((np.asarray(file) >> 8).astype(np.uint8))
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"image {path} cannot be read: {error}.") from None
    if size is not None and image.size != (size, size):
        scale = math.ceil(size / CROP) / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
