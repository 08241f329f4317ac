"""A recipe: everything that one experiment fixes, as one frozen value.

A recipe is made by a Python function; a variant calls that function and changes a field with
:func:`dataclasses.replace`. The command line changes fields the same way (``epochs=20``), see :func:`override`.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any, Literal

from zeromean.spelling import nearest

Task = Literal["classification", "reconstruction"]
Initialization = Literal["he", "activation"]
ConvolutionalInitialization = Literal["he", "activation", "lecun"]
Precision = Literal["float32", "tf32"]


@dataclass(frozen=True)
class Recipe:
    """One experiment on fully connected networks.

    Attributes:
        name: what the command line calls it.
        title: one line for tables and reports.
        source: the part of a paper that it follows, and which parts are our choice.
        data: a name that :func:`zeromean.lab.data.load` knows.
        task: ``classification`` (softmax cross-entropy; error in percent of the samples) or ``reconstruction``
            (mean squared error of a pixel; the error is 1000 times that).
        hidden: widths of the hidden layers, input to output.
        activations: the arms that ``compare`` trains when none are named; the first is the one under study.
        baseline: the arm that the others are compared with.
        epochs: passes over the training set.
        batch_size: samples a step; the remainder of an epoch is left out (every epoch has a new order).
        learning_rates: of plain stochastic gradient descent, constant; more than one makes an arm of each.
        tuning_grid: the learning rates that ``--tune`` tries for every arm.
        tuning_seeds: runs per arm and learning rate while tuning.
        tuning_validation: training samples held out, by a fixed seed, while tuning.
        validation: training samples held out of the final runs to draw a validation curve; 0 trains on all.
        initialization: ``he`` (variance 2 / fan_in for every arm, as in the paper) or ``activation``
            (the gain that keeps the second moment of a unit Gaussian through the arm's own activation).
        precision: of matrix products on a GPU: ``float32``, or ``tf32`` (10 bits of mantissa, several times faster).
        probe_samples: size of the fixed training subset on which mean activations, loss and error are tracked.
        seeds: runs per arm when the command line names no number.
        expected_sd: standard deviation of the test error between seeds that our own runs of this recipe
            showed (records/), in the unit of the error; the plan computes its detectable difference from it.
    """

    name: str
    title: str
    source: str
    data: str
    task: Task
    hidden: tuple[int, ...]
    activations: tuple[str, ...]
    baseline: str
    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    tuning_grid: tuple[float, ...]
    tuning_seeds: int
    tuning_validation: int
    expected_sd: float
    validation: int = 0
    initialization: Initialization = "he"
    precision: Precision = "float32"
    probe_samples: int = 1000
    seeds: int = 10

    def __post_init__(self) -> None:
        """Check what no run could survive."""
        for field in ("epochs", "batch_size", "tuning_seeds", "tuning_validation", "probe_samples", "seeds"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{field} must be at least 1, got {getattr(self, field)}: give a positive whole number"
                )
        if self.validation < 0:
            raise ValueError(f"validation must be 0 or more samples, got {self.validation}: 0 trains on the whole set")
        for field in ("hidden", "learning_rates", "tuning_grid"):
            values = getattr(self, field)
            if not values or not all(0 < value < math.inf for value in values):
                raise ValueError(
                    f"{field} must be one or more positive numbers, got {values}: for example {field}=0.01"
                )
        for field in ("learning_rates", "tuning_grid"):
            values = [f"{value:g}" for value in getattr(self, field)]
            if len(set(values)) < len(values):
                raise ValueError(
                    f"{field} must differ in their first six digits, got {', '.join(values)}: name each once"
                )
        if not self.activations:
            raise ValueError("activations must name at least one, got none: for example activations=elu,relu")
        for field in ("task", "initialization", "precision"):
            allowed = typing.get_args(typing.get_type_hints(Recipe)[field])
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}")

    @property
    def error_unit(self) -> str:
        """The unit of every error of this recipe, as tables print it."""
        return "%" if self.task == "classification" else "1e-3"


def unset(recipe: type[Any]) -> dict[str, Any]:
    """What fields of a recipe are where nobody sets them; records of older recipes lack those that came later."""
    fields = dataclasses.fields(recipe)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def override(recipe: Recipe, assignments: typing.Sequence[str]) -> Recipe:
    """The recipe with fields changed by ``field=value`` texts, as the command line gives them.

    Args:
        recipe: what to start from.
        assignments: such as ``epochs=20``, ``learning_rates=0.1,0.01``; lists are separated by commas.

    Raises:
        ValueError: an unknown field (names the nearest), a text without ``=``, or a value of the wrong type.
    """
    hints = typing.get_type_hints(Recipe)
    fixed = {"name", "title", "source", "task", "expected_sd"}
    changes: dict[str, Any] = {}
    for text in assignments:
        field, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"an override must read field=value, got {text!r}: for example epochs=20")
        if field not in hints or field in fixed:
            raise ValueError(
                f"recipe {recipe.name!r} has no field {field!r} to override: "
                f"{nearest(field, sorted(hints.keys() - fixed))}"
            )
        changes[field] = parse_value(field, value, hints[field])
    changes = {field: value for field, value in changes.items() if value != getattr(recipe, field)}
    if changes:
        told = (
            f"{field}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
            for field, value in changes.items()
        )
        changes["title"] = f"{recipe.title} ({', '.join(sorted(told))})"
    return dataclasses.replace(recipe, **changes)


def parse_value(field: str, text: str, hint: Any) -> Any:
    """A field's value from its text, as the command line gives it; the field names it in errors."""
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return tuple(parse_value(field, part, kind) for part in text.split(",") if part)
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{field} must be {kind}, got {text!r}: for example {field}={hint(1)}") from None
    return text
