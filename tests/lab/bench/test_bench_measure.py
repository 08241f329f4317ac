"""One case: speed against the copy, bytes kept, errors against float64, contenders that fail."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import zeromean as zm
from zeromean.lab.bench import libraries, subjects
from zeromean.lab.bench.accuracy import errors
from zeromean.lab.bench.clock import TARGET_MILLISECONDS, Step, clock_for, repetitions, turns_of
from zeromean.lab.bench.contenders import Contender, contenders, missing
from zeromean.lab.bench.inputs import Inputs, Layout, make, own_layouts
from zeromean.lab.bench.measure import KEYS, Bench, candidates, timing
from zeromean.lab.bench.memory import saved_bytes_per_element
from zeromean.lab.bench.settings import Case
from zeromean.lab.bench.subjects import SUBJECTS, Subject

CPU = torch.device("cpu")
SMALL = 2**12
EAGER = ("zeromean", "eager", "inplace", "textbook")


def inputs_of(subject: Subject, dtype: torch.dtype = torch.bfloat16, layout: Layout | None = None) -> Inputs:
    return make(subject, SMALL, dtype, layout or own_layouts(subject)[0], CPU).alone()


def of(name: str, activation: str) -> Contender:
    (found,) = contenders([name], SUBJECTS[activation], CPU)
    return found


def bench(activation: str, names: Sequence[str] = EAGER, layout: Layout = "contiguous") -> Bench:
    return Bench(Case(activation, "bfloat16", layout, SMALL), names, CPU)


def instant(step: Step, count: int) -> list[float]:
    """A clock that runs the step once and always shows 2 ms."""
    step()
    return [2.0] * count


@pytest.mark.parametrize("which", ["forward", "backward", "both"])
def test_rows_have_exactly_the_promised_keys_first(which: Any) -> None:
    rows = bench("elu").rows(which, 2, EAGER, instant)
    assert all(tuple(row)[: len(KEYS)] == KEYS for row in rows)
    assert ", ".join(KEYS) == (
        "activation, pass, dtype, layout, elements, contender, "
        "milliseconds, fraction_of_copy, saved_bytes_per_element, max_relative_error"
    )
    assert rows[0]["milliseconds"] == 2.0
    assert rows[0]["fraction_of_copy"] == {"forward": 1.0, "backward": 1.5, "both": 2.5}[which]


def test_real_clocks_give_times() -> None:
    which: Any
    for which in ("forward", "both"):
        for row in bench("relu").rows(which, 2, ["eager"]):
            assert row["milliseconds"] > 0
            assert row["p20"] <= row["p80"]
            assert len(row["rounds"]) == 2 * turns_of(which)


def test_a_fraction_compares_each_round_with_its_own_copy() -> None:
    """The machine is twice as slow in the second round, which must not show."""
    row = timing("backward", [[3.0, 3.0, 9.0], [6.0, 6.0, 6.0]], [1.0, 2.0])
    assert row["fraction_of_copy"] == row["fraction_lowest"] == row["fraction_highest"] == 0.5
    assert row["rounds"] == [3.0, 6.0]
    assert row["milliseconds"] == 4.5
    assert row["n"] == 6


def test_a_round_takes_about_the_same_time_for_fast_and_slow_steps() -> None:
    assert repetitions(lambda: None, lambda step, count: [TARGET_MILLISECONDS / 10] * count) == 10
    assert repetitions(lambda: None, lambda step, count: [TARGET_MILLISECONDS / 100] * count, 10) == 10
    assert repetitions(lambda: None, lambda step, count: [1e9] * count) == 3


def test_a_clock_runs_the_step_once_more_than_it_times() -> None:
    calls: list[None] = []
    assert len(clock_for("forward", CPU)(lambda: calls.append(None), 4)) == 4
    assert len(calls) == 5


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_every_contender_computes_the_formula(subject: Subject) -> None:
    """In float32 by every way that runs eagerly, the formula's own included."""
    for contender in contenders(EAGER, subject, CPU):
        found = errors(contender, subject, inputs_of(subject, torch.float32))
        for error in (found.forward, found.backward):
            assert error.relative < 2e-3, f"{contender.name}: {found}"
            assert error.absolute < 1e-5, f"{contender.name}: {found}"
        assert found.parameters is None or found.parameters < 1e-5, f"{contender.name}: {found}"
        learns = bool(subject.ranges) and not subject.frozen
        assert (found.parameters is not None) == learns


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_subjects_are_functions_of_that_name(subject: Subject) -> None:
    assert hasattr(zm.functional, subject.name.partition(":")[0])


def test_a_wrong_result_is_seen() -> None:
    subject = SUBJECTS["pelu"]
    inputs = inputs_of(subject, torch.float32)
    right = Contender("right", subject.zeromean)
    # Wrong by a hundredth in one element of 4096; in all slopes; in one parameter.
    one = torch.zeros_like(inputs.xs[0])
    one[-1, -1] = 0.01
    bent = Contender("bent", lambda x, a, b: subject.zeromean(x, a, b) * (1 + one))
    steep = Contender("steep", lambda x, a, b: subject.zeromean(x + 0.1 * (x - x.detach()), a, b))
    swapped = Contender("swapped", lambda x, a, b: subject.zeromean(x, a + 0.1 * (a - a.detach()), b))
    assert errors(right, subject, inputs).forward.relative < 1e-5
    assert errors(bent, subject, inputs).forward.relative == pytest.approx(0.01, rel=0.01)
    assert errors(steep, subject, inputs).backward.relative == pytest.approx(0.1, rel=0.01)
    assert errors(swapped, subject, inputs).parameters == pytest.approx(0.1, rel=0.1)


def test_noise_drawn_anew_in_the_backward_pass_is_seen() -> None:
    class Redrawn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * torch.where(x > 0, 1.0, torch.rand_like(x) + 0.1)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return gradient * torch.where(x > 0, 1.0, torch.rand_like(x) + 0.1)

    subject = SUBJECTS["rrelu"]
    found = errors(Contender("redrawn", Redrawn.apply), subject, inputs_of(subject, torch.float32))
    assert found.backward.relative > 0.5


def test_nan_is_no_small_error() -> None:
    subject = SUBJECTS["elu"]
    broken = Contender("zeromean", lambda x: torch.where(x > 2, math.nan, x))
    found = errors(broken, subject, inputs_of(subject))
    assert math.isnan(found.forward.relative)
    (row,) = patched(subject, lambda x: torch.where(x > 2, math.nan, x))
    assert row["max_relative_error"] is None
    assert row["remark"] == "NaN where float64 has a number"


def patched(subject: Subject, call: Any) -> list[dict[str, Any]]:
    """The rows of a bench in which our function is another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(subjects.SUBJECTS, subject.name, replace(subject, zeromean=call))
        return bench(subject.name, ["zeromean"]).rows("forward", 1, ["zeromean"], instant)


def test_a_contender_that_errs_has_a_row_with_its_error() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this\nand a long trace")

    (row,) = patched(SUBJECTS["elu"], fails)
    assert row["error"] == "RuntimeError: no kernel for this"
    assert row["milliseconds"] is None


@pytest.mark.parametrize(
    ("name", "activation", "expected"),
    [
        ("eager", "elu", 4.0),
        ("inplace", "elu", 2.0),
        ("zeromean", "elu", 2.0),
        ("eager", "rrelu", 6.0),
        ("textbook", "pelu", 9.0),
        ("compile", "elu", 4.0),
        ("compile", "leaky_relu", 3.0),
        ("zeromean-compile", "elu", 2.0),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_bytes_kept_for_each_hidden_element(name: str, activation: str, expected: float) -> None:
    torch._dynamo.reset()
    subject = SUBJECTS[activation]
    inputs = make(subject, 2**16, torch.bfloat16, "contiguous", CPU).alone()
    assert saved_bytes_per_element(of(name, activation), inputs) == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generated_code_takes_part() -> None:
    rows = bench("eelu", ["compile", "max-autotune", "zeromean-compile"]).rows("backward", 1, ["compile"])
    assert [row.get("error") for row in rows] == [None]


def test_an_input_that_is_overwritten_takes_no_part_where_it_would_have_to_be_made_anew() -> None:
    case = Case("elu", "bfloat16", "contiguous", SMALL)
    assert candidates(case, "backward", EAGER, CPU) == list(EAGER)
    assert candidates(case, "both", EAGER, CPU) == ["zeromean", "eager", "textbook"]


def test_missing_libraries_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(libraries.MODULES, "attorch", "a_library_that_is_nowhere")
    found = missing(["eager", "attorch", "liger"])
    assert list(found) == ["attorch", "liger"]
    assert "not installed (No module named 'a_library_that_is_nowhere')" in found["attorch"]
