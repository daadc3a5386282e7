"""Which architectures the kit takes, with random weights: ``python -m benchmarks.architectures``.

Writes ``architectures.md`` and ``architectures.csv``. Needs the extras ``networks`` and ``deploy``.
"""

import argparse
import importlib
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.rows import in_process
from dfqlib.bits import BitWidths
from dfqlib.deploy.export import export_onnx
from dfqlib.device import code_version
from dfqlib.errors import UserError, first_line
from dfqlib.methods.zeroq import distil_images
from dfqlib.models.batch_norm_statistics import BatchNormInputs, batch_norms
from dfqlib.models.intake import outputs_and_norms
from dfqlib.models.teacher import Teacher
from dfqlib.models.zoo import IMAGENET_MEAN, IMAGENET_STD
from dfqlib.quantizers.calibrate import calibrated
from dfqlib.quantizers.layers import FakeQuantize, QuantizedLayer
from dfqlib.quantizers.sites import relu_sites
from dfqlib.schedules import ImageSchedule

NETWORKS = {
    "torchvision": """convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet0_5
        mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50 shufflenet_v2_x0_5 squeezenet1_1
        swin_t""",
    "pytorchcv": """darknet53 densenet40_k12_cifar10 diaresnet20_cifar10 ghostnet hardnet39ds igcv3_w1 mobilenet_w1
        mobilenetv3_small_w1 nin_cifar10 peleenet preresnet20_cifar10 proxylessnas_cpu resnet20_cifar10
        seresnet20_cifar10 shufflenet_g1_w1 shufflenetv2_wd2 sqnxt23_w2""",
    "timm": """botnet26t_256 convnext_atto cs3darknet_s dla34 ecaresnet26t edgenext_xx_small efficientformer_l1
        efficientnet_lite0 efficientvit_b0 fastvit_t8 gernet_s ghostnet_100 hrnet_w18_small lambda_resnet26t lcnet_050
        levit_128s mobilenetv3_small_100 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs nf_resnet50 regnety_002
        repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnetv2_50 rexnet_100 skresnet18 starnet_s1
        tf_efficientnet_b0 tf_efficientnet_lite0 tf_mixnet_s tf_mobilenetv3_small_100 tresnet_m visformer_tiny
        vit_tiny_patch16_224 vovnet39a""",
}
FACTORIES = {
    "torchvision": "torchvision.models:get_model",
    "pytorchcv": "pytorchcv.model_provider:get_model",
    "timm": "timm:create_model",
}
SIZES = (32, 64, 96, 224, 256, 299)  # the first that a network takes
BITS = BitWidths(8, 8)
RESULTS = Path(__file__).parent / "results"
SECONDS = 3600  # for one network, on a machine that may do other things too
COLUMNS = ("network", "input", "norms", "seen", "images", "layers", "quantized", "papers", "integer", "MB", "why")
PRELOADED = ["torchvision", "pytorchcv.model_provider", "timm", "dfqlib.models.teacher", "dfqlib.methods.zeroq"]
LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


class LayerCalls(TorchFunctionMode):
    """Counts convolutions and linear layers, modules or functions, in a pass of images that require gradients."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_weights = function in PRODUCTS and args[0].requires_grad and not args[1].requires_grad and args[1].dim() == 2
        self.count += function in LAYERS or by_weights
        return function(*args, **(kwargs or {}))


def build(name: str) -> nn.Module:
    """A network of ``library/architecture`` with random weights."""
    library, _, architecture = name.partition("/")
    module, _, function = FACTORIES[library].partition(":")
    return getattr(importlib.import_module(module), function)(architecture)


def with_statistics(network: nn.Module, images: Tensor) -> nn.Module:
    """``network`` in eval mode with the statistics of ``images``: without them the signal of a deep one overflows."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images)
    return network.eval()


def first_size(network: nn.Module) -> tuple[Tensor, int]:
    """Images of the first of ``SIZES`` that ``network`` takes, whose statistics it has then, and its classes."""
    for size in SIZES:
        images = torch.randn(4, 3, size, size)
        try:
            return images, with_statistics(network, images)(images).shape[1]
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = error
    raise reason


def look_at(name: str) -> dict[str, Any]:
    """One row of the table: what of a network is seen, made, quantized and exported, or why not."""
    torch.manual_seed(0)
    network = build(name)
    images, classes = first_size(network)
    with LayerCalls() as calls:
        network.requires_grad_(False)(images.clone().requires_grad_() + 0)
    row: dict[str, Any] = {"network": name, "input": images.shape[-1], "layers": calls.count}
    row |= {"norms": len(outputs_and_norms(network, images, name)[1]), "why": ""}

    def attempt(column: str, step: Callable[[], Any]) -> Any:
        try:
            row[column] = step()
        except Exception as error:  # the row tells whatever went wrong
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}."
            row["why"] += f"{column}: {told} "

    def seen() -> int:
        if not batch_norms(teacher.folded):
            return 0
        with torch.no_grad(), BatchNormInputs(teacher.folded) as inputs:
            teacher.folded(images)
            return len(inputs.layers)

    def student(sites: str) -> int:
        made[sites] = calibrated(teacher.network, BITS, images, sites=sites, weights="symmetric")
        return sum(isinstance(module, FakeQuantize) for module in made[sites].modules())

    def quantized() -> int:
        called = (node.target for node in made["integer"].graph.nodes if node.op == "call_module")
        return sum(isinstance(made["integer"].get_submodule(target), QuantizedLayer) for target in called)

    def exported() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return export_onnx(made["integer"], Path(folder) / "student.onnx", images).bytes / 1e6

    made: dict[str, Any] = {}
    try:
        teacher = Teacher.from_module(network, classes, IMAGENET_MEAN, IMAGENET_STD, name, input_size=images.shape[-1])
    except UserError as error:
        return row | {"why": str(error)}
    attempt("seen", seen)
    attempt("images", lambda: len(distil_images(teacher, ImageSchedule(images=2, synthesis_iterations=2)).images))
    attempt("integer", lambda: student("integer"))
    if "integer" in made:
        attempt("quantized", quantized)
        attempt("papers", lambda: student("papers") if relu_sites(made["integer"]) else 0)
        attempt("MB", exported)
    return row


def row_of(name: str) -> dict[str, Any]:
    """:func:`look_at` in a process of its own."""
    return {"network": name} | in_process(look_at, name, seconds=SECONDS, start="forkserver")


def verdict(row: Any) -> str:
    """Whether all of a network is seen, made, quantized and exported, and if not, by what it stopped."""
    if not row.taken:
        return "refused"
    student = row.quantized >= row.layers and row.integer > 0 and row.MB > 0
    if student and not row.norms:
        return "no batch norms"
    return "whole" if student and row.seen == row.norms and row.images > 0 else "in part"


def markdown(table: pd.DataFrame) -> str:
    """The table, a line for each network, below how many of each verdict there are."""
    titles = (
        "network",
        "pixels",
        "batch norms",
        "images",
        "layers",
        "after ReLUs",
        "integer sites",
        "MB",
        "what is not done",
    )
    rows = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * 7 + " --- |"]
    for row in table.itertuples():
        cells = [
            row.network,
            f"{row.input:.0f}",
            f"{row.seen:.0f} of {row.norms:.0f}",
            "yes" if row.images > 0 else "no",
        ]
        cells += [
            f"{row.quantized:.0f} of {row.layers:.0f}",
            f"{row.papers:.0f}",
            f"{row.integer:.0f}",
            f"{row.MB:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} | {row.why} |".replace("nan", "-"))
    counts = ", ".join(f"{count} {verdict}" for verdict, count in table.verdict.value_counts().items())
    return f"{len(table)} architectures: {counts}.\n\n" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__.partition("\n")[0])
    names = [f"{library}/{name}" for library, listed in NETWORKS.items() for name in listed.split()]
    parser.add_argument(
        "--networks", nargs="+", default=names, metavar="LIBRARY/NAME", help="default: all of the table"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for architectures.md and architectures.csv")
    parser.add_argument("--jobs", type=int, default=1, help="networks at once (default: 1)")
    arguments = parser.parse_args()
    # One process imports the libraries, and each network's is a fork of it.
    multiprocessing.set_forkserver_preload(PRELOADED)
    rows = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(row_of, arguments.networks):
            rows.append(row)
            print(json.dumps(row), flush=True)
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["taken"] = table.seen.notna()
    table["verdict"] = [verdict(row) for row in table.itertuples()]
    arguments.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out / "architectures.csv", index=False, float_format="%.4g")
    told = f"torch {torch.__version__}, commit {code_version()}"
    (arguments.out / "architectures.md").write_text(f"{markdown(table)}\n\n{told}\n", encoding="utf-8")
    print(f"\n{markdown(table)}\n\n{told}")


if __name__ == "__main__":
    main()
