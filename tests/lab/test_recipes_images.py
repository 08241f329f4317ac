"""ImageRecipe: what it refuses, its learning rates, its phases, and the same in fewer steps."""

import math
from dataclasses import replace
from typing import Any

import pytest
from tests.lab.small_images import NO_DROPOUT, recipe

from zeromean.lab.nets import STACKS
from zeromean.lab.recipes import RECIPES
from zeromean.lab.recipes.cifar import (
    ELU11_DROPOUT,
    ELU18_DROPOUT,
    cifar10_elu18,
    cifar10_elu18_fast,
    cifar100_elu11,
    cifar100_elu18,
)
from zeromean.lab.recipes.images import ImageRecipe, Phase, override


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("batch_size", 0, "at least 1"),
        ("accumulate", 0, "at least 1"),
        ("probe_samples", 0, "at least 1"),
        ("seeds", 0, "at least 1"),
        ("pad", -1, "0 or more"),
        ("validation", -1, "0 or more"),
        ("clip", -0.5, "0 or more"),
        ("cutout", -1, "0 or more"),
        ("mixup", -0.1, "0 or more"),
        ("mixup", math.inf, "0 or more, and finite"),
        ("clip", math.inf, "0 or more, and finite"),
        ("weight_decay", math.nan, "0 or more, and finite"),
        ("resize", 300, "left at 256 where 'cifar100' does not use it"),
        ("crop", 16, "left at 224 where 'cifar100' does not use it"),
        ("weight_decay", -1e-4, "0 or more"),
        ("momentum", 1.0, "in [0, 1)"),
        ("ema", 1.0, "in [0, 1)"),
        ("label_smoothing", -0.1, "in [0, 1)"),
        ("momentum", math.nan, "in [0, 1)"),
        ("network", "elu12", "one of elu11, elu18, elu15"),
        ("normalization", "zca", "one of gcn-zca, mean-std, pixel-mean"),
        ("normalization", "pixel-mean", "gcn-zca or mean-std for the data 'cifar100', which is no folder (one of that"),
        ("data", "imagenet", "pixel-mean for the data 'imagenet'"),
        ("data", "/data/photos", "pixel-mean for the data '/data/photos'"),
        ("crop", 257, "in [1, 256], which resize is"),
        ("crop", 0, "in [1, 256], which resize is"),
        ("curve", "cosine", "one of stairs, linear"),
        ("padding", "same", "one of alternate, one, ceil, one_ceil"),
        ("initialization", "xavier", "one of he, activation, lecun"),
        ("precision", "float64", "one of bfloat16, float16, tf32, float32"),
        ("norms", ("none", "layer"), "one of none, batch"),
        ("norms", (), "at least one"),
        ("activations", (), "at least one"),
        ("rates", (), "pairs of ascending steps from 0"),
        ("rates", ((1, 0.1),), "pairs of ascending steps from 0"),
        ("rates", ((0, 0.1), (5, 0.2), (5, 0.3)), "pairs of ascending steps from 0"),
        ("rates", ((0, 0.1), (9, 0.2), (5, 0.3)), "pairs of ascending steps from 0"),
        ("rates", ((0, -0.1),), "finite and 0 or more"),
        ("rates", ((0, math.nan),), "finite and 0 or more"),
        ("rates", ((0, math.inf),), "finite and 0 or more"),
        ("phases", (), "of a step or more"),
        ("phases", (Phase(3, NO_DROPOUT), Phase(0, NO_DROPOUT)), "of a step or more"),
        ("phases", (Phase(3, (0.0, 1.0, 0.0)),), "with dropout in [0, 1) for each stack, 0 for the last one"),
        ("phases", (Phase(3, (0.0, 0.1)),), "with dropout in [0, 1) for each stack, 0 for the last one"),
        ("phases", (Phase(3, ()),), "with dropout in [0, 1) for each stack, 0 for the last one"),
        ("accumulate", 5, "a divisor of 16"),
    ],
)
def test_what_no_run_could_survive_is_refused(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field}|activations|normalization") as raised:
        recipe(**{field: value})
    assert rule in str(raised.value)
    assert "change it in the recipe 'cifar100-elu11'" in str(raised.value)


def test_looking_ahead_takes_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov must be false where momentum is 0, got True: change it in"):
        recipe(nesterov=True, momentum=0.0)
    assert recipe(nesterov=False, momentum=0.0).momentum == 0


def test_dropout_holds_or_rises_within_each_phase() -> None:
    phases = (Phase(4, NO_DROPOUT), Phase(2, NO_DROPOUT))
    holding, rising = (recipe(phases=phases, dropout_curve=curve) for curve in ("stairs", "linear"))
    assert [holding.dropout_strength(step) for step in range(6)] == [1] * 6
    assert [rising.dropout_strength(step) for step in range(7)] == [0, 0.25, 0.5, 0.75, 0, 0.5, 1]


def test_muon_decays_no_biases() -> None:
    told = r"decay_biases must be false where optimizer is muon \(decay_biases=false on the command line\), got True: "
    with pytest.raises(ValueError, match=told):
        recipe(optimizer="muon")
    with pytest.raises(ValueError, match="weight_decay must be below 50 where optimizer is muon: one over the highest"):
        recipe(optimizer="muon", decay_biases=False, rates=((0, 0.02),), weight_decay=50.0)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, muon, got adam"):
        override(recipe(), ["optimizer=adam"])
    assert override(recipe(), ["optimizer=muon", "decay_biases=false", "weight_decay=0.05"]).optimizer == "muon"


def test_another_optimizer_comes_with_its_decay() -> None:
    by_muon = recipe(optimizer="muon", decay_biases=False, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"optimizer=sgd must come with weight_decay=, got none: .* 0\.1 is for muon"):
        override(by_muon, ["optimizer=sgd"])
    assert override(by_muon, ["weight_decay=0.1", "optimizer=sgd"]).weight_decay == 0.1
    assert override(by_muon, ["optimizer=muon"]) == by_muon


def test_every_other_epoch_takes_flips_and_no_folder() -> None:
    with pytest.raises(ValueError, match="alternate_flip must be false where flip is, got True: change it in"):
        recipe(alternate_flip=True, flip=False)
    with pytest.raises(ValueError, match="alternate_flip must be false for the data 'imagenet', got True: change it"):
        recipe(alternate_flip=True, data="imagenet", normalization="pixel-mean")
    assert recipe(alternate_flip=True).flip


def test_stairs_hold_a_rate_until_the_next() -> None:
    chosen = recipe(rates=((0, 0.1), (3, 0.02), (7, 0.0)))
    assert [chosen.rate(step) for step in range(9)] == [0.1] * 3 + [0.02] * 4 + [0.0] * 2


def test_linear_rates_go_straight_and_stay_at_the_last() -> None:
    chosen = recipe(rates=((0, 0.0), (4, 0.2), (8, 0.1)), curve="linear")
    assert [chosen.rate(step) for step in range(10)] == pytest.approx(
        [0, 0.05, 0.1, 0.15, 0.2, 0.175, 0.15, 0.125, 0.1, 0.1]
    )


def test_the_published_rates_change_where_the_paper_says() -> None:
    eleven, eighteen = cifar100_elu11(), cifar10_elu18()
    steps = (0, 34_999, 35_000, 84_999, 85_000, 134_999, 135_000, 164_999)
    assert [eleven.rate(step) for step in steps] == [0.01, 0.01, 0.005, 0.005, 5e-4, 5e-4, 5e-5, 5e-5]
    assert (eleven.steps, eleven.batch_size) == (165_000, 100)
    later = (0, 84_999, 85_000, 119_999, 120_000, 124_999)
    assert [eighteen.rate(step) for step in later] == [0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4]


def test_phases_follow_one_another() -> None:
    first, second = Phase(3, NO_DROPOUT), Phase(2, (0.1, 0.2, 0.0), everywhere=True)
    chosen = recipe(phases=(first, second))
    assert [chosen.phase(step) for step in range(6)] == [first] * 3 + [second] * 3
    assert chosen.steps == 5


def test_fine_tuning_drops_behind_every_layer_and_then_more() -> None:
    chosen = cifar100_elu18()
    base, wide, wider = (chosen.phase(step) for step in (34_999, 35_000, 85_000))
    assert [phase.everywhere for phase in (base, wide, wider)] == [False, True, True]
    assert base.dropout == wide.dropout == ELU18_DROPOUT == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.0)
    assert cifar100_elu11().phases[0].dropout == ELU11_DROPOUT
    assert wider.dropout == pytest.approx([1.5 * rate for rate in wide.dropout])
    assert chosen.phase(chosen.steps - 1) == wider


@pytest.mark.parametrize("factor", [0.01, 0.1, 2.0])
def test_shortened_keeps_every_rate_in_its_place(factor: float) -> None:
    published = cifar100_elu18()
    chosen = published.shortened(factor)
    assert chosen.steps == round(published.steps * factor)
    for place in (0.0, 0.27, 0.29, 0.67, 0.69, 0.999):
        assert chosen.rate(int(place * chosen.steps)) == published.rate(int(place * published.steps))
        shown, own = (one.phase(int(place * one.steps)) for one in (published, chosen))
        assert (shown.dropout, shown.everywhere) == (own.dropout, own.everywhere)


def test_shortened_to_nothing_has_a_step_a_phase() -> None:
    chosen = cifar100_elu18().shortened(1e-6)
    assert [phase.steps for phase in chosen.phases] == [1, 1, 1]
    assert chosen.rates == ((0, 0.01), (1, 1e-4))
    line = recipe(rates=((0, 0.1), (50, 0.3), (1000, 0.0)), curve="linear").shortened(1e-3)
    assert line.rates == ((0, 0.1), (1, 0.0)), "a rate of 0 from the start would train nothing"


@pytest.mark.parametrize("factor", [0.0, -1.0, 1e4, math.inf, math.nan])
def test_a_length_that_is_not_positive_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="length must be a positive number and at most 1000, got "):
        recipe().shortened(factor)


def test_tables_name_the_highest_rate() -> None:
    assert recipe(rates=((0, 0.0), (5, 0.3), (9, 0.01)), curve="linear").learning_rates == (0.3,)
    assert (recipe().task, recipe().error_unit) == ("classification", "%")


FAST = [name for name in RECIPES if name.endswith("-fast")]


def both(name: str) -> tuple[ImageRecipe, ImageRecipe]:
    """A fast recipe and the published one."""
    fast, published = RECIPES[name](), RECIPES[name.removesuffix("-fast")]()
    assert isinstance(fast, ImageRecipe)
    assert isinstance(published, ImageRecipe)
    return fast, published


@pytest.mark.parametrize("name", FAST)
def test_a_fast_recipe_is_the_same_comparison_on_fewer_images(name: str) -> None:
    fast, published = both(name)
    same = ("data", "network", "activations", "baseline", "normalization", "padding", "norms", "seeds", "expected_sd")
    assert [getattr(fast, field) for field in same] == [getattr(published, field) for field in same]
    assert fast.norms == ("none",)
    assert len(fast.phases) == 1
    assert len(fast.phases[0].dropout) == STACKS[fast.network]
    assert 3 < published.steps * published.batch_size / (fast.steps * fast.batch_size) < 4.5


@pytest.mark.parametrize("name", FAST)
def test_a_fast_schedule_warms_up_and_ends_at_nothing(name: str) -> None:
    fast, published = both(name)
    rates = [fast.rate(step) for step in range(fast.steps)]
    top = rates.index(max(rates))
    assert top == fast.steps // 20
    assert rates[0] == pytest.approx(0.1 * rates[top])
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 1e-3 * rates[top]
    assert (fast.optimizer, published.optimizer) == ("muon", "sgd")


def test_the_fast_eleven_layers_decay_twice_as_much_as_the_published_ones() -> None:
    fast, published = both("cifar100-elu11-fast")
    summed = [sum(one.rate(step) for step in range(one.steps)) * one.weight_decay for one in (fast, published)]
    # L2 passes through the momentum, Muon's decay does not.
    assert summed[0] == pytest.approx(2 * summed[1] / (1 - published.momentum), rel=0.1)


def test_fast_recipes_are_of_all_published_ones() -> None:
    assert FAST == ["cifar100-elu11-fast", "cifar100-elu18-fast", "cifar10-elu18-fast", "imagenet-elu15-fast"]
    shorter = override(cifar10_elu18_fast(), ["length=0.1", "rate_factor=2", "dropout_factor=0.5"])
    assert shorter.steps == 582
    assert max(shorter.rate(step) for step in range(shorter.steps)) == pytest.approx(0.02, rel=1e-3)
    assert shorter.phases[0].dropout == (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.25, 0.0)
    assert shorter.title == (
        "18-layer network on CIFAR-10, fast schedule (dropout_factor=0.5, length=0.1, rate_factor=2.0)"
    )


def test_dropout_stands_everywhere_or_nowhere_else_in_every_phase() -> None:
    published = cifar100_elu18()
    assert (published.everywhere, cifar100_elu11().everywhere) == (None, False)
    chosen = override(published, ["everywhere=true"])
    assert [phase.everywhere for phase in chosen.phases] == [True] * 3
    assert [replace(phase, everywhere=True) for phase in published.phases] == list(chosen.phases)
    assert chosen.title.endswith("(everywhere=true)")
    assert override(published, ["everywhere=false"]).everywhere is False
    assert override(cifar100_elu11(), ["everywhere=false"]) == cifar100_elu11()
    with pytest.raises(ValueError, match="everywhere must be true or false"):
        override(published, ["everywhere=1"])


def test_a_field_is_overridden_once() -> None:
    with pytest.raises(
        ValueError, match="batch_size must be named once, got 'batch_size=60' too: leave one of them out"
    ):
        override(cifar100_elu18(), ["batch_size=50", "batch_size=60"])


def test_dropout_factors_reach_every_phase_and_no_further_than_below_one() -> None:
    halved = override(cifar100_elu18(), ["dropout_factor=0.5"])
    wanted = [tuple(0.5 * rate for rate in phase.dropout) for phase in cifar100_elu18().phases]
    assert [phase.dropout for phase in halved.phases] == wanted
    assert [phase.everywhere for phase in halved.phases] == [False, True, True]
    for factor in ("2", "-1", "nan"):
        rule = rf"dropout_factor must keep rates in \[0, 1\), got {factor}: the highest one is 0\.75"
        with pytest.raises(ValueError, match=rule):
            override(cifar100_elu18(), [f"dropout_factor={factor}"])
