"""Turn a trained network into its quantized student."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import register_parametrization

from dfqlib.bits import BitWidths, Width
from dfqlib.errors import UserError, check_choice
from dfqlib.quantizers.layers import QUANTIZED, FakeQuantize, RoundedBias
from dfqlib.quantizers.observers import OBSERVERS, CommonRange, KnownRange, RunningMinMax
from dfqlib.quantizers.sites import NONLINEARITIES, integer_sites, operation, relu_sites
from dfqlib.quantizers.trace import trace, weight_layers

Range = tuple[Tensor | float, Tensor | float]  # low and high, one for each channel (C, 1, 1) or one for all
SITES = {"papers": relu_sites, "integer": integer_sites}
WEIGHTS = "asymmetric", "symmetric"
INPUT_BITS = 8  # as the pixels have


def quantize_model(
    model: nn.Module,
    bits: BitWidths,
    observer: str | Callable[[], RunningMinMax] = "moving_average",
    sites: str = "papers",
    weights: str = "asymmetric",
    input_range: Range | None = None,
    bias_bits: int | None = None,
) -> fx.GraphModule:
    """A quantized copy of ``model`` to calibrate or fine-tune; ``model`` and its hooks are left as they are.

    Every layer of ``QUANTIZED``, first and last included, becomes one that fake-quantizes its weight per output
    channel: over its min and max (``weights`` "asymmetric", as in the papers) or with a zero point of 0 ("symmetric",
    as integer kernels want it: :func:`.fake_quantize.channel_ranges`). Its bias stays in float, as in the papers, or is
    fake-quantized to ``bias_bits`` over its own min and max.

    A :class:`FakeQuantize` with an observer of its own follows each of ``sites``. "papers": each call of a ReLU or
    ReLU6, whether module or function, and nothing else; the input, linear bottlenecks and pooled features stay in
    float, as in the papers' code. "integer": all that an integer runtime needs on a grid, see
    :func:`.sites.integer_sites`. There every range holds 0, and the input has the 8 bits of its pixels whatever
    ``bits`` says for all activations; ``input_range`` is what black and white pixels become; None observes it.

    The copy is in eval mode (batch-norm statistics frozen) and all its parameters require gradients. Activation ranges
    must be learned before use: ``with observing(student): student(images)``.

    bits: for all layers, or by layer. observer: a name in ``OBSERVERS`` or a function that makes one.
    Raises UserError for missing or unknown layers, for bits that apply to nothing, and for a model that torch.fx cannot
    trace, naming the part.
    """
    make_observer = OBSERVERS[check_choice("observer", observer, OBSERVERS)] if isinstance(observer, str) else observer
    integer = check_choice("sites", sites, SITES) == "integer"
    symmetric = check_choice("weights", weights, WEIGHTS) == "symmetric"
    student = trace(model)
    if integer:
        _remove_identities(student)
    found, activation = SITES[sites](student), bits.activation
    if activation is not None and not found:
        _refuse_activation_bits(student, activation, sites)
    if integer and isinstance(activation, int):
        inputs = [site for site, (first, *_) in found.items() if first.op == "placeholder"]
        activation = dict.fromkeys(found, activation) | dict.fromkeys(inputs, INPUT_BITS)
    for name, width in _by_name("weight", bits.weight, weight_layers(student)).items():
        layer = student.get_submodule(name)
        student.add_submodule(name, QUANTIZED[type(layer)](layer, width, symmetric))
        if bias_bits is not None and layer.bias is not None:
            register_parametrization(student.get_submodule(name), "bias", RoundedBias(bias_bits))
    for site, width in _by_name("activation", activation, list(found)).items():
        if width is None:
            continue
        observers = [
            KnownRange(*input_range) if input_range and node.op == "placeholder" else make_observer()
            for node in found[site]
        ]
        quantizer = FakeQuantize(width, CommonRange(observers) if integer else observers[0], site)
        for part, node in enumerate(found[site]):
            _insert_after(student, node, f"fake_quantize.{found[site][0].name}", quantizer, [part] if integer else [])
    student.graph.lint()
    student.recompile()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return student.to(device).eval().requires_grad_(True)


def _remove_identities(model: fx.GraphModule) -> None:
    """Take out what computes nothing in eval mode, so that a ReLU is seen right after its batch norm."""
    for node in model.graph.nodes:
        if node.op == "call_module" and operation(model, node).startswith(("identity", "dropout")):
            node.replace_all_uses_with(node.all_input_nodes[0])
            model.graph.erase_node(node)


def _refuse_activation_bits(model: fx.GraphModule, bits: object, sites: str) -> None:
    """UserError for activation bits that apply to nothing, which names the nonlinearities that there are."""
    found = sorted({operation(model, node) for node in model.graph.nodes} & NONLINEARITIES) or ["none"]
    held = f"activation bits={bits!r} apply to nothing: sites={sites!r} are"
    if sites == "integer":
        raise UserError(f"{held} values that enter a layer with weights, and {type(model).__name__} has no such layer.")
    held = f"{held} ReLU and ReLU6, and the nonlinearities of {type(model).__name__} are {', '.join(found)}"
    raise UserError(f"{held}; allowed: None, or sites='integer', which quantizes after all of them.")


def _insert_after(model: fx.GraphModule, node: fx.Node, target: str, quantizer: FakeQuantize, part: list[int]) -> None:
    """Put ``quantizer``, called as ``target``, between ``node`` and everything that uses its value."""
    model.add_submodule(target, quantizer)
    with model.graph.inserting_after(node):
        quantized = model.graph.call_module(target, (node, *part))
    node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)


def _by_name(parameter: str, widths: Width | Mapping[str, Width], names: list[str]) -> dict[str, Width]:
    """One bit width, or None for float, for each of ``names``."""
    if not isinstance(widths, Mapping):
        if widths is not None and not names:
            raise UserError(f"{parameter} bits={widths!r} apply to nothing: the network has no such layer.")
        return dict.fromkeys(names, widths)
    for name in widths:
        check_choice(f"layer in {parameter} bits", name, names)
    if missing := [name for name in names if name not in widths]:
        raise UserError(f"{parameter} bits give no width for layer {missing[0]!r} ({len(missing)} missing).")
    return {name: widths[name] for name in names}
