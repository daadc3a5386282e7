"""A teacher: a frozen full-precision network with its normalisation, and where its weights come from."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorchcv.models.common import model_store
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dfqlib import places
from dfqlib.data.image_sets import require_network
from dfqlib.device import channels_last, pick_device
from dfqlib.errors import UserError, check_choice
from dfqlib.files import atomic_path, sha256, write_json
from dfqlib.models.zoo import MODELS, ModelEntry, build
from dfqlib.speed.fold_batch_norms import fold_batch_norms
from dfqlib.speed.switches import uses


class Teacher:
    """A frozen network in eval mode, with its normalisation, and a record of where its weights came from.

    ``source`` is one sentence, ``sha256`` the digest of the weights file, ``card`` the training record beside it
    (recipe, epochs, seed, hardware, commit, accuracy) or None. Any network becomes a teacher with
    :meth:`from_module`.
    """

    def __init__(
        self, network: nn.Module, entry: ModelEntry, source: str, sha256: str, card: dict[str, Any] | None = None
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.entry = entry
        self.name = entry.name
        self.source = source
        self.sha256 = sha256
        self.card = card

    @classmethod
    def from_module(
        cls,
        network: nn.Module,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        name: str = "own",
        dataset: str = "own",
        input_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> Teacher:
        """A teacher from any network that maps normalised images (N, len(mean), H, W) to logits (N, ``classes``).

        ``mean`` and ``std`` are per channel, for pixels scaled to [0, 1]. The network is copied, so the one given
        keeps its mode and its gradients.
        """
        if not len(mean) == len(std) > 0 or not all(value > 0 for value in std):
            raise UserError(
                f"mean={mean!r}, std={std!r} do not fit; allowed: one number per channel each, std above 0."
            )
        entry = ModelEntry(name, dataset, "own", input_size, input_size, classes, tuple(mean), tuple(std))
        network = _place(copy.deepcopy(network), device)
        return cls(network, entry, f"a network given as {type(network).__name__}", _state_digest(network))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def folded(self) -> nn.Module:
        """The same function for a synthesis to look at: :func:`dfqlib.folding.fold_batch_norms` of the network."""
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
    ``$DFQ_DATA/teachers/<name>.safetensors`` (or ``.pth``). Downloads come from pytorchcv, or from torchvision for
    names such as ``torchvision/resnet18``. Raises :class:`UserError` for an unknown name, a file that is missing,
    truncated, of another architecture or holds code, and a download that is not possible.
    """
    entry = MODELS[check_choice("model", name, MODELS)]
    network = build(name)
    path = places.weights_file(name, weights or "")
    if path is not None:
        state = read_weights(path)
        _load_state(network, state, f"weights={str(path)!r}", name)
        card = _read_card(path)
        where = "the package" if path.parent == places.ASSETS else f"the file {path}"
    else:
        path = _download_weights(entry, download)
        state = {key: value for key, value in read_weights(path).items() if key in network.state_dict()}
        _load_state(network, state, f"download {path.name}", name)
        card = None
        where = f"{entry.factory.partition('.')[0]}'s pretrained weights ({path.name})"
    return Teacher(_place(network, device), entry, f"{name} with weights from {where}", sha256(path), card)


def save_teacher(network: nn.Module, path: str | Path, card: Mapping[str, Any]) -> None:
    """Write ``network``'s weights to ``path`` (.safetensors) and ``card`` with their SHA-256 beside it as JSON.

    The card is what :attr:`Teacher.card` gives when :func:`load_teacher` reads the file again.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        save_file({key: value.cpu().contiguous() for key, value in network.state_dict().items()}, temporary)
    write_json(path.with_suffix(".json"), {**card, "sha256": sha256(path)})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a safetensors file, or from a file of torch that holds tensors only; never runs its code."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights={str(path)!r} is not a file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"weights={str(path)!r} is truncated or not a weights file ({_first_line(error)}).") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"weights={str(path)!r} holds code or Python objects beside tensors, so it is not loaded; allowed: "
            "safetensors, or a state dict of tensors."
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"weights={str(path)!r} is not a state dict of tensors.")
    return dict(state)


def _download_weights(entry: ModelEntry, download: bool) -> Path:
    """The library's pretrained weights file, fetched unless an earlier call left it in the library's own folder."""
    library, architecture = entry.factory.partition(".")[0], entry.factory.partition(":")[2]
    if library == "dfqlib":
        raise UserError(
            f"model={entry.name!r} has no published weights; train it with notebooks/00_teachers.ipynb, "
            "or give weights=."
        )
    if library == "torchvision":
        weights = importlib.import_module("torchvision.models").get_model_weights(architecture).IMAGENET1K_V1
        url, path = weights.url, Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    else:
        error, digest, release = model_store.get_model_name_suffix_data(architecture)
        file = f"{architecture}-{error}-{digest[:8]}.pth"
        url = f"{model_store.imgclsmob_repo_url}/releases/download/{release}/{file}.zip"
        path = Path("~/.torch/models").expanduser() / file
    if path.is_file():
        return path
    if not download:
        raise UserError(
            f"model={entry.name!r}: its weights are not on this machine; allowed: download=True or weights=."
        )
    require_network(url, f"model={entry.name!r}: its weights")
    try:
        if library == "torchvision":
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, os.fspath(path), hash_prefix=path.stem.rpartition("-")[2])
        else:
            model_store.get_model_file(architecture, os.fspath(path.parent))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"model={entry.name!r}: {url} could not be downloaded ({_first_line(error)}).") from None
    return path


def _load_state(network: nn.Module, state: Mapping[str, Tensor], told: str, name: str) -> None:
    expected = network.state_dict()
    # Batch norm's step counter is not used in eval mode, and files of other tools leave it out.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in expected]
    shapes = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or extra or shapes:
        key = (shapes or missing or extra)[0]
        found = f"has shape {tuple(state[key].shape)}" if key in state else "is missing"
        wanted = f"{tuple(expected[key].shape)}" if key in expected else "no such tensor"
        raise UserError(f"{told} is of another architecture than {name}: {key} {found}, expected {wanted}.")
    network.load_state_dict(state, strict=False)


def _read_card(path: Path) -> dict[str, Any] | None:
    """The training record ``<weights>.json`` beside the weights, checked to be about this very file."""
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        return None
    card = json.loads(card_path.read_text(encoding="utf-8"))
    if card.get("sha256", sha256(path)) != sha256(path):
        raise UserError(f"weights={str(path)!r} is not the file that its card {card_path.name} describes (sha256).")
    return card


def _place(network: nn.Module, device: str | torch.device) -> nn.Module:
    return channels_last(network.to(pick_device(device) if isinstance(device, str) else device))


def _state_digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
