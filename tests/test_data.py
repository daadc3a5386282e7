"""Data sets: where they are found and in which order, what the embedded ones hold, and refusals of wrong folders."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dfqlib.data import image_sets
from dfqlib.data.image_sets import DATASETS, ImageSet, balanced_subset, few_shot, load_test, load_train, some
from dfqlib.errors import UserError
from dfqlib.places import ASSETS
from dfqlib.runner.identity import data_identity

CIFAR10 = DATASETS["cifar10"].classes
EMBEDDED = json.loads((ASSETS / "images.json").read_text())


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("DFQ_DATA", raising=False)


def refuse(match, function=load_test, **parameters):
    with pytest.raises(UserError, match=match) as caught:
        function(**parameters)
    assert "\n" not in str(caught.value)


def grey(level: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def tree(folder, classes=CIFAR10, images=2, size=(32, 32)):
    """An ImageFolder tree whose image i of class c has the grey level 10 c + i."""
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(images):
            grey((10 * label + i) % 256, size).save(folder / name / f"{i}.png")
    return folder


def torchvision_layout(folder, monkeypatch):
    """Python batches as CIFAR-10 is distributed, five of training and one of tests, 20 images each."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def batch(name):
        pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(20)]})

    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(dataset, "test_list", [batch("test_batch")])
    meta = write("batches.meta", {"label_names": list(CIFAR10)})
    monkeypatch.setattr(dataset, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return folder


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_pixels_are_the_ones_described(name):
    dataset, kind = name.split("-")
    image_set = few_shot(dataset) if kind == "10shot" else load_test(dataset)
    assert image_set.name == name
    assert hashlib.sha256(image_set.pixels.numpy().tobytes()).hexdigest() == EMBEDDED[name]["pixels_sha256"]
    assert image_set.pixels.shape == (EMBEDDED[name]["images"], 3, 32, 32)
    assert (image_set.pixels.dtype, image_set.labels.dtype) == (torch.uint8, torch.int64)
    assert image_set.pixels.is_contiguous()
    assert torch.bincount(image_set.labels).tolist() == [EMBEDDED[name]["per_class"]] * len(image_set.classes)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_embedded_images_differ_are_not_shared_and_some_of_them_are_the_first(dataset):
    tests, shots = ({image.numpy().tobytes() for image in each(dataset).pixels} for each in (load_test, few_shot))
    assert len(tests) == 2000 and len(shots) == 10 * len(DATASETS[dataset].classes) and not tests & shots
    for whole in (load_test(dataset), few_shot(dataset)):
        for count in (32, 1000):
            assert torch.equal(some(whole, count, seed=3).pixels, whole.pixels[:count])


def test_few_shot_takes_the_first_of_every_class():
    shots = few_shot("cifar100", per_class=2)
    assert shots.name == "cifar100-2shot"
    assert shots.labels.tolist() == [*range(100), *range(100)]
    assert torch.equal(shots.pixels, few_shot("cifar100").pixels[:200])
    refuse("per_class=11 is out of range", few_shot, dataset="cifar10", per_class=11)
    refuse("dataset='imagenet' is unknown", few_shot, dataset="imagenet")


def test_balanced_subset_depends_on_pixels_alone():
    pixels = torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8)
    whole = ImageSet("all", pixels, torch.arange(30) % 3, ("a", "b", "c"), "made here")
    chosen = balanced_subset(whole, 4, "some")
    assert (chosen.name, chosen.labels.tolist()) == ("some", [0, 1, 2] * 4)
    assert torch.equal(chosen.pixels, balanced_subset(whole.select(torch.randperm(30)), 4, "some").pixels)
    assert not torch.equal(chosen.pixels, balanced_subset(whole, 4, "some", seed=1).pixels)
    told = "per_class=11 is more than the 10 images of 'a'"
    refuse(told, balanced_subset, image_set=whole, per_class=11, name="too many")


def test_some_images_are_of_all_classes_also_where_a_folder_is_ordered_by_class(tmp_path):
    ordered = load_test("cifar10", tree(tmp_path / "tree", images=5))
    chosen = some(ordered, 23)
    assert set(torch.bincount(chosen.labels).tolist()) == {2, 3}
    assert len({image.numpy().tobytes() for image in chosen.pixels}) == 23
    assert torch.equal(chosen.pixels, some(ordered, 23).pixels)
    assert not torch.equal(chosen.pixels, some(ordered, 23, seed=1).pixels)
    assert torch.equal(some(ordered, 100).pixels, ordered.pixels)
    # Classes with too few images give what they have.
    assert torch.bincount(some(ordered.select(slice(2, None)), 49).labels).tolist() == [3] + [5] * 9


def test_real_images_are_named_test_images_where_they_are_no_training_images(tmp_path):
    pets = load_test("pets", tree(tmp_path / "pets", ("cat", "dog")))
    assert image_sets.real_images("cifar10", load_test("cifar10")).name == "cifar10-10shot"
    assert image_sets.real_images("pets", pets).name == "pets, test images"


def test_order_is_folder_then_environment_then_package(tmp_path, monkeypatch):
    given = tree(tmp_path / "given")
    assert load_test("cifar10").name == "cifar10-2k"
    tree(tmp_path / "data" / "cifar10" / "test", images=3)
    monkeypatch.setenv("DFQ_DATA", str(tmp_path / "data"))
    found = load_test("cifar10")
    assert (found.name, len(found)) == ("cifar10-30", 30)
    assert str(tmp_path / "data" / "cifar10") in found.source
    assert load_test("cifar10", given).name == "cifar10-20"
    assert load_test("cifar100").name == "cifar100-2k"  # not in the data folder


def test_tree_is_read_class_by_class_in_label_order(tmp_path):
    found = load_test("cifar10", tree(tmp_path / "tree"))
    assert found.classes == CIFAR10
    assert found.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert found.pixels[:, 2, 31, 31].tolist() == [10 * label + i for label in range(10) for i in range(2)]


def test_splits_are_kept_apart_also_in_a_folder_of_several_data_sets(tmp_path):
    tree(tmp_path / "val", images=1)
    tree(tmp_path / "train", images=3)
    assert (len(load_test("cifar10", tmp_path)), len(load_train("cifar10", tmp_path))) == (10, 30)
    tree(tmp_path / "half" / "cifar10" / "test")
    assert len(load_test("cifar10", tmp_path / "half")) == 20
    refuse("has no train/ beside test/", load_train, dataset="cifar10", data_folder=tmp_path / "half")


def test_hidden_files_and_folders_are_no_data(tmp_path):
    tree(tmp_path / "test", ("cat", "dog"))
    for hidden in (".ipynb_checkpoints", "test/.ipynb_checkpoints", "test/cat/.ipynb_checkpoints"):
        (tmp_path / hidden).mkdir()
        grey(0).save(tmp_path / hidden / "0-checkpoint.png")
    grey(0).save(tmp_path / "test" / "dog" / "._0.png")
    (tmp_path / ".DS_Store").write_bytes(b"")
    found = load_test("pets", tmp_path)
    assert (found.classes, len(found)) == (("cat", "dog"), 4)
    refuse("has no train/ beside test/", load_train, dataset="pets", data_folder=tmp_path)


def test_what_lies_behind_links_is_read_and_part_of_a_runs_identity(tmp_path):
    elsewhere, data = tree(tmp_path / "elsewhere", ("cat", "dog")), tmp_path / "data"
    (data / "cat").mkdir(parents=True)
    for link, target in {"cat/some": "cat", "dog": "dog"}.items():
        (data / link).symlink_to(elsewhere / target)
    (elsewhere / "dog" / "again").symlink_to(data)  # a loop
    assert load_test("pets", data).labels.tolist() == [0, 0, 1, 1]
    identity = data_identity("pets", data)
    grey(99).save(elsewhere / "dog" / "1.png")
    assert data_identity("pets", data) != identity


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_become_8_and_32_are_refused(tmp_path, suffix):
    (tmp_path / "a").mkdir()
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a" / f"0.{suffix}")
    assert load_test("own", tmp_path).pixels[0, 1].flatten().tolist() == list(range(256))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "a" / "1.tif")
    refuse("a/1.tif has 32 bits a pixel; allowed: 8 or 16", dataset="own", data_folder=tmp_path)


def test_torchvision_layout(tmp_path, monkeypatch):
    torchvision_layout(tmp_path / "cifar10", monkeypatch)
    monkeypatch.setenv("DFQ_DATA", str(tmp_path))
    found = load_test("cifar10")
    assert (found.name, len(found), len(load_train("cifar10"))) == ("cifar10", 20, 100)
    assert found.labels.tolist() == [*range(10), *range(10)]
    original = torchvision.datasets.CIFAR10(tmp_path / "cifar10", train=False)
    assert np.array_equal(found.pixels[7].permute(1, 2, 0), np.array(original[7][0]))
    inner = load_test("cifar10", tmp_path / "cifar10" / "cifar-10-batches-py")
    assert torch.equal(inner.pixels, found.pixels)
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    refuse("incomplete or damaged cifar-10-batches-py")


def test_any_classes_under_a_name_of_ones_own_and_any_size(tmp_path):
    found = load_test("pets", tree(tmp_path / "pets", ("cat", "dog"), size=(48, 64)))
    assert (found.name, found.classes, found.pixels.shape) == ("pets", ("cat", "dog"), (4, 3, 64, 48))
    assert load_test("pets", tmp_path / "pets", size=32).pixels.shape == (4, 3, 32, 32)


def test_crop_is_the_centre_after_resizing_the_shorter_side(tmp_path):
    # White in the middle half of the width: of a 128 x 64 image at size 56 (resized to 128 x 64) columns 36 to 91.
    wide = Image.new("RGB", (128, 64))
    wide.paste("white", (32, 0, 96, 64))
    (tmp_path / "a").mkdir()
    wide.save(tmp_path / "a" / "wide.png")
    assert load_test("own", tmp_path, size=56).pixels.unique().tolist() == [255]


def test_imagenet_is_a_validation_folder_of_synsets(tmp_path, monkeypatch):
    monkeypatch.setenv("DFQ_DATA", str(tmp_path))
    synsets = DATASETS["imagenet"].classes
    tree(tmp_path / "imagenet" / "val", synsets, images=1, size=(20, 10))
    found = load_test("imagenet", size=8)
    assert (found.name, found.pixels.shape) == ("imagenet-1000", (1000, 3, 8, 8))
    assert found.labels.tolist() == list(range(1000)) and len(set(synsets)) == 1000


def test_a_folder_of_some_known_classes_keeps_their_labels(tmp_path):
    tree(tmp_path / "val", ("n15075141", "n01440764", "n02123045"), images=1, size=(10, 10))  # the last, the first
    some_of_it = load_test("imagenet", tmp_path, size=8)
    assert some_of_it.labels.tolist() == [0, 281, 999] and len(some_of_it.classes) == 1000
    assert some_of_it.classes[281] == "n02123045" and some_of_it.pixels[:, 0, 0, 0].tolist() == [10, 20, 0]
    tree(tmp_path / "cifar", ("truck", "cat"), images=1)
    assert load_test("cifar10", tmp_path / "cifar").labels.tolist() == [3, 9]


def test_classes_of_cifar_in_another_size_are_not_cifar(tmp_path):
    folder = tree(tmp_path / "large", size=(64, 64))
    assert [image_sets.data_set_of(folder, 10, size) for size in (32, 64, None)] == ["cifar10", None, None]


def test_wrong_folders_and_images(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse("is empty", data_folder=tmp_path / "empty")
    grey(0).save(tmp_path / "empty" / "image.png")
    refuse("holds 1 images without class folders", data_folder=tmp_path / "empty")
    tree(tmp_path / "large", size=(64, 64))
    refuse("has 64 x 64 pixels; allowed: 32 x 32", data_folder=tmp_path / "large")
    for image in (tmp_path / "large" / "deer").iterdir():
        image.unlink()
    refuse("class folder 'deer' holds no images", data_folder=tmp_path / "large")
    tree(tmp_path / "mixed", ("cat",))
    tree(tmp_path / "mixed" / "new", ("dog",), size=(40, 40))
    refuse("has 40 x 40 pixels; allowed: 32 x 32 like the others", dataset="pets", data_folder=tmp_path / "mixed")
    refuse("size=64 does not fit cifar10", size=64)


def test_a_folder_is_checked_by_its_layout_classes_and_one_image(tmp_path, monkeypatch):
    image_sets.check_folder("pets", tree(tmp_path / "pets", ("cat", "dog")))
    (tmp_path / "pets" / "dog" / "0.png").write_bytes(b"not an image")
    image_sets.check_folder("pets", tmp_path / "pets")  # reads the cats' first only
    (tmp_path / "pets" / "cat" / "0.png").write_bytes(b"not an image")
    tree(tmp_path / "other", (*CIFAR10[1:], "zebra"))
    for function in (image_sets.check_folder, load_test):
        refuse("cat/0.png cannot be read", function, dataset="pets", data_folder=tmp_path / "pets")
        refuse("class folder zebra; allowed: the classes", function, dataset="cifar10", data_folder=tmp_path / "other")
        refuse("is not a folder", function, dataset="cifar10", data_folder=tmp_path / "none")
    torchvision_layout(tmp_path / "cifar10", monkeypatch)
    image_sets.check_folder("cifar10", tmp_path / "cifar10")


def test_data_that_is_nowhere(tmp_path, monkeypatch):
    refuse(r"dataset='cifar1O' is unknown \(did you mean 'cifar10'\?\).* any name with data_folder=", dataset="cifar1O")
    refuse("dataset='imagenet': its test images are neither on this machine", dataset="imagenet")
    refuse("its train images are neither .* download=True", function=load_train)
    monkeypatch.setenv("DFQ_DATA", str(tmp_path / "none"))
    refuse(r"\$DFQ_DATA='.*none' is not a folder")


def test_download_needs_a_network_only_where_the_data_set_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refuse("dataset='cifar10' could not be downloaded: https://.* does not answer", download=True)
    assert not list(tmp_path.iterdir())
    torchvision_layout(tmp_path / "dfqlib" / "cifar10", monkeypatch)
    assert load_test("cifar10", download=True).name == "cifar10"
