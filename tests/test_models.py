"""Teachers: the model table, the frozen network and its normalisation, accuracy, and refusals of wrong weights."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfqlib.data.image_sets import ImageSet, load_test
from dfqlib.errors import UserError
from dfqlib.files import sha256
from dfqlib.models.evaluate import top1
from dfqlib.models.teacher import Teacher, load_teacher, read_weights, save_teacher
from dfqlib.models.zoo import MODELS, build, entry_of
from dfqlib.papers import published
from dfqlib.places import ASSETS

NAME = "resnet20_cifar10"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return build(NAME).state_dict()


@pytest.fixture
def weights(state, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    return path


def tiny(classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes))


def own(classes: int = 3) -> Teacher:
    return Teacher.from_module(tiny(classes), classes, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), input_size=8)


def test_every_published_model_has_an_entry():
    assert {row.model for row in published.rows()} <= set(MODELS)


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.dataset != "imagenet"])
def test_cifar_models_have_the_depth_that_their_name_says(name):
    entry, network = MODELS[name], build(name).eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, entry.classes)
    # ResNet-n has n layers on its longest path: all but the 1 x 1 shortcuts, and the classifier.
    kernels = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert f"resnet{kernels.count((3, 3)) + 1}" == name.split("_")[0]


@pytest.mark.parametrize("name, size", [("resnet18", 224), ("inceptionv3", 299), ("torchvision/resnet18", 224)])
def test_imagenet_models_take_their_own_input_size(name, size):
    assert MODELS[name].input_size == size
    with torch.inference_mode():
        assert build(name).eval()(torch.zeros(1, 3, size, size)).shape == (1, MODELS[name].classes)


def test_any_classifier_of_torchvision_is_a_teacher_by_its_name(tmp_path):
    name = "torchvision/shufflenet_v2_x0_5"
    save_file(build(name).state_dict(), tmp_path / "weights.safetensors")
    teacher = load_teacher(name, tmp_path / "weights.safetensors")
    assert (teacher.entry.dataset, teacher.entry.input_size, teacher.entry.classes) == ("imagenet", 224, 1000)
    assert entry_of("torchvision/inception_v3").input_size == 299 and entry_of(NAME) is MODELS[NAME]
    with pytest.raises(UserError, match="did you mean 'torchvision/vgg16_bn'"):
        load_teacher("torchvision/vgg16bn")


@pytest.mark.parametrize("name, size", [("mobilenet_w1", 224), ("regnetx006", 224), ("inceptionv3", 299)])
def test_any_classifier_of_pytorchcv_is_a_model_by_its_name(name, size):
    entry = entry_of(f"pytorchcv/{name}")
    assert (entry.dataset, entry.input_size, entry.classes) == ("imagenet", size, 1000)
    assert published.dataset_of(entry.name) == "imagenet"  # so run_all.py takes it
    assert isinstance(build(entry.name), nn.Module)


@pytest.mark.parametrize(
    "name, told",
    [
        ("pytorchcv/mobilenet", "did you mean 'pytorchcv/mobilenet_w1'"),
        ("pytorchcv/resnet20_cifar10", "no classifier of ImageNet: it has 10 classes"),
        ("pytorchcv/centernet_resnet18_voc", "no classifier of ImageNet: it has no classes"),
        ("pytorchcv/octresnet50b_ad2", "has no published weights"),
    ],
)
def test_what_pytorchcv_cannot_give_is_told_briefly(name, told):
    with pytest.raises(UserError, match=told) as error:
        load_teacher(name)
    assert len(str(error.value)) < 300


def test_teacher_is_frozen_and_says_where_it_came_from(state, weights, tmp_path):
    teacher = load_teacher(NAME, weights)
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert (teacher.name, teacher.card, teacher.sha256) == (NAME, None, sha256(weights))
    assert str(weights) in teacher.source
    torch.save(state, tmp_path / "weights.pth")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_teacher(NAME, tmp_path / "weights.pth").network(images), teacher.network(images))


def test_normalise_and_back():
    teacher = own()
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = teacher.normalise(pixels)
    assert images[0, 1, 0, 1].item() == pytest.approx((1 / 255 - 0.4) / 0.25, abs=1e-6)
    assert torch.equal(teacher.to_pixels(images), pixels)
    assert teacher.to_pixels(torch.full((1, 3, 1, 1), 1e3)).flatten().tolist() == [255, 255, 255]


def test_own_network_becomes_a_teacher_and_stays_as_it_was():
    network = tiny().train()
    teacher = Teacher.from_module(network, 3, mean=(0.5,) * 3, std=(0.25,) * 3, name="mine", input_size=8)
    assert (teacher.name, teacher.entry.classes, len(teacher.sha256)) == ("mine", 3, 64)
    assert not teacher.network.training and network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    for mean, std in (((0.5,), (0.2, 0.2)), ((0.5,), (0.0,)), ((), ())):
        with pytest.raises(UserError, match="one number per channel, std above 0"):
            Teacher.from_module(network, 3, mean, std)


def image_set(classes: int = 3) -> ImageSet:
    pixels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    return ImageSet("ten", pixels, torch.arange(10) % 3, tuple("abcde"[:classes]), "made here")


def test_top1_is_the_percentage_of_right_answers_in_eval_mode_whatever_the_batch():
    network, teacher, images = tiny().train(), own(), image_set()
    right = teacher.network(teacher.normalise(images.pixels)).argmax(1) == images.labels
    expected = 100 * right.sum().item() / 10
    assert top1(teacher.network, images, teacher) == expected and not teacher.network.training
    before = network[1].running_mean.clone()
    assert top1(network, images, teacher.normalise, batch=3) == expected
    assert network.training and torch.equal(network[1].running_mean, before)
    with pytest.raises(UserError, match="3 classes but the images of ten have 5"):
        top1(network, image_set(5), teacher)


def test_top5_and_a_network_without_finite_logits():
    teacher, images = own(), image_set()
    assert top1(teacher.network, images, teacher).top5 == 100  # of three classes
    broken = tiny()
    broken[0].weight.data.fill_(float("nan"))
    score = top1(broken, images, teacher)
    assert score != score and score.diverged == "its logits are not finite"  # not the share of class 0


def test_weights_are_looked_for_in_the_data_folder(state, tmp_path, monkeypatch):
    monkeypatch.setenv("DFQ_DATA", str(tmp_path))
    monkeypatch.setattr("dfqlib.places.ASSETS", tmp_path / "no assets")
    (tmp_path / "teachers").mkdir()
    torch.save(state, tmp_path / "teachers" / f"{NAME}.pth")
    assert str(tmp_path / "teachers") in load_teacher(NAME, download=False).source


def test_saved_teacher_is_read_back_with_its_card(tmp_path):
    path = tmp_path / "saved.safetensors"
    network = build(NAME).to(memory_format=torch.channels_last)
    save_teacher(network, path, {"model": NAME, "top1": 12.5})
    teacher = load_teacher(NAME, path)
    assert teacher.card == {"model": NAME, "top1": 12.5, "sha256": sha256(path)}
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(teacher.network(images), network.eval()(images))
    path.with_suffix(".json").write_text(json.dumps(teacher.card | {"sha256": "0" * 64}))
    refuse(path, "is not the file that its card")


def refuse(path, match):
    with pytest.raises(UserError, match=match) as caught:
        load_teacher(NAME, path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message


def test_wrong_weights_are_refused_in_one_sentence(state, tmp_path):
    refuse(tmp_path / "none.safetensors", "is not a file")
    for suffix, save in ((".safetensors", save_file), (".pth", torch.save)):
        path = tmp_path / f"cut{suffix}"
        save(state, path)
        for size in (path.stat().st_size // 2, 0):
            path.write_bytes(path.read_bytes()[:size])
            refuse(path, "truncated")
    other = tmp_path / "other.safetensors"
    save_file(build("resnet20_cifar100").state_dict(), other)
    refuse(other, r"another architecture than resnet20_cifar10: output.weight has shape \(100, 64\)")
    save_file({"something": torch.zeros(2)}, other)
    refuse(other, "is missing, expected")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "checkpoint.pth")
    refuse(tmp_path / "checkpoint.pth", "not a state dict")
    torch.save({"model": state, "ema": state}, tmp_path / "checkpoint.pth")
    refuse(tmp_path / "checkpoint.pth", "not a state dict of tensors, but holds several: 'model', 'ema'")
    torch.save(state | {"output.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.pth")
    refuse(tmp_path / "nan.pth", "holds values that are not a number, in 'output.bias'")


def test_weights_in_a_checkpoint_and_under_a_wrapper_are_taken_out_and_said(state, tmp_path):
    path = tmp_path / "checkpoint.pth"
    wrapped = {f"module._orig_mod.{key}": value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {0: {}}, "param_groups": []}}, path)
    with pytest.warns(UserWarning, match=r"weights are its \['state_dict'\] without the prefix 'module._orig_mod.'"):
        taken = read_weights(path)
    assert taken.keys() == state.keys() and all(torch.equal(taken[key], state[key]) for key in state)


class Code:
    """Unpickling this writes a file: a weights file must not be able to."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    made, path = tmp_path / "made", tmp_path / "weights.pth"
    for save in (lambda: path.write_bytes(pickle.dumps(Code(made), 2)), lambda: torch.save(Code(made), path)):
        save()
        refuse(path, "holds code or Python objects")
    torch.save(tiny(), path)
    refuse(path, "holds code or Python objects")
    assert not made.exists()


def test_unknown_models_and_impossible_downloads_are_refused_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"model='resnet20_cifar1O' is unknown \(did you mean 'resnet20_cifar10'\?\)"):
        load_teacher("resnet20_cifar1O")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="has no published weights; train it"):
        load_teacher("resnet34_cifar100")
    with pytest.raises(UserError, match="not on this machine"):
        load_teacher("resnet18", download=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    for name in ("resnet18", "torchvision/resnet18"):
        with pytest.raises(UserError, match=f"model='{name}'.* could not be downloaded"):
            load_teacher(name)


@pytest.mark.parametrize("name", sorted(path.stem for path in ASSETS.glob("*.safetensors")))
def test_embedded_teacher_is_as_good_as_its_card_says(name):
    teacher = load_teacher(name, download=False)
    assert teacher.card["sha256"] == sha256(ASSETS / f"{name}.safetensors")
    assert "the package" in teacher.source
    assert (teacher.card["test"], teacher.card["test_images"]) == (MODELS[name].dataset, 10_000)
    assert teacher.card["top1"] >= {"cifar10": 92.5, "cifar100": 67.5}[MODELS[name].dataset]
    assert read_weights(ASSETS / f"{name}.safetensors").keys() == build(name).state_dict().keys()
    # The card's number is a whole image of 2,000 apart where another processor rounds a tie the other way.
    assert top1(teacher.network, load_test(MODELS[name].dataset), teacher) == pytest.approx(
        teacher.card["subset_top1"], abs=0.1
    )
