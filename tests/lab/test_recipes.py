"""Recipes and the texts that name activations and overrides."""

import dataclasses

import pytest

from zeromean.lab.activation import Activation, parse
from zeromean.lab.recipes import RECIPES, ImageRecipe, find, override
from zeromean.lab.recipes.cifar import cifar100_elu11, cifar100_elu18
from zeromean.lab.recipes.images import override as override_images
from zeromean.lab.recipes.mnist import digits_mlp8, mnist_autoencoder, mnist_mlp8
from zeromean.lab.recipes.recipe import override as override_stacked


def test_the_papers_numbers() -> None:
    mlp, autoencoder = mnist_mlp8(), mnist_autoencoder()
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
    digits, mnist = digits_mlp8(), mnist_mlp8()
    same = ("hidden", "batch_size", "learning_rates", "activations", "initialization", "baseline")
    assert all(getattr(digits, field) == getattr(mnist, field) for field in same)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'mnist-mlp8'"):
        find("mnist-mpl8")


def test_override_parses_by_type() -> None:
    changed = override_stacked(digits_mlp8(), ["epochs=20", "learning_rates=0.1,0.01", "initialization=activation"])
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
    recipe = digits_mlp8()
    changed = override(recipe, ["hidden=16,16", "epochs=2"])
    assert changed.title == f"{recipe.title} (epochs=2, hidden=16,16)"
    assert override(recipe, [f"epochs={recipe.epochs}"]) == recipe


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        digits_mlp8().epochs = 1  # type: ignore[misc]


def test_the_papers_convolutional_schedules() -> None:
    small, large = cifar100_elu11(), cifar100_elu18()
    assert small.steps == 165_000
    assert [small.rate(step) for step in (0, 34_999, 35_000, 85_000, 135_000)] == [0.01, 0.01, 0.005, 5e-4, 5e-5]
    assert [phase.steps for phase in large.phases] == [35_000, 50_000, 40_000]
    assert [phase.everywhere for phase in large.phases] == [False, True, True]
    assert large.phases[2].dropout == tuple(1.5 * rate for rate in large.phases[1].dropout)


def test_override_of_an_image_recipe_parses_by_type() -> None:
    words = ["batch_size=50", "flip=false", "ema=0.99", "normalization=mean-std", "norms=none,batch", "precision=tf32"]
    changed = override(find("cifar100-elu11"), words)
    assert isinstance(changed, ImageRecipe)
    assert (changed.batch_size, changed.flip, changed.ema, changed.norms) == (50, False, 0.99, ("none", "batch"))
    assert (changed.normalization, changed.precision) == ("mean-std", "tf32")
    assert changed.title == f"{cifar100_elu11().title} ({', '.join(sorted(words))})"
    assert changed.phases == cifar100_elu11().phases


def test_length_and_rate_factor_scale_the_schedule() -> None:
    published = cifar100_elu18()
    changed = override_images(published, ["length=0.01", "rate_factor=2"])
    assert [phase.steps for phase in changed.phases] == [350, 500, 400]
    assert changed.rates == ((0, 0.02), (850, 0.002), (1_200, 2e-4))
    assert changed.title == f"{published.title} (length=0.01, rate_factor=2.0)"
    assert override_images(published, ["length=1", "rate_factor=1", "batch_size=100"]) == published


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize=3", "did you mean 'batch_size'"),
        ("lenght=0.1", "did you mean 'length'"),
        ("epochs=3", "no field 'epochs'"),
        ("flip", "must read field=value"),
        ("flip=no", "true or false"),
        ("batch_size=1.5", "whole number"),
        ("batch_size=0", "at least 1"),
        ("length=0", "positive"),
        ("length=nan", "positive"),
        ("rate_factor=-1", "positive"),
        ("rate_factor=inf", "positive"),
        ("normalization=zca", "gcn-zca, mean-std"),
        ("norms=layer", "none, batch"),
        ("ema=1", r"in \[0, 1\)"),
        ("phases=1", "no field 'phases'"),
        ("network=elu18", "no field 'network'"),
    ],
)
def test_bad_override_of_an_image_recipe(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(find("cifar100-elu11"), [text])
