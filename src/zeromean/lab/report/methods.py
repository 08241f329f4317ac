"""The paragraph that says what was done, from the plan alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zeromean.lab.schedule import length, phases_in_words, rates_in_words
from zeromean.lab.summary import Summary

Recipe = Mapping[str, Any]
_WHITENING = {
    "gcn-zca": "contrast-normalized and ZCA-whitened",
    "mean-std": "normalized by mean and standard deviation of each colour",
    "pixel-mean": "with the mean of every pixel subtracted",
}
_OPTIMIZERS = {
    "sgd": "stochastic gradient descent",
    "muon": "Muon (biases, slopes and scales by stochastic gradient descent, without decay)",
}
_CLASSIFICATION = "The error is the percentage of test samples that the network gets wrong"
_RECONSTRUCTION = "The error is the mean squared error of a pixel of the test images, times 1000"


def paragraph(summary: Summary, labels: Sequence[str]) -> str:
    """Network, data, schedule, seeds and error in a few sentences.

    Args:
        summary: of the study.
        labels: of its arms, as the page's key has them.
    """
    plan, recipe = summary.plan, summary.plan["recipe"]
    done = _images(plan, labels) if "phases" in recipe else _vectors(summary, labels)
    error = _RECONSTRUCTION if recipe["task"] == "reconstruction" else _CLASSIFICATION
    seeds, test = _seeds(len(plan["seeds"])), plan["data"]["test"]
    return f"{done} {seeds} {error}, read once, after the last epoch, on {test} samples."


def _vectors(summary: Summary, labels: Sequence[str]) -> str:
    plan, recipe = summary.plan, summary.plan["recipe"]
    training = length(recipe, plan["budget"]["epochs"])
    return (
        f"{_listed(labels)} in a network with {_widths(recipe['hidden'])}, trained on {plan['data']['name']} "
        f"({plan['data']['train']} samples) for {training} of plain stochastic gradient descent in "
        f"batches of {recipe['batch_size']}, {_learning_rates(summary)}."
    )


def _images(plan: Mapping[str, Any], labels: Sequence[str]) -> str:
    recipe, samples = plan["recipe"], plan["data"]["train"]
    training = length(recipe, plan["budget"]["epochs"])
    momentum = f"{'Nesterov ' if recipe['nesterov'] else ''}momentum {recipe['momentum']:g}"
    parts = [
        f"{_listed(labels)} in the convolutional network {recipe['network']}, trained on {plan['data']['name']} "
        f"({samples:,} images, {_WHITENING[recipe['normalization']]}{_augmentation(recipe)}) for "
        f"{training} of {_OPTIMIZERS[recipe.get('optimizer', 'sgd')]} with {momentum} in batches of "
        f"{recipe['batch_size']}",
        f"Learning rate {rates_in_words(recipe['rates'], recipe['curve'])}",
        f"Schedule: {phases_in_words(recipe['phases'])}{_rising(recipe)}",
        *_regularization(recipe),
    ]
    return " ".join(f"{part}." for part in parts)


def _rising(recipe: Recipe) -> str:
    linear = recipe.get("dropout_curve") == "linear"
    return "; in each, dropout rises from 0 to these rates in a straight line" if linear else ""


def _augmentation(recipe: Recipe) -> str:
    crop = f", cropped at random out of {recipe['pad']} pixels of padding" if recipe["pad"] else ""
    if recipe["normalization"] == "pixel-mean":
        sides = [f"{recipe[side]}x{recipe[side]}" for side in ("resize", "crop")]
        crop = f", resized to {sides[0]} pixels and cropped at random to {sides[1]}"
    return crop + _flips(recipe)


def _flips(recipe: Recipe) -> str:
    if recipe.get("alternate_flip"):
        return ", mirrored in every other epoch"
    return ", mirrored at random" if recipe["flip"] else ""


def _regularization(recipe: Recipe) -> list[str]:
    said = {
        "drop_before_pooling": "Behind a stack, dropout stands in front of its pooling",
        "weight_decay": "Weight decay {:g}" if recipe.get("optimizer") == "muon" else "L2 weight decay {:g}",
        "cutout": "In each training image a square of {:g} pixels' side is set to zero",
        "mixup": "Training images are mixed in pairs, as are their labels, with shares from Beta({0:g}, {0:g})",
        "label_smoothing": "Labels smoothed by {:g}",
        "clip": "Gradients clipped at norm {:g}",
        "ema": "Evaluated is the average of the weights that decays by {:g} a step",
    }
    return [words.format(recipe[field]) for field, words in said.items() if recipe.get(field)]


def _seeds(count: int) -> str:
    if count == 1:
        return "Every arm ran with one seed."
    return f"Every arm ran with the same {count} seeds, which fix its initial weights and the order of the samples."


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _widths(hidden: Sequence[int]) -> str:
    if len(set(hidden)) == 1:
        return f"{len(hidden)} hidden layers of {hidden[0]} units"
    return f"hidden layers of {', '.join(map(str, hidden))} units"


def _learning_rates(summary: Summary) -> str:
    if summary.plan["tune"]:
        return "each arm at the learning rate that did best on validation data"
    rates = [f"{rate:g}" for rate in dict.fromkeys(arm.learning_rate or 0 for arm in summary.arms)]
    return f"learning rate {rates[0]}" if len(rates) == 1 else f"at each of the learning rates {_listed(rates)}"
