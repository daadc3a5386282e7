"""A copy of a network whose layers are torch's own wherever that computes the same."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from dfqlib.quantizers.layers import QUANTIZED

_PLAIN = *QUANTIZED, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_WEIGHT_HOOKS = WeightNorm, SpectralNorm, prune.BasePruningMethod


def plain_copy(network: nn.Module) -> nn.Module:
    """A copy of ``network`` in eval mode without hooks, in plain layers; ``network`` is left as it is.

    Weights that a hook or a parametrization of torch computes (weight and spectral norm, pruning) are computed once and
    kept. Frozen batch norms, SyncBatchNorm and subclasses that compute nothing of their own become the plain class.
    """
    memo = {}
    for module in network.modules():
        for kind in _HOOKS:  # they may hold what cannot be copied, and would run on torch.fx's proxies
            hooks = getattr(module, kind)
            memo[id(hooks)] = type(hooks)((key, hook) for key, hook in hooks.items() if isinstance(hook, _WEIGHT_HOOKS))
        held = [value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
        memo |= {id(value): value.detach().clone() for value in held}
    copied = copy.deepcopy(network, memo).eval()
    with torch.no_grad():
        for name, module in list(copied.named_modules()):
            keep_computed_weights(module)
            for kind in _PLAIN:
                if isinstance(module, kind) and _computes_as(module, kind):
                    module.__class__ = kind
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = _Norm
            elif (norm := _thawed(module)) and name:
                copied.set_submodule(name, norm)
    return copied


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether ``module`` keeps statistics as a batch norm does, but is none of torch's."""
    kept = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return not isinstance(module, nn.modules.batchnorm._NormBase) and all(isinstance(each, Tensor) for each in kept)


def keep_computed_weights(module: nn.Module) -> None:
    """Keep, as parameters of ``module``, the weights that its hooks or parametrizations compute."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
    if parametrize.is_parametrized(module):
        computed = {name: getattr(module, name).detach() for name in module.parametrizations}
        # torch's own removal would take it from the class, which the given network shares.
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for name, value in computed.items():
            module.register_parameter(name, nn.Parameter(value))


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the class of ``module`` overrides nothing that ``kind``, its base, computes with."""
    parts = "__call__", "forward", "_conv_forward", "_check_input_dim", "weight", "bias"
    return all(getattr(type(module), part, None) is getattr(kind, part, None) for part in parts)


class _Norm(nn.BatchNorm2d):
    """A batch norm of inputs of any number of dimensions, followed by its own children, such as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        for child in self.children():
            x = child(x)
        return x


def _thawed(module: nn.Module) -> nn.Module | None:
    """A batch norm of torch in place of a frozen one, if it computes the same on random numbers; else None."""
    if not is_frozen_norm(module):
        return None
    norm = (_Norm if list(module.children()) else nn.BatchNorm2d)(
        len(module.running_mean), getattr(module, "eps", 1e-5), device="meta"
    ).eval()
    for name, neutral in (("weight", torch.ones_like), ("bias", torch.zeros_like)):
        value = getattr(module, name, None)
        value = value.detach() if isinstance(value, Tensor) else neutral(module.running_mean)
        setattr(norm, name, nn.Parameter(value, False))
    norm.running_mean, norm.running_var, norm.num_batches_tracked = module.running_mean, module.running_var, None
    for name, child in module.named_children():
        norm.add_module(name, child)
    x = torch.randn(2, len(module.running_mean), 3, 3, generator=torch.Generator().manual_seed(0))
    try:
        x = x.to(module.running_mean)
        return norm if torch.allclose(norm(x), module(x), rtol=1e-3, atol=1e-5) else None
    except Exception:  # whatever code that is not known here raises
        return None
