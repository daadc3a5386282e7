"""Commands beside the notebooks.

python -m dfqlib evaluate FILE --data FOLDER     score a kept student on a folder of images
"""

import argparse
import importlib
import sys

from dfqlib.errors import UserError


def evaluate(options: argparse.Namespace) -> None:
    """Print top-1 and top-5 of a student that :func:`dfqlib.deploy.store.save_student` wrote."""
    from dfqlib.data.image_sets import load_test
    from dfqlib.deploy.store import load_student, read_header
    from dfqlib.device import pick_device
    from dfqlib.models.evaluate import top1

    header = read_header(options.file)
    entry, device = header.entry, pick_device(options.device)
    student = load_student(options.file, network_from(options.model) if options.model else None).to(device)
    images = load_test(entry.dataset, options.data, size=entry.input_size)
    print(f"{options.file}: {header.bits} of {entry.name}, sites={header.sites!r}, weights={header.weights!r}")
    score = top1(student, images, lambda pixels: entry.normalise(pixels.to(device)))
    print(f"{images.name}: {images.source}")
    print(f"top-1 {score:.2f} ± {score.standard_error:.2f} %, top-5 {score.top5:.2f} %{score.diverged}")


def network_from(text: str) -> object:
    """What the function that ``text`` names, as ``module:function``, returns; UserError where there is none."""
    module, _, function = text.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"model={text!r} is no module:function that can be called ({error}).") from None


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 2 for input that a user can correct; 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m dfqlib", description="Commands beside the notebooks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("evaluate", help="score a kept student on a folder of images")
    command.add_argument("file", metavar="FILE", help="a student, such as kept/W4A4.safetensors of a run")
    command.add_argument("--data", metavar="FOLDER", help="a folder of images for each class, or torchvision's layout "
                         "(default: as notebooks find the student's data set)")  # fmt: skip
    command.add_argument("--model", metavar="MODULE:FUNCTION", help="makes the network, if it is none of the kit's")
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
