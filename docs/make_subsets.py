"""Make the embedded image sets from the full CIFAR data sets: ``python docs/make_subsets.py FOLDER``.

FOLDER holds ``cifar10`` and ``cifar100``, each in torchvision's layout or as an ImageFolder tree. The choice depends
on the pixels alone (:func:`dfqlib.data.image_sets.balanced_subset`), so every copy of CIFAR gives the same sheets.
"""

import argparse
import hashlib
from pathlib import Path

from PIL import Image

from dfqlib.data.image_sets import EMBEDDED_PER_CLASS, FEW_SHOT, ImageSet, balanced_subset, load_test, load_train
from dfqlib.files import atomic_path, write_json
from dfqlib.places import ASSETS

COLUMNS = 100  # tiles per row; 2,000 tiles make 20 rows of 3,200 pixels


def write_sheet(image_set: ImageSet) -> dict[str, str | int]:
    """Save ``image_set`` as one lossless sheet and return its description for ``images.json``."""
    n, channels, height, width = image_set.pixels.shape
    tiles = image_set.pixels.view(n // COLUMNS, COLUMNS, channels, height, width)
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(n // COLUMNS * height, COLUMNS * width, channels)
    with atomic_path(ASSETS / f"{image_set.name}.webp") as path:
        Image.fromarray(sheet.numpy()).save(path, lossless=True, quality=100, method=6)
    pixels = hashlib.sha256(image_set.pixels.numpy().tobytes()).hexdigest()
    return {"images": n, "per_class": n // len(image_set.classes), "pixels_sha256": pixels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    described = {}
    for dataset, per_class in EMBEDDED_PER_CLASS.items():
        tests = balanced_subset(load_test(dataset, folder / dataset), per_class, f"{dataset}-2k")
        shots = balanced_subset(load_train(dataset, folder / dataset), FEW_SHOT, f"{dataset}-{FEW_SHOT}shot")
        described |= {image_set.name: write_sheet(image_set) for image_set in (tests, shots)}
    write_json(ASSETS / "images.json", described)


if __name__ == "__main__":
    main()
