"""Inside torch.compile: the gradient of a bias, summed while the activation's own gradient is made.

A layer's bias lies right before the activation, so its gradient is the sum of the activation's dx over all dimensions
but the channels. Inductor makes dx in one pass over memory and sums it in a second: 8 bytes an element in bfloat16.
Where the incoming gradient lies in memory already, which is behind a convolution or a matrix product, an operator that
does both in one pass takes 6. Elsewhere, behind a pooling or a sum, the gradient would have to be written first.

An activation may also follow a max-pooling that follows the bias. The pooling's backward pass gives each element of dx
to one input, so the sum is that of dx still, of which there is a quarter as much behind windows of 2x2.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

# Tensors below this many elements gain less time than the larger operator takes to call.
_WORTHWHILE = 2**22
_ATEN = torch.ops.aten
_LIBRARY_KERNELS = (_ATEN.convolution_backward.default, _ATEN.mm.default, _ATEN.addmm.default, _ATEN.bmm.default)
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)
_SAME_SUM = (
    torch.ops.prims.convert_element_type.default,
    _ATEN.clone.default,
    _ATEN.max_pool2d_with_indices_backward.default,
)


def sum_in_one_pass(backward: OpOverload, both: OpOverload) -> None:
    """Have Inductor replace calls of an operator, and the sum of their result, by one call of another operator.

    Args:
        backward: (gradient, kept, signs, p0, p1, seed, noisy, scalars, output_kept) to dx.
        both: The same with the bias as p0, in float32 and of which nothing but the shape is used, to dx, the gradient
            of p0, and a tensor not used.

    Raises:
        ImportError, AttributeError, TypeError: If this torch has another Inductor; nothing is broken then.
    """
    from torch._inductor.fx_passes.post_grad import pass_patterns
    from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern

    @register_graph_pattern(CallFunctionVarArgs(backward), pass_dict=pass_patterns[1])
    def replace(match: Any, *_: Any, **__: Any) -> None:
        dx = match.output_node()
        gradient, _, signs, *_, output_kept = dx.args
        # The operator of both takes the side of x + bias from the output.
        suits = output_kept and signs is None and dx.meta["val"].ndim > 1
        if suits and _in_memory(gradient) and is_worthwhile(dx.meta["val"]):
            total = _channel_sum(dx, *dx.meta["val"].shape[:2])
            if total is not None:
                _replace(dx, total, both)


def is_worthwhile(dx: torch.Tensor) -> bool:
    """Whether a tensor of this kind gains from the one pass: on a GPU, and large."""
    return dx.is_cuda and dx.dtype != torch.float64 and math.prod(dx.shape) >= _WORTHWHILE


def _channel_sum(node: Node, samples: int, channels: int) -> Node | None:
    """The node's sum over all dimensions but the channels, in dimension 1, if the graph computes it."""
    for user in node.users:
        if _sums_all_but_channels(user, samples, channels):
            return user
        if _keeps_sums(node, user, samples, channels):
            found = _channel_sum(user, samples, channels)
            if found is not None:
                return found
    return None


def _sums_all_but_channels(node: Node, samples: int, channels: int) -> bool:
    if node.target is not _ATEN.sum.dim_IntList or node.kwargs:
        return False
    summed: Any = node.args[0]
    dims: Any = node.args[1] or ()
    shape = summed.meta["val"].shape
    return shape[:2] == (samples, channels) and sorted(dim % len(shape) for dim in dims) == [0, *range(2, len(shape))]


def _keeps_sums(node: Node, user: Node, samples: int, channels: int) -> bool:
    """Whether a user of a node has the same sum for each sample and channel: a view, a cast, a max-pooling backward.

    The last comes whole, or as an addition to zeros in a view with a row for each sample and channel.
    """
    arguments: Any = user.args
    if user.target in _VIEWS:
        shape = user.meta["val"].shape
        return shape[:2] == (samples, channels) or (len(shape) == 2 and shape[0] == samples * channels)
    if user.target is _ATEN.scatter_add.default:
        zero, dim, _, source = arguments
        a_row_each = len(zero.args[0]) == 2 and zero.args[0][0] == samples * channels
        return source is node and dim == 1 and zero.target is _ATEN.full.default and zero.args[1] == 0 and a_row_each
    return user.target in _SAME_SUM and arguments[0] is node


def _in_memory(gradient: Any) -> bool:
    """Whether a gradient comes from outside the graph or from a library's kernel, and so fuses with nothing."""
    while gradient.target in _VIEWS:
        gradient = gradient.args[0]
    if gradient.target is operator.getitem:
        gradient = gradient.args[0]
    return gradient.op == "placeholder" or gradient.target in _LIBRARY_KERNELS


def _replace(dx: Node, total: Node, both: OpOverload) -> None:
    graph, like = dx.graph, dx.meta["val"]
    gradient, kept, signs, _, _, seed, noisy, scalars, output_kept = dx.args
    shape = [1] * like.ndim
    shape[1] = like.shape[1]

    def call(target: Any, *arguments: Any, **options: Any) -> Node:
        node = graph.call_function(target, arguments, options)
        with like.fake_mode:
            values = [torch.fx.node.map_arg(argument, lambda n: n.meta["val"]) for argument in arguments]
            node.meta["val"] = target(*values, **options)
        return node

    with graph.inserting_before(dx):
        bias = call(_ATEN.empty.memory_format, shape, dtype=torch.float32, device=like.device)
        results = call(both, gradient, kept, signs, bias, None, seed, noisy, scalars, output_kept)
        new_dx, new_total = (call(operator.getitem, results, index) for index in (0, 1))
        new_total = call(_ATEN.reshape.default, new_total, list(total.meta["val"].shape))
        new_total = call(torch.ops.prims.convert_element_type.default, new_total, total.meta["val"].dtype)
    for old, new in ((total, new_total), (dx, new_dx)):
        old.replace_all_uses_with(new)
        graph.erase_node(old)
