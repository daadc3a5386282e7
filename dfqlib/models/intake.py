"""A network that a user brings, as the kit works with it, and checked to be the same network."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dfqlib.errors import UserError, first_line
from dfqlib.models.batch_norm_statistics import BatchNormInputs, batch_norms
from dfqlib.models.plain_copy import is_frozen_norm, plain_copy
from dfqlib.quantizers.trace import norm_name, trace

TOLERANCE, COARSE_TOLERANCE = 1e-3, 0.1  # of the largest logit: rounding in float32, and in 16 bits


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside of DataParallel, DistributedDataParallel or torch.compile's wrapper."""
    while type(network).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        network = next(network.children())
    return network


def prepare(network: nn.Module, images: Tensor, classes: int | None, logits: str | int | None = None) -> nn.Module:
    """A float32 copy of ``network`` in eval mode in layers that synthesis and students see; ``network`` stays as it is.

    The copy takes images of the size of ``images`` (B, C, H, W) and returns logits (B, ``classes``), of any number for
    None; ``logits`` names them where the network returns several things. It is the network itself where each batch norm
    that runs is a module and torch.fx can trace it; else its graph for images of this size. Either way it is checked on
    ``images``: the same logits, and the same batch norms in the same order as run in ``network``. UserError if no copy
    is the same, for numbers that are not finite, and for outputs that are not as said: one logit, or probabilities.
    """
    name = f"network={type(network).__name__}"
    if isinstance(network, torch.jit.ScriptModule):
        raise UserError(f"{name} is a TorchScript module, whose layers cannot be replaced; pass the Python network.")
    refuse_nan(tensors_of(network), name)
    images = images.to(next(network.parameters(), images).device)  # where the copy is compared, too
    outputs, norms = outputs_and_norms(network, images, name)
    expected = _named(outputs, logits, name).float()
    expected_alone = _named(outputs_and_norms(network, images[:1], name)[0], logits, name).float()
    if expected.dim() != 2 or expected.shape != (len(images), classes or expected.shape[1]):
        told = f"{name} returns {tuple(expected.shape)} for {len(images)} images"
        raise UserError(f"{told}; allowed: ({len(images)}, {classes or 'classes'}), for classes={classes}.")
    if expected.shape[1] < 2:
        raise UserError(f"{name} returns {expected.shape[1]} logit per image; allowed: 2 or more, one for each class.")
    if not expected.isfinite().all():
        raise UserError(f"{name} returns logits that are not finite for images of mean 0 and standard deviation 1.")
    if (expected >= 0).all() and ((expected.sum(1) - 1).abs() < 0.01).all():  # the sum is rounded in 16 bits
        told = f"{name} returns probabilities; allowed: logits"
        raise UserError(f"{told}, so pass it without its softmax, or say logits= if it returns several things.")
    # What a deep network makes of the rounding that another batch brings, a copy may be off, too.
    scale, rounding = expected.abs().max().clamp(min=1e-6), (expected[:1] - expected_alone).abs().max()
    coarse = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in network.parameters())
    limit = COARSE_TOLERANCE if coarse else min(TOLERANCE + 10 * rounding / scale, COARSE_TOLERANCE)
    copied = plain_copy(network).float()
    if not isinstance(outputs, Tensor):
        copied.__class__ = _returning(type(copied), logits, name)

    def difference(candidate: nn.Module) -> str:
        """What ``candidate`` does not have of the network, in words; nothing if it is the same."""
        try:
            found, seen = _seen(candidate, images)
            alone, _ = _seen(candidate, images[:1])
        except (RuntimeError, ValueError, TypeError) as error:
            return f"in plain layers it fails ({first_line(error)})"
        if seen != norms:
            missing = [repr(norm) for norm in norms if norm not in seen] or ["in another order"]
            return f"its batch norms {', '.join(missing)} would not be seen"
        error = torch.cat([found - expected, alone - expected_alone]).abs().max() / scale
        return "" if error <= limit else f"without its hooks, in plain layers, its logits are {error:.1%} off"

    for size in (None, images[:-1]):  # a graph for one batch that holds for another
        try:
            traced = trace(copied, size)
        except UserError as error:
            reason = str(error)
            continue
        if not (reason := difference(traced)):
            return copied if size is None and not difference(copied) else traced
    if not difference(copied):
        return copied  # whose images can be made, though no student
    raise UserError(f"{name} cannot be used as it is: {reason.removesuffix('.')}.")


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``network`` without what its modules keep beside tensors, as ``get_extra_state`` allows."""
    return {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}


def refuse_nan(state: Mapping[str, Tensor], told: str) -> None:
    """UserError if a tensor of ``state`` holds NaN; ``told`` says whose state it is."""
    for key, value in state.items():
        if value.isnan().any():
            raise UserError(f"{told} holds values that are not a number, in {key!r}.")


class _BatchNormCalls(TorchFunctionMode):
    """The names of the batch norms with fixed statistics that run in ``network``, modules or not, in order."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        tensors = [*network.named_buffers(remove_duplicate=False), *network.named_parameters(remove_duplicate=False)]
        self.name_of = {id(tensor): norm_name(name) for name, tensor in tensors}
        self.names: list[str] = []
        frozen = [(name, module) for name, module in network.named_modules() if is_frozen_norm(module)]
        self.hooks = [module.register_forward_hook(functools.partial(self._after, name)) for name, module in frozen]

    def _after(self, name: str, *_: Any) -> None:
        if name not in self.names[-1:]:  # it was no call of a function below
            self.names.append(name)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.batch_norm, torch.batch_norm):
            place = 1 if function is F.batch_norm else 3
            mean = kwargs.get("running_mean", args[place] if len(args) > place else None)
            training = kwargs.get("training", args[5] if len(args) > 5 else False)
            if mean is not None and not training:
                self.names.append(self.name_of.get(id(mean), "of computed statistics"))
        return function(*args, **kwargs)


def outputs_and_norms(network: nn.Module, images: Tensor, name: str) -> tuple[Any, list[str]]:
    """What ``network`` returns in eval mode, with its hooks, and the batch norms that run; its mode is restored."""
    modes = {module: module.training for module in network.modules()}
    first, calls = next(network.parameters(), images), _BatchNormCalls(network)
    try:
        network.eval()
        with torch.no_grad(), calls:
            return network(images.to(first.device, first.dtype)), calls.names
    except Exception as error:  # whatever the network's own code raises
        told = f"{name} cannot take images of shape {tuple(images.shape[1:])} ({first_line(error)})"
        raise UserError(f"{told}; input_size, mean and std say what it is given.") from error
    finally:
        for hook in calls.hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode


def _seen(network: nn.Module, images: Tensor) -> tuple[Tensor, list[str]]:
    """The logits of ``network``, and the names of the batch norms whose inputs synthesis would look at."""
    with torch.no_grad():
        if not batch_norms(network):
            return network(images), []
        with BatchNormInputs(network) as inputs:
            return network(images), [layer.name.partition(":")[0] for layer in inputs.layers]


def _named(outputs: Any, key: str | int | None, name: str) -> Any:
    """The logits among the ``outputs`` of a network; UserError, which lists what there is, if ``key`` names none."""
    if isinstance(outputs, Tensor | fx.Proxy) and key is None:
        return outputs
    if isinstance(outputs, list | tuple) and not hasattr(outputs, "_asdict"):
        held: Mapping[Any, Any] = dict(enumerate(outputs))
    elif isinstance(outputs, Mapping):
        held = outputs
    else:
        held = outputs._asdict() if hasattr(outputs, "_asdict") else getattr(outputs, "__dict__", {})
    tensors = {str(each): value for each, value in held.items() if isinstance(value, Tensor | fx.Proxy)}
    if str(key) not in tensors:
        listed = ", ".join(f"{each!r} {tuple(value.shape)}" for each, value in tensors.items())
        raise UserError(f"logits={key!r} names none of what {name} returns, a {type(outputs).__name__} of {listed}.")
    return tensors[str(key)]


def _returning(kind: type[nn.Module], key: str | int | None, name: str) -> type[nn.Module]:
    """The class ``kind`` whose networks return their logits alone."""

    def forward(self: nn.Module, images: Tensor) -> Any:
        return _named(kind.forward(self, images), key, name)

    return type(kind.__name__, (kind,), {"forward": forward})
