"""Commands beside the notebooks.

python -m dfqlib quantize --model .. --out FOLDER    a network in, an integer ONNX file out, without data
python -m dfqlib evaluate FILE --data FOLDER         score a kept student on a folder of images
"""

import argparse
import shlex
import sys

from dfqlib.errors import UserError

#: The options of ``quantize``, checked by :class:`dfqlib.deploy.quantize.Request`, which has their defaults.
HELP = {
    "model": "module:function, which makes the network; torchvision/NAME, timm/NAME or dfqlib/NAME",
    "weights": "a file with its weights: safetensors, or a state dict of torch (default: those that it has, or the "
    "library's pretrained ones)",
    "mean": "mean of its input's normalisation, for pixels from 0 to 1; one number for each channel",
    "std": "standard deviation of the same normalisation, one number for each channel",
    "size": "of its images in pixels, such as 224, or 96x64, height by width",
    "logits": "the name or number of the logits where the network returns several things",
    "bits": "of weights and activations, 2 to 8 each (default: w8a8)",
    "budget": "bits a weight on average: each layer gets 2, 4 or 8, chosen so that the outputs change least",
    "out": "a folder for the ONNX file, the student and README.md",
    "images": "a folder of 8 or more images of your own, for the ranges in place of synthetic ones",
    "data": "a folder of labelled images, one folder for each class, to measure the true accuracy",
    "synthetic": "images to make (default: 128)",
    "iterations": "of their synthesis (default: 100)",
    "tune": "iterations that train the student to match the network's residual units and logits (default: 0)",
    "seed": "of the images (default: 0)",
    "device": "cpu, cuda or mps (default: the fastest one present)",
}


def evaluate(options: argparse.Namespace) -> None:
    """Print top-1 and top-5 of a student that :func:`dfqlib.deploy.store.save_student` wrote."""
    from dfqlib.deploy.store import load_student, read_header
    from dfqlib.device import pick_device
    from dfqlib.models.evaluate import images_for, top1
    from dfqlib.models.named import network_of

    header = read_header(options.file)
    entry, device = header.entry, pick_device(options.device)
    student = load_student(options.file, network_of(entry, options.model, options.logits)).to(device)
    images = images_for(entry, options.data)
    print(f"{options.file}: {header.bits} of {entry.name}, sites={header.sites!r}, weights={header.weights!r}")
    score = top1(student, images, lambda pixels: entry.normalise(pixels.to(device)))
    print(f"{images.name}: {images.source}")
    found = f"{score:.2f} ± {score.standard_error:.2f} %, top-5 {score.top5:.2f} %"
    print(f"top-1 {f'unknown: {score.diverged}' if score.diverged else found}")


def quantize(options: argparse.Namespace) -> None:
    """Quantize a network without data, and write what runs and a page about it."""
    from dfqlib.deploy.page import accuracy, write_page
    from dfqlib.deploy.quantize import Request
    from dfqlib.deploy.quantize import quantize as quantized

    given = {name: words for name in HELP if (words := getattr(options, name))}
    request = Request(**{name: Request.parse(name, ",".join(words)) for name, words in given.items()})
    made = quantized(request)
    typed = " ".join(f"--{name} {shlex.join(words)}" for name, words in given.items())
    print(f"{write_page(made, request, f'python -m dfqlib quantize {typed}')}:", *accuracy(made, request), sep="\n  ")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 for input that a user can correct; 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m dfqlib", description="Commands beside the notebooks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("quantize", help="a network in, an integer ONNX file out, without data")
    for name, text in HELP.items():
        command.add_argument(f"--{name}", nargs="+" if name in ("mean", "std") else 1, metavar=name.upper(), help=text)
    command.set_defaults(run=quantize)
    command = commands.add_parser("evaluate", help="score a kept student on a folder of images")
    command.add_argument("file", metavar="FILE", help="a student, such as kept/W4A4.safetensors of a run")
    told = "a folder of images for each class, or torchvision's layout (default: as notebooks find the data set)"
    command.add_argument("--data", metavar="FOLDER", default="", help=told)
    command.add_argument("--model", default="", help="as of quantize, if the file does not say it")
    command.add_argument("--logits", default="", help="as of quantize")
    command.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the fastest one present)")
    command.set_defaults(run=evaluate)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        return 0
    except UserError as error:
        print(f"dfqlib: {str(error).replace('data_folder=', '--data ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dfqlib: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
