"""Drawing a seed so that no compiler draws it twice.

Settings that recompute more than by default (``activation_memory_budget`` below 1, ``aggressive_recomputation``) run
random operators again in the backward pass, and new noise there makes wrong gradients. So in a compiled program the
seed comes from an operator of its own, whose result is marked as one that must be kept. (A budget of exactly 0 keeps
nothing but inputs, whatever is marked: give a seed there.) Nor may two draws be taken for one expression, as the
partitioner does with operators that it does not know as random ones.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_INDUCTOR = "torch._inductor.fx_passes.joint_graph"
_PARTITIONER = "torch._functorch.compile_utils"

_library = torch.library.Library("zeromean", "FRAGMENT")
_library.define("draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def draw_seed(like: Tensor) -> Tensor:
    """A 0-d int64 seed from torch's default generator of a tensor's device; ``torch.manual_seed`` reproduces it."""
    if torch.compiler.is_compiling():
        return torch.ops.zeromean.draw_seed(like)  # type: ignore[no-any-return]
    return _draw(like)


def _draw(like: Tensor, count: tuple[int, ...] = ()) -> Tensor:
    return torch.randint(0, 2**63 - 1, count, dtype=torch.int64, device=like.device)


def _fake(like: Tensor) -> Tensor:
    if _INDUCTOR in sys.modules:
        _keep_drawn_seeds()
    if _PARTITIONER in sys.modules:
        _tell_draws_apart()
    return torch.empty((), dtype=torch.int64, device=like.device)


def _batched(info: Any, in_dims: tuple[int | None], like: Tensor) -> tuple[Tensor, int | None]:
    if info.randomness == "error":
        raise ValueError("vmap must be told how to draw noise: use randomness='same' or 'different'")
    return (_draw(like), None) if info.randomness == "same" else (_draw(like, (info.batch_size,)), 0)


@functools.cache
def _tell_draws_apart() -> None:
    try:
        sys.modules[_PARTITIONER].rand_ops.append(torch.ops.zeromean.draw_seed)
    except AttributeError as error:
        _LOG.debug("in torch %s activations of one input share their noise: %s", torch.__version__, error)


@functools.cache
def _keep_drawn_seeds() -> None:
    """Have Inductor mark every drawn seed before it decides what a backward pass keeps and what it computes again."""
    try:
        from torch._inductor.fx_passes.joint_graph import pass_patterns
        from torch._inductor.pattern_matcher import CallFunctionVarArgs, register_graph_pattern
        from torch.utils.checkpoint import CheckpointPolicy

        @register_graph_pattern(CallFunctionVarArgs(torch.ops.zeromean.draw_seed.default), pass_dict=pass_patterns[0])
        def keep(match: Any, *_: Any, **__: Any) -> None:
            match.output_node().meta["recompute"] = CheckpointPolicy.MUST_SAVE
    except (ImportError, AttributeError, TypeError) as error:
        _LOG.debug("in torch %s noise needs a given seed where more is recomputed: %s", torch.__version__, error)


_library.impl("draw_seed", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("zeromean::draw_seed", _fake, lib=_library)
torch.library.register_vmap("zeromean::draw_seed", _batched, lib=_library)
