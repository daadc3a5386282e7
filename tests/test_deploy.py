"""Students as files: in ONNX Runtime, in torch's exported programs, and kept to be loaded again."""

import os
import subprocess
import sys
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from dfqlib import __main__ as command
from dfqlib import places
from dfqlib.bits import BitWidths
from dfqlib.data.image_sets import embedded_test
from dfqlib.deploy.export import export_onnx, run_onnx
from dfqlib.deploy.store import load_student, pack, read_header, save_student, unpack
from dfqlib.errors import UserError
from dfqlib.models.evaluate import predict
from dfqlib.models.teacher import Teacher, load_teacher
from dfqlib.models.zoo import build
from dfqlib.notebook.run import Run
from dfqlib.quantizers.calibrate import calibrated, compensated, corrected
from dfqlib.quantizers.finalise import finalise

CLASSES, MEAN, STD = 5, (0.5,) * 3, (0.25,) * 3
INTEGER = {"sites": "integer", "weights": "symmetric"}


class Hard(nn.Module):
    """What integer files get wrong: one-signed filters, negative and vanishing gains, clips, sums, joins, odd pads."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.depthwise, self.depthwise_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.point, self.point_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 4, 3, padding=1)
        self.output = nn.Linear(12, CLASSES)

    def forward(self, x):
        x = F.relu6(self.stem_norm(self.stem(F.pad(x, (0, 1, 0, 1)))))
        y = F.relu6(self.depthwise_norm(self.depthwise(x)))
        x = F.relu(x + self.point_norm(self.point(y)))
        x = torch.cat([F.max_pool2d(x, 2), F.hardswish(F.max_pool2d(self.side(x), 2))], 1)
        return self.output(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("resnet20_cifar10")


@pytest.fixture(scope="module")
def test_2k():
    return embedded_test("cifar10")


@pytest.fixture(scope="module")
def images():
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def hard(images):
    torch.manual_seed(0)
    network = Hard()
    with torch.no_grad():
        network.depthwise.weight.abs_()
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
            norm.weight[:4] = torch.tensor([-1.5, -0.2, 1e-9, 0.0])
            norm.bias.uniform_(-0.5, 0.5)
        network.train()(images)
    return network.eval()


def optimised(path, folder):
    """The graph that ONNX Runtime computes in place of the file's."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


@pytest.mark.parametrize("bits", ["W8A8", "W4A8", "W4A4", "W3A5"])
def test_a_runtime_computes_a_student_in_integers(hard, images, tmp_path, bits):
    student = calibrated(hard, BitWidths.parse(bits), images, **INTEGER)
    exported = export_onnx(student, tmp_path / "a.onnx", images)
    theirs, ours = run_onnx(tmp_path / "a.onnx")(images), finalise(student)(images)
    assert exported.agreement >= 98
    assert (ours - theirs).abs().max() < 0.1 * ours.abs().max()
    graph = optimised(tmp_path / "a.onnx", tmp_path)
    kinds = Counter(node.op_type for node in graph.node)
    assert (kinds["QLinearConv"], kinds["QGemm"], kinds["Conv"], kinds["Gemm"]) == (4, 1, 0, 0)
    assert not [w.name for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) > 1]


def test_a_file_takes_any_number_of_images(hard, images, tmp_path):
    export_onnx(calibrated(hard, BitWidths(8, 8), images, **INTEGER), tmp_path / "a.onnx", images[:1])
    run = run_onnx(tmp_path / "a.onnx")
    assert torch.equal(run(images[:1]), run(images)[:1])


@pytest.mark.parametrize("four_bits", ["table", "int4"])
def test_each_layer_is_stored_at_its_width(hard, images, tmp_path, four_bits):
    widths = {"stem": 8, "depthwise": 4, "point": 2, "side": 3, "output": 4}
    student = calibrated(hard, BitWidths(widths, 8), images, **INTEGER)
    assert export_onnx(student, tmp_path / "a.onnx", images, four_bits=four_bits).agreement >= 98
    sizes = {w.name: len(w.raw_data) for w in onnx.load(tmp_path / "a.onnx").graph.initializer}
    suffix = "packed" if four_bits == "table" else "int4"
    assert sizes["stem.levels"] == hard.stem.weight.numel()
    assert sizes[f"side.levels.{suffix}"] == hard.side.weight.numel() / 2
    assert sizes[f"point.levels.{suffix}"] == hard.point.weight.numel() / (4 if four_bits == "table" else 2)


@pytest.mark.parametrize("bits", [2, 4])
def test_layers_of_equal_levels_are_exported_once(images, tmp_path, bits):
    once, again = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    again.load_state_dict(once.state_dict())
    network = nn.Sequential(once, nn.ReLU(), again, nn.ReLU(), nn.Flatten(), nn.Linear(3 * 256, CLASSES)).eval()
    student = calibrated(network, BitWidths(bits, 8), images, **INTEGER)
    assert export_onnx(student, tmp_path / "a.onnx", images).agreement >= 98


def test_an_exported_program_gives_the_same_as_onnx(hard, images, tmp_path):
    student = calibrated(hard, BitWidths(8, 4), images, **INTEGER)
    export_onnx(student, tmp_path / "a.onnx", images)
    exported = export_onnx(student, tmp_path / "a.pt2", images, format="pt2")
    assert exported.agreement >= 98
    assert (
        torch.export.load(tmp_path / "a.pt2").module()(images).argmax(1)
        == run_onnx(tmp_path / "a.onnx")(images).argmax(1)
    ).all()


def test_the_papers_sites_export_with_what_they_leave_in_float(hard, images, tmp_path):
    student = calibrated(hard, BitWidths(8, 8), images)
    with pytest.raises(UserError, match=r"'depthwise' has channels of one sign.*weights='symmetric'"):
        export_onnx(student, tmp_path / "a.onnx", images)
    assert not (tmp_path / "a.onnx").exists()
    student = calibrated(hard, BitWidths(8, 8), images, weights="symmetric")
    assert export_onnx(student, tmp_path / "a.onnx", images).agreement >= 98


def test_resnet20_at_four_bits_is_a_sixth_of_the_float_file(teacher, test_2k, tmp_path):
    some, seen = test_2k.select(slice(0, 250)), teacher.normalise(test_2k.pixels[1000:1100])
    student = corrected(teacher.network, BitWidths(4, 4), seen, **INTEGER)
    exported = export_onnx(student, tmp_path / "a.onnx", teacher.normalise(some.pixels))
    assert exported.agreement >= 99.5
    floats = sum(4 * p.numel() for p in teacher.network.parameters())
    assert exported.bytes < 0.18 * floats
    graph = optimised(tmp_path / "a.onnx", tmp_path)
    assert {n.op_type for n in graph.node if "Conv" in n.op_type} == {"QLinearConv"}


def test_levels_are_packed_without_gaps():
    for bits in range(2, 9):
        levels = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 3, 3))
        packed = pack(levels, bits)
        assert len(packed) == -(-63 * bits // 8)
        assert torch.equal(unpack(packed, bits, levels.shape), levels.short())


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("options", [{}, INTEGER, {"bias_bits": 4}], ids=["papers", "integer", "rounded biases"])
def test_a_kept_student_gives_the_same_outputs(teacher, test_2k, tmp_path, final, options):
    some, seen = test_2k.select(slice(0, 50)), teacher.normalise(test_2k.pixels[1000:1100])
    student = calibrated(teacher.network, BitWidths(4, 4), seen, **options)
    student = finalise(student) if final else student
    save_student(student, tmp_path / "a.safetensors", teacher)
    assert (tmp_path / "a.safetensors").stat().st_size < 180_000
    kept = load_student(tmp_path / "a.safetensors", teacher, "W4A4")
    assert torch.equal(predict(kept, some, teacher), predict(student, some, teacher))
    save_student(kept, tmp_path / "b.safetensors", teacher)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_student_without_batch_norms_to_fold_is_kept(images, tmp_path):
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    own = Teacher.from_module(nn.Sequential(*layers, nn.Linear(6, CLASSES)), CLASSES, MEAN, STD, input_size=16)
    student = calibrated(own.network, BitWidths(8, 8), images, **INTEGER)
    save_student(student, tmp_path / "a.safetensors", own)
    assert torch.equal(load_student(tmp_path / "a.safetensors", own)(images), student(images))


def test_mixed_widths_and_shares_are_kept(hard, images, tmp_path):
    widths = {"stem": None, "depthwise": 4, "point": 2, "side": 3, "output": 5}
    own = Teacher.from_module(hard, CLASSES, MEAN, STD, input_size=16)
    student = compensated(own.network, BitWidths(widths, 6), images)
    save_student(student, tmp_path / "a.safetensors", own)
    assert read_header(tmp_path / "a.safetensors").bits == BitWidths(widths, 6)
    assert torch.equal(load_student(tmp_path / "a.safetensors", own)(images), student(images))


def test_another_process_gives_the_same_outputs(teacher, test_2k, tmp_path):
    images = teacher.normalise(test_2k.pixels[:20])
    student = calibrated(teacher.network, BitWidths(4, 4), images)
    save_student(student, tmp_path / "a.safetensors", teacher)
    save_file({"images": images.contiguous()}, tmp_path / "images.safetensors")
    lines = (
        "from safetensors.torch import load_file, save_file",
        "from dfqlib.deploy.store import load_student",
        "student = load_student('a.safetensors')",
        "save_file({'logits': student(load_file('images.safetensors')['images']).detach()}, 'logits.safetensors')",
    )
    kit = os.environ | {"PYTHONPATH": str(places.PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, env=kit, check=True)
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], student(images.contiguous()))


def test_another_network_and_other_widths_are_refused(teacher, hard, images, test_2k, tmp_path):
    path = tmp_path / "a.safetensors"
    save_student(calibrated(teacher.network, BitWidths(4, 4), teacher.normalise(test_2k.pixels[:20])), path, teacher)
    with pytest.raises(UserError, match="has bits=W4A4, not W8A8"):
        load_student(path, bits="W8A8")
    with pytest.raises(UserError, match=r"of resnet20_cifar10, another network: at output"):
        load_student(path, build("resnet20_cifar100"))
    with pytest.raises(
        UserError, match=r"of resnet20_cifar10 with weights from the package.*not of a network given as"
    ):
        load_student(path, Teacher.from_module(hard, CLASSES, MEAN, STD))
    own = Teacher.from_module(hard, CLASSES, MEAN, STD)
    save_student(calibrated(own.network, BitWidths(4, 4), images), path, own)
    with pytest.raises(UserError, match="'own', which is no network of the kit"):
        load_student(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        load_student(path)
    save_file({"images": images}, path)
    with pytest.raises(UserError, match="holds no student"):
        load_student(path)


def test_evaluate_scores_a_kept_student(teacher, test_2k, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    save_student(calibrated(teacher.network, BitWidths(8, 8), teacher.normalise(test_2k.pixels[:100])), path, teacher)
    assert command.main(["evaluate", str(path)]) == 0
    assert "cifar10-2k" in (said := capsys.readouterr().out) and "top-1 9" in said
    assert command.main(["evaluate", str(path), "--data", str(tmp_path / "none")]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_run_keeps_what_fits_and_only_where_asked(teacher, test_2k, tmp_path, monkeypatch, capsys):
    seen = teacher.normalise(test_2k.pixels[:100])
    student = calibrated(teacher.network, BitWidths(4, 4), seen)
    run, kept = Run("gdfq", {"out": str(tmp_path)}, teacher), tmp_path / "kept"
    made = {"W4A4": student, "generator": nn.Linear(1000, 1000), "some images": seen}
    run.keep(**made)
    assert not kept.exists()
    monkeypatch.setenv("DFQ_KEEP", "1")
    run.keep(**made)
    assert sorted(file.name for file in kept.iterdir()) == ["W4A4.safetensors", "some-images.safetensors"]
    assert "generator.safetensors is not kept" in capsys.readouterr().out
    assert sum(file.stat().st_size for file in kept.iterdir()) <= 10**6
    images = load_file(kept / "some-images.safetensors")["images"]
    assert 0 < len(images) < 100 and torch.equal(images, seen[: len(images)])
    assert torch.equal(load_student(kept / "W4A4.safetensors", teacher)(seen), student(seen))
