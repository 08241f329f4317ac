"""Recipes and the texts that name activations and overrides."""

import dataclasses

import pytest

from zeromean.lab.activation import Activation, parse
from zeromean.lab.recipes import RECIPES, find, override


def test_the_papers_numbers() -> None:
    mlp, autoencoder = find("mnist-mlp8"), find("mnist-autoencoder")
    assert (mlp.hidden, mlp.epochs, mlp.batch_size, mlp.learning_rates) == ((128,) * 8, 300, 64, (0.01,))
    assert autoencoder.hidden == (1000, 500, 250, 30, 250, 500, 1000)
    assert (autoencoder.epochs, autoencoder.batch_size) == (500, 64)
    assert autoencoder.learning_rates == (1e-2, 1e-3, 1e-4, 1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_carry_their_own_name_and_sound_arms(name: str) -> None:
    recipe = find(name)
    assert recipe.name == name
    assert parse(recipe.baseline) in [parse(text) for text in recipe.activations]


def test_the_default_is_the_papers_network_on_other_data() -> None:
    digits, mnist = find("digits-mlp8"), find("mnist-mlp8")
    same = ("hidden", "batch_size", "learning_rates", "activations", "initialization", "baseline")
    assert all(getattr(digits, field) == getattr(mnist, field) for field in same)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'mnist-mlp8'"):
        find("mnist-mpl8")


def test_override_parses_by_type() -> None:
    changed = override(find("digits-mlp8"), ["epochs=20", "learning_rates=0.1,0.01", "initialization=activation"])
    assert (changed.epochs, changed.learning_rates, changed.initialization) == (20, (0.1, 0.01), "activation")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch=3", "did you mean 'epochs'"),
        ("epochs", "must read field=value"),
        ("epochs=many", "whole number"),
        ("epochs=0", "at least 1"),
        ("learning_rates=0", "positive"),
        ("learning_rates=", "positive"),
        ("learning_rates=0.1,0.1", "differ"),
        ("learning_rates=nan", "positive"),
        ("learning_rates=inf", "positive"),
        ("initialization=xavier", "he, activation"),
        ("validation=-1", "0 or more"),
        ("name=other", "no field 'name'"),
        ("activations=", "at least one"),
        ("tuning_grid=0.01,0.010000001", "differ"),
    ],
)
def test_bad_override(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(find("digits-mlp8"), [text])


@pytest.mark.parametrize(
    "text", ["leaky_relu:0.1", "leaky_relu(0.1)", "leaky_relu:negative_slope=0.1", " LEAKY_RELU:.1"]
)
def test_spellings_of_one_activation(text: str) -> None:
    arm = parse(text)
    assert arm == Activation("leaky_relu", (("negative_slope", 0.1),))
    assert (arm.slug, arm.label) == ("leaky_relu-0.1", "LeakyReLU(0.1)")
    assert parse(arm.text) == arm
    assert arm.build().negative_slope == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reluu", "did you mean 'relu'"),
        ("elu:beta=1", "no setting 'beta'"),
        ("elu:1,2", "too many settings"),
        ("elu:nan", "must be finite"),
        ("elu:big", "must be a number"),
        ("relu:1", "too many settings.*it has none"),
        ("../elu", "name:value"),
    ],
)
def test_bad_activation(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_settings_that_are_not_the_first_are_named_in_folder_and_label() -> None:
    first, second, both = (parse(f"mpelu:{text}") for text in ("alpha=0.5", "beta=0.5", "beta=1,alpha=0.5"))
    assert (first.slug, second.slug, both.slug) == ("mpelu-0.5", "mpelu-beta=0.5", "mpelu-0.5-1")
    assert second.label == "MPELU(beta=0.5)"


def test_an_override_shows_in_the_title() -> None:
    recipe = find("digits-mlp8")
    changed = override(recipe, ["hidden=16,16", "epochs=2"])
    assert changed.title == f"{recipe.title} (epochs=2, hidden=16,16)"
    assert override(recipe, [f"epochs={recipe.epochs}"]) == recipe


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("digits-mlp8").epochs = 1  # type: ignore[misc]
