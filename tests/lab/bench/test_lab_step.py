"""The comparison of the lab's step with a plain loop: processes that take turns, and what is made of their times."""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import lab_step
from benchmarks.lab_step import LAB, Found, Kernels
from tests.lab.small_images import CPU
from torch import nn

from zeromean.lab.data.augment import Batches
from zeromean.lab.recipes.cifar import cifar100_elu11

NONE = Kernels(None, None, None, None)


def counting(file: str, device: torch.device) -> Callable[[], None]:
    def step() -> None:
        with Path(file).open("a") as opened:
            opened.write("x")

    return step


def failing(device: torch.device) -> Callable[[], None]:
    raise ValueError(f"no step on {device}")


def maker(file: Path) -> lab_step.Maker:
    return functools.partial(counting, str(file))


def test_every_contender_takes_its_steps_in_each_round(tmp_path: Path) -> None:
    makers = {"plain default": maker(tmp_path / "plain"), LAB: maker(tmp_path / "lab")}
    found = lab_step.compare(makers, CPU, rounds=3, steps=5)
    assert list(found) == list(makers)
    assert [(len(one.times), one.kernels) for one in found.values()] == [(3, NONE)] * 2
    assert (tmp_path / "plain").read_text() == (tmp_path / "lab").read_text() == "x" * 15


def test_a_contender_that_fails_is_not_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended"):
        lab_step.compare({"plain default": failing, LAB: maker(tmp_path / "lab")}, CPU, rounds=1, steps=1)
    assert "no step on cpu" in capfd.readouterr().err


def test_ratios_are_taken_within_a_round() -> None:
    table = lab_step.rows({"plain default": Found([2.0, 6.0, 3.0], NONE), LAB: Found([1.0, 2.0, 2.0], NONE)}, 100)
    assert table[1]["times_plain default"] == [2.0, 1.5, 3.0]
    assert table[1]["images_per_second"] == 50_000
    assert table[0]["times_plain default"] == [1.0, 1.0, 1.0]
    assert not any(key == f"times_{LAB}" for key in table[0])


def test_the_profiler_s_names_are_those_of_the_programs() -> None:
    pytest.importorskip("triton")
    from zeromean.kernels import crops_programs, pooled_convolution_programs

    assert crops_programs.crops.fn.__name__ == lab_step.CROPS
    assert any(name in pooled_convolution_programs.pooled_convolution.fn.__name__ for name in lab_step.PRODUCTS)


def test_what_an_epoch_s_draws_cost_is_spread_over_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    clock = iter([1.0, 2.0])
    monkeypatch.setattr(lab_step, "IMAGES", 30)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(Batches, "set_epoch", lambda self, epoch: drawn.append(epoch))
    assert lab_step.draws(replace(cifar100_elu11(), batch_size=10), CPU) == pytest.approx(1000 / 20 / 3)
    assert drawn == [0, *range(20)]


def test_the_step_by_muon_is_the_same_but_for_the_optimizer() -> None:
    found = lab_step.makers(cifar100_elu11(), [], muon=True)
    by_muon, by_sgd = (maker.args[0] for maker in found.values() if isinstance(maker, functools.partial))
    assert list(found) == ["lab by Muon", LAB]
    assert (by_muon.optimizer, by_sgd.optimizer) == ("muon", "sgd")
    assert replace(by_muon, optimizer="sgd", decay_biases=True, title=by_sgd.title) == by_sgd


def test_each_plain_mode_is_there_without_and_with_the_search() -> None:
    names = list(lab_step.makers(cifar100_elu11(), ["default", "max-autotune"]))
    assert names == [
        *("plain default", "plain default, searched", "plain max-autotune", "plain max-autotune, searched"),
        LAB,
    ]


def test_the_plain_network_is_the_lab_s(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def to(module: nn.Sequential, *where: object, **how: object) -> None:
        seen.append(str(module))

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(nn.Sequential, "to", to)
    for first in (False, True):
        recipe = replace(cifar100_elu11(), batch_size=2, drop_before_pooling=first)
        lab_step.plain_step(recipe, "default", searched=False, device=CPU)
    behind, before = seen
    assert "AlignedStack" not in behind
    assert behind.index("pool") < behind.index("Dropout(p=0.1")
    stack = before.split("(2): Sequential")[0].split("(1): Sequential")[1]
    assert stack.index("ELU") < stack.index("Dropout(p=0.1") < stack.index("pool")
