"""A teacher: a frozen full-precision network with its normalisation, and where its weights come from."""

import functools
import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from pytorchcv.models.common import model_store
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dfqlib import files, places
from dfqlib.data.image_sets import require_network
from dfqlib.device import channels_last, pick_device
from dfqlib.errors import UserError, first_line
from dfqlib.models import intake
from dfqlib.models.zoo import ModelEntry, build, entry_of, torchvision_weights
from dfqlib.speed.fold_batch_norms import fold_batch_norms
from dfqlib.speed.switches import uses

WRAPPERS = "module.", "_orig_mod."  # what DataParallel and torch.compile put before the names of weights


@dataclass(eq=False, repr=False)
class Teacher:
    """A frozen network in eval mode, with its normalisation and the origin of its weights.

    ``source`` is one sentence, ``sha256`` the digest of the weights file, ``card`` the training record beside it
    (recipe, epochs, seed, hardware, commit, accuracy) or None.

    Pass ``network`` wherever a network is inspected, copied (to quantize, to describe, to probe with a
    :class:`~dfqlib.finetuning.network_views.NetworkProbe`) or measured; ``folded`` to the loops that only need its
    logits, its batch-norm inputs and the gradient of the images (synthesis, generators, fine-tuning batches). Pass a
    student as :func:`~dfqlib.quantizers.convert.quantize_model` made it: the loops that run it scale its weights
    themselves (:func:`~dfqlib.speed.scale_weights.scale_weights`) and hand out no scaled network.
    """

    network: nn.Module
    entry: ModelEntry
    source: str
    sha256: str
    card: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)

    @classmethod
    def from_module(
        cls,
        network: nn.Module,
        classes: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "own",
        dataset: str = "own",
        input_size: int | tuple[int, int] = 32,
        device: str | torch.device = "cpu",
        logits: str | int | None = None,
    ) -> Self:
        """A teacher from any network that maps normalised images (N, len(mean), H, W) to logits (N, ``classes``).

        ``classes`` None takes as many as the network returns.
        ``mean`` and ``std`` are per channel, for pixels scaled to [0, 1]; ``input_size`` is height and width, or one
        number for both; ``logits`` names the logits where the network returns a dict, a tuple or a dataclass. The
        network is copied, in float32 and in layers the kit knows, as :func:`~dfqlib.models.intake.prepare` does: the
        one given keeps its mode and its gradients. UserError, which says why, if that is not possible.
        """
        if not len(mean) == len(std) > 0 or not all(value > 0 for value in std):
            raise UserError(f"mean={mean!r}, std={std!r} do not fit; allowed: one number per channel, std above 0.")
        entry = ModelEntry(name, dataset, "own", input_size, classes or 0, tuple(mean), tuple(std))
        given, network = type(network).__name__, intake.unwrapped(network)
        digest = hashlib.sha256()
        for key, value in intake.tensors_of(network).items():
            digest.update(key.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        source, dtypes = f"a network given as {given}", {parameter.dtype for parameter in network.parameters()}
        if changed := sorted(map(str, dtypes - {torch.float32})):
            source += f", converted from {' and '.join(changed)} to float32"
            warnings.warn(f"{source}.", stacklevel=2)
        images = torch.randn(3, *entry.image_shape, generator=torch.Generator().manual_seed(0))
        prepared = intake.prepare(network, images, classes, logits).to(device := pick_device(device))
        with torch.no_grad():
            entry = replace(entry, classes=prepared(images.to(device)).shape[1])
        return cls(channels_last(prepared), entry, source, digest.hexdigest())

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def folded(self) -> nn.Module:
        """The same function with its batch norms folded into its convolutions."""
        return self._folded if uses("folded_batch_norms") else self.network

    @functools.cached_property
    def _folded(self) -> nn.Module:
        return fold_batch_norms(self.network)

    def normalise(self, pixels: Tensor) -> Tensor:
        """What the network takes, on its device: uint8 (N, C, H, W) -> float32; see :meth:`ModelEntry.normalise`."""
        return self.entry.normalise(pixels.to(self.device))

    def to_pixels(self, images: Tensor) -> Tensor:
        """Inverse of :meth:`normalise`, rounded and clipped, for showing: float32 (N, C, H, W) -> uint8 on the CPU."""
        return self.entry.to_pixels(images).cpu()


def load_teacher(
    name: str, weights: str | Path | None = None, device: str | torch.device = "cpu", download: bool = True
) -> Teacher:
    """The trained teacher ``name``, with weights from the first of: ``weights``, the package, a local file, a download.

    ``weights`` is a file: safetensors, or a state dict saved by torch that holds tensors only. The local file is
    ``$DFQ_DATA/teachers/<name>.safetensors`` (or ``.pth``). Downloads come from pytorchcv or torchvision, with which
    ``name`` may begin, as in ``torchvision/vgg16_bn``. Raises :class:`UserError` for an unknown name, a file that is
    missing, truncated, of another architecture or holds code, and a download that is not possible.
    """
    entry, network = entry_of(name), build(name)
    given = places.weights_file(name, weights or "")
    path = given or _download_weights(entry, download)
    told = f"weights={str(path)!r}"
    origin = "the package" if path.parent == places.ASSETS else f"the file {path}"
    if given is None:
        origin = f"{entry.library}'s pretrained weights ({path.name})"
    load_weights(network, path, name, whole=given is not None)
    digest, beside = files.sha256(path), path.with_suffix(".json")
    card = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    if card and card.get("sha256", digest) != digest:
        raise UserError(f"{told} is not the file that its card {beside.name} describes (sha256).")
    network = channels_last(network.to(pick_device(device)))
    return Teacher(network, entry, f"{name} with weights from {origin}", digest, card)


def save_teacher(network: nn.Module, path: str | Path, card: Mapping[str, Any]) -> None:
    """Write ``network``'s weights to ``path`` (.safetensors) and ``card`` with their SHA-256 beside it as JSON.

    The card is what :attr:`Teacher.card` gives when :func:`load_teacher` reads the file again.
    """
    path = Path(path)
    with files.atomic_path(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, temporary)
    files.write_json(path.with_suffix(".json"), {**card, "sha256": files.sha256(path)})


def load_weights(network: nn.Module, path: str | Path, name: str | None = None, whole: bool = True) -> None:
    """Give ``network``, called ``name`` in errors, the weights in a file that :func:`read_weights` reads.

    UserError if they are of another architecture or not numbers. With ``whole`` off the file may hold more than the
    network does, such as the auxiliary classifiers in a library's file.
    """
    state, own, told = read_weights(path), intake.tensors_of(network), f"weights={str(path)!r}"
    if not whole:
        state = {key: value for key, value in state.items() if key in own}
    # Eval mode does not use batch norm's step counter, and files of other tools leave it out.
    expected, found = (
        {key: tuple(value.shape) for key, value in each.items() if not key.endswith("num_batches_tracked")}
        for each in (own, state)
    )
    for key in expected | found:
        if found.get(key) != expected.get(key):
            has = f"has shape {found[key]}" if key in found else "is missing"
            wanted, known = expected.get(key, "no such tensor"), name or type(network).__name__
            raise UserError(f"{told} is of another architecture than {known}: {key} {has}, expected {wanted}.")
    intake.refuse_nan(state, told)
    network.load_state_dict(state, strict=False)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a file of torch that holds tensors only; never runs its code.

    A state dict that lies in a checkpoint, as in {"epoch": 3, "state_dict": ...}, is taken out, and so are the prefixes
    of DataParallel and torch.compile; a warning says so.
    """
    path, told = Path(path), f"weights={str(path)!r}"
    if not path.is_file():
        raise UserError(f"{told} is not a file.")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{told} is truncated or not a weights file ({first_line(error)}).") from None
    except pickle.UnpicklingError:
        held = "holds code or Python objects beside tensors, so it is not loaded"
        raise UserError(f"{told} {held}; allowed: safetensors, or a state dict of tensors.") from None
    return _bare(state, told)


def _bare(state: Any, told: str) -> dict[str, Tensor]:
    """The state dict inside of ``state``, without prefixes; a warning says where it was."""
    taken = ""
    while not _is_state(state):
        inner = [key for key, part in state.items() if isinstance(part, Mapping)] if isinstance(state, Mapping) else []
        inner = [key for key in inner if _is_state(state[key])] or inner
        if len(inner) != 1:
            several = f", but holds several: {', '.join(map(repr, inner))}" if inner else ""
            raise UserError(f"{told} is not a state dict of tensors{several}.")
        taken, state = f"{taken}[{inner[0]!r}]", state[inner[0]]
    state, prefixes = dict(state), ""
    while wrapper := next((each for each in WRAPPERS if all(key.startswith(each) for key in state)), ""):
        state, prefixes = {key.removeprefix(wrapper): value for key, value in state.items()}, prefixes + wrapper
    if taken or prefixes:
        without = f" without the prefix {prefixes!r}" if prefixes else ""
        warnings.warn(f"{told}: the weights are its {taken or 'tensors'}{without}.", stacklevel=4)
    return state


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(each, Tensor) for each in value.values())


def _download_weights(entry: ModelEntry, download: bool) -> Path:
    """The library's pretrained weights file, fetched unless an earlier call left it in the library's own folder."""
    told, architecture = f"model={entry.name!r}", entry.factory.partition(":")[2]
    if entry.library == "dfqlib":
        raise UserError(f"{told} has no published weights; train it with notebooks/00_teachers.ipynb or give weights=.")
    if entry.library == "torchvision":
        url = torchvision_weights(architecture).url
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    else:
        error, digest, release = model_store.get_model_name_suffix_data(architecture)
        if release == "NA":
            raise UserError(f"{told} has no published weights; give weights=.")
        path = places.expand("~/.torch/models") / f"{architecture}-{error}-{digest[:8]}.pth"
        url = f"{model_store.imgclsmob_repo_url}/releases/download/{release}/{path.name}.zip"
    if path.is_file():
        return path
    if not download:
        raise UserError(f"{told}: its weights are not on this machine; allowed: download=True or weights=.")
    require_network(url, f"{told}: its weights")
    try:
        if entry.library == "torchvision":
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, os.fspath(path), hash_prefix=path.stem.rpartition("-")[2])
        else:
            model_store.get_model_file(architecture, os.fspath(path.parent))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{told}: {url} could not be downloaded ({first_line(error)}).") from None
    return path
