"""How much a contender keeps for the backward pass: a layer, the activation, a layer, as autograd sees them.

The layers stand for Linear or Conv: they keep their input, and neither autograd nor a compiler sees into them. Of a
compiled contender the whole chain is compiled, up to the decision what to keep, which is the partitioner's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zeromean.lab.bench.contenders import Contender
from zeromean.lab.bench.inputs import Inputs


@torch.library.custom_op("zeromean_bench::layer", mutates_args=())
def _layer(x: Tensor) -> Tensor:
    return x.clone()


@torch.library.custom_op("zeromean_bench::layer_backward", mutates_args=())
def _layer_backward(gradient: Tensor, kept: Tensor) -> Tensor:
    return gradient.clone()


@_layer.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_layer_backward.register_fake
def _(gradient: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, gradient: Tensor) -> Tensor:
    dx: Tensor = _layer_backward(gradient, *ctx.saved_tensors)
    return dx


_layer.register_autograd(_gradient, setup_context=_keep)


def saved_bytes_per_element(contender: Contender, inputs: Inputs) -> float:
    """Bytes of the distinct storages that are kept, without the chain's input and the parameters, per element."""

    def chain(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = _layer(contender.plain(_layer(x), *parameters))
        return y

    call = chain
    if contender.mode is not None:
        call = torch.compile(chain, backend="aot_eager_decomp_partition", dynamic=False)
    x = inputs.xs[0]
    return _kept(call, x, inputs.parameters) / x.numel()


def _kept(call: Any, x: Tensor, parameters: tuple[Tensor, ...]) -> int:
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *parameters)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held, as a storage that is freed could come back under the same address.
        alive = call(x, *parameters)
    del alive
    return sum(sizes.values())
