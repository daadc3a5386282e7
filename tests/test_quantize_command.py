"""``python -m dfqlib quantize``: a network of one's own becomes a file that runs, or is refused before any work."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from dfqlib import __main__ as command
from dfqlib.deploy.page import accuracy
from dfqlib.deploy.quantize import suggest
from dfqlib.deploy.store import load_student, read_header
from dfqlib.generators.cost import measure
from dfqlib.models.evaluate import expected_drop
from dfqlib.models.zoo import build
from dfqlib.quantizers.mixed_precision import sensitivity
from dfqlib.scores import Score

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
NETWORK = """
import torch
from torch import nn

class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.body(x) + x

def make(channels=3, norm=nn.BatchNorm2d, unit=Unit):
    torch.manual_seed(0)
    first = [nn.Conv2d(channels, 8, 3), norm(8), nn.ReLU(), unit()]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

def grey():
    return make(1)

def plain():
    return make(norm=nn.Identity, unit=nn.Identity)

def many():
    network = make()
    network[-1] = nn.Linear(8, 1000)
    network[-1].bias.data[1] = 1000  # its answer is n01443537
    return network

def tensor():
    return torch.zeros(3)
"""
COLOUR = ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"]
SHORT = ["--size", "12", "--out", "out", "--synthetic", "8", "--iterations", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder of one's own, with a module, its weights and some images."""
    name = f"net_{tmp_path.name}".replace("-", "_")  # modules are imported once
    (tmp_path / f"{name}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    random = np.random.default_rng(0)
    for label in range(4):
        folder = tmp_path / "data" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return name


def test_readmes_lines_end_in_a_file_that_onnx_runtime_runs(here, tmp_path):
    _, _, section = README.partition("## Your own network")
    typed, python = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL)[1] for kind in ("sh", "python"))
    network = __import__(here).make()
    torch.save(network.state_dict(), "mynet.pth")
    words = typed.replace("mynet:", f"{here}:").split()[3:]
    assert command.main([*words, "--synthetic", "8", "--iterations", "2", "--data", "data", "--tune", "2"]) == 0
    lines: dict = {}
    exec(python, lines)
    assert lines["logits"].shape == (1, 4)
    page = Path("quantized/README.md").read_text()
    for told in ("Agreement", "Predicted loss of accuracy", "True accuracy", "| ONNX Runtime |", "make.onnx"):
        assert told in page
    assert Path("quantized/sensitivity.png").stat().st_size
    assert np.load("quantized/images.npy").shape == (8, 3, 32, 32)
    assert load_student("quantized/student.safetensors", network)(torch.zeros(1, 3, 32, 32)).shape == (1, 4)


def test_a_network_of_one_channel_gets_widths_under_a_budget(here, capsys):
    own = ["--model", f"{here}:grey", "--mean", "0.5", "--std", "0.25", "--budget", "4", "--data", "data"]
    assert command.main(["quantize", *own, *SHORT]) == 0
    assert "GB free" in capsys.readouterr().out
    assert set(read_header("out/student.safetensors").weight_bits.values()) <= {2, 4, 8}
    session = onnxruntime.InferenceSession("out/grey.onnx")
    assert session.run(None, {"images": np.zeros((3, 1, 12, 12), np.float32)})[0].shape == (3, 4)
    assert command.main(["evaluate", "out/student.safetensors", "--data", "data", "--model", f"{here}:grey"]) == 0
    assert re.search(r"^top-1 [\d.]+ ± [\d.]+ %", capsys.readouterr().out, re.MULTILINE)


def test_images_that_are_not_square_are_scored_and_the_command_is_shown_as_typed(here, capsys):
    for file in Path("data").glob("*/*.png"):
        Image.open(file).crop((0, 0, 10, 12)).save(file)
    own = ["--model", f"{here}:make", *COLOUR, *SHORT, "--size", "12x10", "--out", "a,b c", "--data", "data"]
    assert command.main(["quantize", *own]) == 0
    assert "--out 'a,b c'" in Path("a,b c/README.md").read_text()
    capsys.readouterr()
    for data, code, told in (("data", 0, "top-1"), (".", 2, "data")):
        typed = ["evaluate", "a,b c/student.safetensors", "--data", data, "--model", f"{here}:make"]
        assert command.main(typed) == code and told in "".join(capsys.readouterr())


def test_a_student_of_a_librarys_network_says_which(here, capsys):
    name = "torchvision/shufflenet_v2_x0_5"
    torch.save(build(name).state_dict(), "mine.pth")
    assert command.main(["quantize", "--model", name, "--weights", "mine.pth", *SHORT, "--size", "32"]) == 0
    Path("data/class0").rename("n01443537")
    Path("val").mkdir()
    Path("n01443537").rename("val/n01443537")
    assert command.main(["evaluate", "out/student.safetensors", "--data", "val"]) == 0
    assert f"W8A8 of {name}" in capsys.readouterr().out


def test_images_held_out_are_not_those_of_one_folder(here):
    for label in range(4):
        for file in Path("data", f"class{label}").iterdir():
            Image.new("RGB", (12, 12), (60 * label,) * 3).save(file)
    assert command.main(["quantize", "--model", f"{here}:make", *COLOUR, *SHORT, "--images", "data"]) == 0
    levels = np.load("out/images.npy").mean((1, 2, 3)).round(2).tolist()  # those held out come first
    assert len(set(levels)) == 4 and len(set(levels[:3])) > 1


def test_folders_of_some_classes_of_imagenet_keep_their_labels(here, capsys):
    Path("val").mkdir()
    Path("data/class0").rename("val/n01443537")
    own = ["--model", f"{here}:many", *COLOUR, *SHORT]
    assert command.main(["quantize", *own, "--data", "val"]) == 0
    assert command.main(["evaluate", "out/student.safetensors", "--data", "val", "--model", f"{here}:many"]) == 0
    assert "top-1 100.00" in capsys.readouterr().out


def test_a_network_without_batch_norms_is_told_so_and_takes_a_few_images(here, capsys):
    own = ["quantize", "--model", f"{here}:plain", *COLOUR, *SHORT]
    assert command.main(own) == 2
    assert "plain has no batch norms" in (said := capsys.readouterr().err) and "--images FOLDER" in said
    assert command.main([*own, "--images", "data", "--tune", "2"]) == 0
    assert "of your images that were not used" in Path("out/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--bits", "w9a8"], "bits='w9a8' is not supported; allowed: names such as 'W4A8'"),
        (["--size", "12x"], "size='12x' is no size"),
        (["--std", "0.25", "0", "0.25"], "std=0 is out of range"),
        (["--mean", "0.5"], "one number per channel"),
        (["--budget", "2"], "budget=2 is out of range; allowed: bits a weight from 2.5 to 8"),
        (["--weights", "none.pth"], "weights='none.pth' is not a file"),
        (["--data", "none"], "--data 'none' is not a folder"),
        (["--images", "none"], "images='none' holds no images"),
        (["--model", "none:make"], "model='none:make' is no module:function"),
        (["--model", "dfqlib/resnet21", "--bits", "w4a4"], "mean, std and size of model='dfqlib/resnet21' are known"),
        (["--model", "torchvision/resnet"], "did you mean 'torchvision/resnet"),
        (["--model", "{here}:tensor"], "it returns a Tensor"),
        (["--out", "data"], "out='data' holds files that are not from here"),
        (["--device", "gpu"], "device='gpu' is unknown"),
        (["--device", "cpu:"], "device='cpu:' names no device of this machine"),
        (["--images", "data/class0"], "images='data/class0' holds 3 images; allowed: 8 or more"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(here, capsys, options, sentence):
    typed = [option.format(here=here) for option in options]
    assert command.main(["quantize", "--model", f"{here}:make", *COLOUR, *SHORT, *typed]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and "GB free" not in said.out


def test_the_expected_drop_counts_a_change_by_the_teachers_certainty():
    teacher = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]).log()
    same, changed = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    points, error = expected_drop(teacher, torch.stack([same, changed, changed]))
    assert points == pytest.approx(100 * 0.2 / 3) and error == pytest.approx(100 * 0.2 / 3)


@pytest.mark.parametrize(("images", "share"), [(2, "100.0"), (30, "10.0")])
def test_of_few_images_no_more_than_all_can_go_unseen(images, share):
    made = SimpleNamespace(held_out=images, agreement=Score([True] * images), expected_drop=(0.0, 0.0), true=None)
    made.exported = SimpleNamespace(agreement=100.0)
    assert f"a change in up to {share} % of images" in accuracy(made, SimpleNamespace(images=""))[0]


def test_the_batch_is_what_the_memory_allows():
    def step(images):
        x = torch.ones(images, 1000, requires_grad=True)
        x.exp().exp().sum().backward()  # keeps both results, 8,000 bytes an image

    cost = measure(step, 1000, torch.device("cpu"))
    assert cost.batch == 250 and cost.bytes == 250 * 1.5 * 8000 <= cost.free


def test_the_least_budget_rounds_small_layers_up_to_bytes():
    network = nn.Sequential(nn.Flatten(), nn.Linear(10, 5))
    measured = sensitivity(network, torch.randn(4, 10), bits=[2, 4, 8])
    assert suggest(network, measured, 2).bits == {"1": 2}  # 50 weights of 2 bits fill 13 bytes


def test_suggested_widths_fit_the_budget():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    found = suggest(network, sensitivity(network, torch.randn(4, 3, 8, 8)), 4)
    weights = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    assert set(found.bits) == {"0", "2", "4"} and found.size <= weights * 4 / 8
