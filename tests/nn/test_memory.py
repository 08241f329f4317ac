"""What a forward pass keeps, in bytes: a layer, an activation, a layer, as autograd sees them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.cases import ACTIVATION_CASES, ActivationCase

ROWS, UNITS = 256, 64


def kept_bytes(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters and the input left out."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(call(x))
    return sum(kept.values())


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=lambda case: case.name)
def test_bytes_kept_for_each_hidden_element(case: ActivationCase) -> None:
    first, second = nn.Linear(8, UNITS, dtype=torch.bfloat16), nn.Linear(UNITS, 8, dtype=torch.bfloat16)
    model = nn.Sequential(first, case.module(), second)
    kept = kept_bytes(model, model, torch.randn(ROWS, 8, dtype=torch.bfloat16))
    assert kept / (ROWS * UNITS) == pytest.approx(case.saved_bytes, abs=0.01)


def test_torch_elu_keeps_twice_as_much() -> None:
    """The measure itself: torch's own ELU keeps input and output."""
    model = nn.Sequential(nn.Linear(8, UNITS), nn.ELU(), nn.Linear(UNITS, 8))
    assert kept_bytes(model, model, torch.randn(ROWS, 8)) == 2 * 4 * ROWS * UNITS


def test_nothing_is_kept_for_inputs_that_need_no_gradient() -> None:
    for case in ACTIVATION_CASES:
        if not case.parameters:
            assert kept_bytes(case.module(), nn.Identity(), torch.randn(4, 4)) == 0, case.name
