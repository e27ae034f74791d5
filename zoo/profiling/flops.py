"""Counting what a network computes: fvcore's analysis of one trace, with the handlers that fvcore lacks.

Two conventions, both of them fvcore's, and both with one fused multiply-add as one:

- *MACs*: convolution, linear layers, matrix products, einsum and attention.
- *fvcore total*: MACs, and what fvcore adds for norms, adaptive average pooling and resampling.

*Activations* are the output elements of the operators that have MACs. Fused attention counts as the two products that
it replaces, whatever is masked. Element-wise operators, reductions and pooling count nothing in any of the three
(`FREE` lists them); an operator that is in no table is reported as unknown.

The trace runs on the meta device, where tensors have a shape and no memory.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zoo.errors import ConfigError

with warnings.catch_warnings():  # importing fvcore scripts a loss, which newer torch warns about
    warnings.simplefilter("ignore")
    from fvcore.nn.jit_analysis import JitModelAnalysis
    from fvcore.nn.jit_handles import batchnorm_flop_jit, conv_flop_count, elementwise_flop_counter, get_shape

Handle = Callable[[list[Any], list[Any]], int]  # (inputs, outputs) of a traced operator, as fvcore's handles

# ------------------------------------------------------------------------------------------------------------- handlers


def product_macs(left: int) -> Handle:
    """Matrix products: every output element sums over the last dimension of input number `left`."""

    def macs(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(get_shape(outputs[0])) * get_shape(inputs[left])[-1]

    return macs


def convolution_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """Every kernel weight once per output pixel (transposed: per input pixel) and image."""
    shapes = get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0])
    return conv_flop_count(*shapes, transposed=inputs[6].toIValue())


def attention_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """`q @ k.T` and `weights @ v`. Masks, causal ones too, and grouped heads change neither."""
    query, key, value = (get_shape(inputs[i]) for i in range(3))
    return prod(get_shape(outputs[0])[:-1]) * key[-2] * (query[-1] + value[-1])


def einsum_macs(inputs: list[Any], outputs: list[Any]) -> int:
    """The products of `einsum_contractions`, added up."""
    equation, shapes, path = _einsum_call(inputs)
    return sum(macs for macs, _ in einsum_contractions(equation, shapes, path))


def einsum_activations(inputs: list[Any], outputs: list[Any]) -> int:
    """Output elements of every product in an einsum."""
    equation, shapes, path = _einsum_call(inputs)
    return sum(elements for _, elements in einsum_contractions(equation, shapes, path))


def _einsum_call(inputs: list[Any]) -> tuple[str, list[list[int]], list[int] | None]:
    shapes = [get_shape(value) for value in inputs[1].node().inputs()]
    return inputs[0].toIValue(), shapes, inputs[2].toIValue() if len(inputs) > 2 else None


def einsum_contractions(
    equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(MACs, output elements) of the matrix products that an einsum comes down to, in the order torch takes them.

    Two operands at a time: the first two, or the next two positions of `path`; their product goes to the end. A label
    that no other operand or the output needs is summed over beforehand. A product without a shared label to sum over
    is element-wise, and free.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    operands = []
    for term, shape in zip(left.split(","), shapes, strict=True):
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail)  # dimensions behind the dots, numbered from the right
        labels = [*head, *(f".{i}" for i in reversed(range(hidden))), *tail] if dots else list(term)
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
        operands.append(labels)
    if arrow:
        output = {label for label in right if label.isalpha()}
    else:
        seen = Counter(itertools.chain.from_iterable(operands))
        output = {label for label, count in seen.items() if count == 1}
    output |= {label for label in sizes if label.startswith(".") and (not arrow or "..." in right)}

    terms = [set(labels) for labels in operands]
    order = iter(path or ())
    products = []
    while len(terms) > 1:
        first, second = sorted((next(order, 0), next(order, 1)))
        b, a = terms.pop(second), terms.pop(first)
        needed = output.union(*terms)
        a, b = a & (b | needed), b & (a | needed)
        result = (a | b) & needed
        terms.append(result)
        if (a | b) - result:
            elements = prod(sizes[label] for label in result)
            products.append((prod(sizes[label] for label in a | b), elements))
    return products


def output_elements(inputs: list[Any], outputs: list[Any]) -> int:
    """fvcore's count of activations: the size of the output."""
    return prod(get_shape(outputs[0]))


def attention_activations(inputs: list[Any], outputs: list[Any]) -> int:
    """The attention weights and the output, which fused attention computes too, if piece by piece."""
    shape = get_shape(outputs[0])
    return prod(shape[:-1]) * get_shape(inputs[1])[-2] + prod(shape)


def norm_operations(weight: int, plain: int) -> Handle:
    """`plain` operations per element, and one more with a weight, which is input number `weight`."""

    def operations(inputs: list[Any], outputs: list[Any]) -> int:
        return prod(get_shape(inputs[0])) * (plain + (get_shape(inputs[weight]) is not None))

    return operations


# operator -> (MACs, activations)
MACS: dict[str, tuple[Handle, Handle]] = {
    "aten::_convolution": (convolution_macs, output_elements),
    "zoo::convolution": (convolution_macs, output_elements),
    "aten::linear": (product_macs(0), output_elements),
    "aten::matmul": (product_macs(0), output_elements),
    "aten::mm": (product_macs(0), output_elements),
    "aten::bmm": (product_macs(0), output_elements),
    "aten::mv": (product_macs(0), output_elements),
    "aten::dot": (product_macs(0), output_elements),
    "aten::addmm": (product_macs(1), output_elements),
    "aten::addmv": (product_macs(1), output_elements),
    "aten::baddbmm": (product_macs(1), output_elements),
    "aten::einsum": (einsum_macs, einsum_activations),
    "aten::scaled_dot_product_attention": (attention_macs, attention_activations),
}

# operator -> operations that the fvcore total adds. The factors are fvcore's where fvcore has the operator.
OTHER: dict[str, Handle] = {
    "aten::batch_norm": batchnorm_flop_jit,
    "aten::group_norm": norm_operations(weight=2, plain=4),
    "aten::layer_norm": norm_operations(weight=2, plain=4),
    "aten::instance_norm": norm_operations(weight=1, plain=4),
    "aten::rms_norm": norm_operations(weight=2, plain=2),  # a layer norm without the mean and its subtraction
    "aten::adaptive_avg_pool1d": elementwise_flop_counter(1, 0),
    "aten::adaptive_avg_pool2d": elementwise_flop_counter(1, 0),
    "aten::adaptive_avg_pool3d": elementwise_flop_counter(1, 0),
    "aten::upsample_nearest2d": elementwise_flop_counter(0, 1),
    "aten::upsample_bilinear2d": elementwise_flop_counter(0, 4),
    "aten::upsample_bicubic2d": elementwise_flop_counter(0, 16),
    "aten::grid_sampler": elementwise_flop_counter(0, 4),
}

# Known to be outside all three counts; a trailing underscore (in place) makes no difference.
_FREE_BY_KIND = {
    "single elements": (
        "abs add addcdiv addcmul ceil clamp clamp_max clamp_min cos div erf exp exp2 expm1 floor floor_divide fmod "
        "lerp log log1p log2 masked_fill maximum minimum mul nan_to_num neg pow reciprocal remainder round rsqrt rsub "
        "sign sin sqrt square sub tan tanh true_divide trunc where"
    ),
    "activations": (
        "celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_sigmoid log_softmax mish prelu relu relu6 "
        "selu sigmoid silu softmax softplus threshold"
    ),
    "comparison and logic": (
        "all __and__ any argmax argmin argsort bitwise_and bitwise_left_shift bitwise_not bitwise_or "
        "bitwise_right_shift bitwise_xor eq ge gt isinf isnan le logical_and logical_not logical_or logical_xor "
        "__lshift__ lt ne one_hot __or__ __rshift__ sort topk __xor__"
    ),
    "reductions": (
        "amax amin cummax cumsum linalg_norm linalg_vector_norm logsumexp max mean min norm prod std std_mean sum var "
        "var_mean"
    ),
    "pooling, and dropout, which is off": (
        "adaptive_max_pool1d adaptive_max_pool2d alpha_dropout avg_pool1d avg_pool2d avg_pool3d dropout "
        "feature_dropout max_pool1d max_pool2d max_pool2d_with_indices max_pool3d"
    ),
    "shapes, copies and gathers": (
        "alias as_strided broadcast_tensors broadcast_to cat channel_shuffle chunk clone col2im concat "
        "constant_pad_nd contiguous copy detach diagonal embedding expand expand_as flatten flip gather hstack "
        "im2col index index_add index_copy index_put index_select lift_fresh masked_select meshgrid movedim mT "
        "narrow new_empty new_full new_ones new_zeros nonzero numpy_T pad permute pixel_shuffle pixel_unshuffle real "
        "reflection_pad1d reflection_pad2d repeat repeat_interleave replication_pad1d replication_pad2d reshape "
        "reshape_as resolve_conj resolve_neg roll rot90 scatter select size slice split split_with_sizes squeeze "
        "stack swapaxes t take take_along_dim tensor_split tile to transpose tril triu type_as unbind unflatten "
        "unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as view_as_complex "
        "view_as_real vstack zero"
    ),
    "constants and numbers": (
        "arange Bool empty empty_like eye fill Float full full_like Int IntImplicit item linspace numel ones "
        "ones_like rand rand_like randn randn_like randperm scalar_tensor ScalarImplicit tensor zeros zeros_like"
    ),
}
FREE = {f"aten::{name}" for names in _FREE_BY_KIND.values() for name in names.split()}

# the same values, or some of them
_VIEWS = (
    "alias clone contiguous detach expand flatten movedim mT narrow numpy_T permute reshape select slice squeeze t to "
    "transpose unflatten unsqueeze view"
)
VIEWS = {f"aten::{name}" for name in _VIEWS.split()}


def plain_name(kind: str) -> str:
    """`aten::_convolution` -> `convolution`."""
    return kind.partition("::")[2].strip("_")


def _counts(kind: str, quantities: Mapping[str, Handle]) -> Callable[[list[Any], list[Any]], Counter[tuple[str, str]]]:
    """All quantities of one operator under the keys (operator, quantity), so that one trace serves them all."""
    name = plain_name(kind)

    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[tuple[str, str]]:
        counts = Counter({(name, quantity): int(count(inputs, outputs)) for quantity, count in quantities.items()})
        counts[name, "calls"] = 1
        return counts

    return handle


HANDLES = {
    **{
        kind: _counts(kind, {"macs": macs, "fvcore_total": macs, "activations": activations})
        for kind, (macs, activations) in MACS.items()
    },
    **{kind: _counts(kind, {"fvcore_total": operations}) for kind, operations in OTHER.items()},
}


# ------------------------------------------------------------------------------------------------------------- analysis


class CostAnalysis(JitModelAnalysis):
    """fvcore's analysis with every quantity in one trace: `by_module_and_operator()` has keys (operator, quantity).

    `weight_macs` are then those of the products that a parameter is an operand of, by its name.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__(model, inputs)
        self._ignored_ops = set(FREE)
        self._op_handles = {
            kind + suffix: self._with_weights(handle) for kind, handle in HANDLES.items() for suffix in ("", "_")
        }
        self.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        self.weight_macs: Counter[str] = Counter()
        self._states = list(torch.jit._unique_state_dict(model))  # the last inputs of the graph
        self._numbers: dict[str, int] = {}  # of all inputs, from the last

    def _with_weights(self, handle: Callable[..., Counter[tuple[str, str]]]) -> Callable[..., Counter[tuple[str, str]]]:
        def counted(inputs: list[Any], outputs: list[Any]) -> Counter[tuple[str, str]]:
            counts = handle(inputs, outputs)
            macs = sum(count for (_, quantity), count in counts.items() if quantity == "macs")
            for name in {name for value in inputs if macs and (name := self._state_of(value))}:
                self.weight_macs[name] += macs
            return counts

        return counted

    def _state_of(self, value: Any) -> str | None:
        """The name of the parameter or buffer that `value` is, or a view of."""
        while value.node().kind().rstrip("_") in VIEWS:
            value = next(value.node().inputs())
        if value.node().kind() != "prim::Param":
            return None
        if not self._numbers:
            places = [place.debugName() for place in value.node().outputs()]
            self._numbers = {name: i - len(places) for i, name in enumerate(places)}
        number = self._numbers[value.debugName()] + len(self._states)
        return self._states[number] if number >= 0 else None

    def _should_ignore_node(self, node: Any) -> bool:
        kind = node.kind()
        if kind.startswith("prim::"):  # Python and scripted code hides its operators from the trace
            return not kind.startswith(("prim::PythonOp", "prim::Call", "prim::If", "prim::Loop"))
        return kind in self._ignored_ops or (kind.endswith("_") and kind[:-1] in self._ignored_ops)


@torch.library.custom_op("zoo::convolution", mutates_args=())
def _traced_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Any convolution, as one operator in a trace."""
    return torch.convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


@_traced_convolution.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    sides = []
    for i, (step, pad, spread, extra) in enumerate(
        zip(stride, padding, dilation, output_padding, strict=True), start=2
    ):
        side, reach = int(input.shape[i]), spread * (int(weight.shape[i]) - 1)
        if transposed:
            sides.append((side - 1) * step - 2 * pad + reach + extra + 1)
        elif side + 2 * pad <= reach:
            raise RuntimeError(f"An input of {side} with {pad} of padding is smaller than the kernel, {reach + 1}.")
        else:
            sides.append((side + 2 * pad - reach - 1) // step + 1)
    channels = int(weight.shape[1]) * groups if transposed else int(weight.shape[0])
    given, wanted = int(input.shape[1]), int(weight.shape[0] if transposed else weight.shape[1] * groups)
    if given != wanted:
        raise RuntimeError(f"The convolution takes {wanted} channels, not {given}.")
    return input.new_empty([int(input.shape[0]), channels, *sides])


class _TracedConvolutions(TorchFunctionMode):
    """Calls `zoo::convolution`, which a trace records on every device.

    `torch.conv2d` and its kin leave the recording to what they call, and on the meta device they call Python code,
    which trips over the traced sizes.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            return _convolution(*args, **(kwargs or {}))
        if func in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d):
            return _transposed_convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    dims = weight.ndim - 2
    dilation = _per_dimension(dilation, dims)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        totals = [d * (int(k) - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):  # the odd pixel goes to the right
            input = F.pad(input, [side for total in reversed(totals) for side in (0, total % 2)])
        padding = [total // 2 for total in totals]
    return _record(input, weight, bias, stride, padding, dilation, False, 0, groups)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    return _record(input, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _record(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    dims = weight.ndim - 2
    stride, padding, dilation, output_padding = (
        _per_dimension(value, dims) for value in (stride, padding, dilation, output_padding)
    )
    batched = input if input.ndim == dims + 2 else input.unsqueeze(0)
    output = _traced_convolution(batched, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    return output if batched is input else output.squeeze(0)


def _per_dimension(value: Any, dims: int) -> list[int]:
    values = [int(v) for v in (value if isinstance(value, Sequence) else [value])]  # int(): a traced size is a tensor
    return values * dims if len(values) == 1 else values


class _MetaCopies(TorchFunctionMode):
    """While active, copying a tensor gives one of the same shape on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = torch.empty_like(tensor, device="meta")
            return memo[id(tensor)]
        if func in (Tensor.clone, torch._C.TensorBase.clone):  # how parameters are copied
            return torch.empty_like(args[0], device="meta")
        return func(*args, **(kwargs or {}))


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose tensors are on the meta device. Nothing of `model` changes."""
    with _MetaCopies():
        return copy.deepcopy(model).eval()


@contextlib.contextmanager
def _slow_attention_path() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` and `nn.TransformerEncoder` from hiding their work in one fused operator."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class Trace:
    """What one forward of `model` costs, and which of its modules ran.

    `counts[module][operator, quantity]` holds the quantities "macs", "fvcore_total", "activations" and "calls" of every
    module, its descendants included; `unknown[operator]` how often an operator without a handler ran; `calls[module]`
    how often a module ran. `weight_macs[parameter]` are the MACs of the products that a parameter is an operand of,
    wherever they are done. A module or parameter that appears under several names has the first. Work that reaches no
    output is left out, as in every trace.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """`model` is in eval mode, on the device of `inputs`, and the caller's to change."""
        self.calls: Counter[str] = Counter()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: self.calls.update((name,)))
        model.register_forward_hook(_tensors_of)
        with torch.no_grad(), inputs[0].device, _slow_attention_path(), _TracedConvolutions():
            analysis = CostAnalysis(model, inputs)
            self.counts: Mapping[str, Counter[tuple[str, str]]] = analysis.by_module_and_operator()
            self.unknown: Counter[str] = analysis.unsupported_ops()
            self.weight_macs: Counter[str] = analysis.weight_macs


def _tensors_of(module: nn.Module, _inputs: Any, output: Any) -> tuple[Tensor, ...]:
    """The outputs as the tracer wants them: a tuple of tensors, whatever they were packed in."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__"):  # an object of the model's own
            found += (value for value in tree_leaves(vars(leaf)) if isinstance(value, Tensor))
    if not found:
        raise ConfigError(f"{type(module).__name__} returns no tensor: nothing that it computes can be traced.")
    return tuple(found)
