"""Recipes for convolutional networks on images: everything that one experiment fixes, as one frozen value."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from zeromean.lab.data.imagenet import is_folder
from zeromean.lab.recipes.recipe import ConvolutionalInitialization, parse_value
from zeromean.spelling import nearest

Network = Literal["elu11", "elu18", "elu15"]
Norm = Literal["none", "batch"]
Precision = Literal["bfloat16", "float16", "tf32", "float32"]
Normalization = Literal["gcn-zca", "mean-std", "pixel-mean"]
Curve = Literal["stairs", "linear"]
Optimizer = Literal["sgd", "muon"]
_FIXED = {"name", "title", "source", "network", "phases", "rates", "expected_sd"}
_LONGEST = 1000.0
_FACTORS = ("length", "rate_factor", "dropout_factor")


@dataclass(frozen=True)
class Phase:
    """A stretch of the training with its own dropout.

    Attributes:
        steps: updates in it.
        dropout: a rate a stack.
        everywhere: behind every layer of a stack instead of its last one.
    """

    steps: int
    dropout: tuple[float, ...]
    everywhere: bool = False


@dataclass(frozen=True)
class ImageRecipe:
    """One experiment on a convolutional network.

    Attributes:
        name: what the command line calls it.
        title: one line for tables and reports.
        source: the part of a paper that it follows, and which parts are our choice.
        data: a name that :func:`zeromean.lab.data.load` or :func:`zeromean.lab.data.load_folder` knows.
        network: a function of :mod:`zeromean.lab.nets`.
        activations: the arms that ``compare`` trains when none are named; the first is the one under study.
        baseline: the arm that the others are compared with.
        phases: of the training, one after the other.
        batch_size: images a step, those of all processes together.
        rates: (step, learning rate) pairs, ascending steps from 0.
        curve: ``stairs`` holds a rate until the next pair, ``linear`` goes to it in a straight line.
        dropout_curve: ``stairs`` holds a phase's dropout rates, ``linear`` rises to them from 0 on a straight line.
        optimizer: ``sgd`` is stochastic gradient descent with momentum; ``muon`` updates the weights of layers by the
            nearest orthogonal matrix instead, ``w <- (1 - rate weight_decay) w - rate orthogonal(v)``, see
            :mod:`zeromean.kernels.muon`, and everything else as ``sgd`` does, without decay.
        momentum: ``v <- momentum v + g; w <- w - rate v``.
        nesterov: looks ahead: ``w <- w - rate (g + momentum v)``.
        weight_decay: L2, added to the gradient but by ``muon``; slopes of activations are exempt.
        decay_biases: whether biases, and the scales of normalization layers, decay as weights do.
        normalization: of the images, see :func:`zeromean.lab.data.prepare`; ``pixel-mean`` for those of a folder.
        pad: zeros on each side, out of which a crop of the old size is taken; not for a folder.
        resize: side of the square that an image of a folder becomes.
        crop: side of the part that is taken of it.
        flip: whether images are mirrored at random.
        alternate_flip: whether it is instead mirrored in every other epoch; not for a folder.
        cutout: side of the square at a random place of each training image that becomes 0; 0 cuts none.
        mixup: alpha of the Beta(alpha, alpha) distribution of the share that an image and its label keep when they are
            mixed with another one's; 0 mixes none.
        label_smoothing: share of the target spread over all classes.
        clip: largest norm of the whole gradient; 0 does not clip.
        ema: decay a step of the average of the weights that is evaluated; 0 evaluates the weights.
        accumulate: parts that a batch is split into, one after the other, for less memory.
        padding: of 2x2 kernels, see :mod:`zeromean.lab.nets.convolutional`.
        drop_before_pooling: drops before a stack's pooling instead of behind it.
        initialization: ``he``, ``activation`` or ``lecun``, see :func:`zeromean.lab.nets.elu11`.
        precision: of convolutions and matrix products on a GPU; a CPU computes in float32. ``float16`` is as fast as
            ``bfloat16`` and rounds to 10 bits instead of 7; the loss is scaled.
        norms: the kinds of normalization layers that ``compare`` trains when ``--norm`` names none.
        validation: training images held out of the runs, on which a validation error is drawn; 0 trains on all.
        probe_samples: size of the fixed training subset on which error and mean activations are tracked.
        seeds: runs per arm when the command line names no number.
        expected_sd: standard deviation of the test error between seeds, in percent.
    """

    name: str
    title: str
    source: str
    data: str
    network: Network
    activations: tuple[str, ...]
    baseline: str
    phases: tuple[Phase, ...]
    batch_size: int
    rates: tuple[tuple[int, float], ...]
    expected_sd: float
    curve: Curve = "stairs"
    dropout_curve: Curve = "stairs"
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_biases: bool = True
    normalization: Normalization = "gcn-zca"
    pad: int = 4
    resize: int = 256
    crop: int = 224
    flip: bool = True
    alternate_flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    label_smoothing: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    padding: Literal["alternate", "one", "ceil", "one_ceil"] = "alternate"
    drop_before_pooling: bool = False
    initialization: ConvolutionalInitialization = "he"
    precision: Precision = "bfloat16"
    norms: tuple[Norm, ...] = ("none",)
    validation: int = 0
    probe_samples: int = 1000
    seeds: int = 5

    def __post_init__(self) -> None:
        """Check what no run could survive."""
        for field in ("batch_size", "accumulate", "probe_samples", "seeds"):
            _check(getattr(self, field) >= 1, self, field, "at least 1")
        for field in ("pad", "cutout", "mixup", "validation", "clip", "weight_decay"):
            _check(0 <= getattr(self, field) < math.inf, self, field, "0 or more, and finite")
        for field in ("momentum", "ema", "label_smoothing"):
            _check(0 <= getattr(self, field) < 1, self, field, "in [0, 1)")
        for field, allowed in _choices().items():
            value = getattr(self, field)
            wanted = f"one of {', '.join(allowed)}"
            _check(all(one in allowed for one in (value if isinstance(value, tuple) else [value])), self, field, wanted)
        steps = [step for step, _ in self.rates]
        _check(steps[:1] == [0] and steps == sorted(set(steps)), self, "rates", "pairs of ascending steps from 0")
        _check(all(0 <= rate < math.inf for _, rate in self.rates), self, "rates", "finite and 0 or more")
        _check(
            bool(self.phases) and all(phase.steps >= 1 for phase in self.phases), self, "phases", "of a step or more"
        )
        rates = [phase.dropout for phase in self.phases]
        sound = all(own[-1:] == (0,) and all(0 <= rate < 1 for rate in own) for own in rates)
        _check(sound, self, "phases", "with dropout in [0, 1) for each stack, 0 for the last one")
        _check(bool(self.activations), self, "activations", "at least one")
        _check(bool(self.norms), self, "norms", "at least one")
        _check(self.batch_size % self.accumulate == 0, self, "accumulate", f"a divisor of {self.batch_size}")
        _check(1 <= self.crop <= self.resize, self, "crop", f"in [1, {self.resize}], which resize is")
        _check(self.momentum > 0 or not self.nesterov, self, "nesterov", "false where momentum is 0")
        if self.optimizer == "muon":
            told = "false where optimizer is muon (decay_biases=false on the command line)"
            _check(not self.decay_biases, self, "decay_biases", told)
            highest = max(rate for _, rate in self.rates)
            most = f"below {1 / highest:g} where optimizer is muon: one over the highest rate" if highest else ""
            _check(highest * self.weight_decay < 1, self, "weight_decay", most)
        _check(self.flip or not self.alternate_flip, self, "alternate_flip", "false where flip is")
        streamed = is_folder(self.data)
        _check(not (streamed and self.alternate_flip), self, "alternate_flip", f"false for the data {self.data!r}")
        fitting = f"{'pixel-mean' if streamed else 'gcn-zca or mean-std'} for the data {self.data!r}"
        fitting += "" if streamed else f", which is no folder (one of that name is ./{self.data})"
        _check((self.normalization == "pixel-mean") == streamed, self, "normalization", fitting)
        idle = {"pad": f"the data {self.data!r}"} if streamed else dict.fromkeys(("resize", "crop"), f"{self.data!r}")
        idle |= {"padding": self.network} if self.network == "elu15" else {}
        for field, user in idle.items():
            default = getattr(type(self), field)
            left = getattr(self, field) in (default, 0)
            _check(left, self, field, f"left at {default} where {user} does not use it")

    @property
    def steps(self) -> int:
        """Updates of the whole training."""
        return sum(phase.steps for phase in self.phases)

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The highest rate, which names the recipe's schedule in tables."""
        return (max(rate for _, rate in self.rates),)

    @property
    def together(self) -> int:
        """Runs that share a GPU where the command line names no number; small networks and batches alone leave it idle.

        On an H200, three of the 18-layer network at a batch of 100 train 1.1 times as many images a second as one.
        """
        if self.network == "elu11":
            return 4
        return 3 if self.network == "elu18" and self.batch_size < 256 else 1

    @property
    def everywhere(self) -> bool | None:
        """Whether dropout stands behind every layer or only a stack's last one; None where phases differ."""
        found = {phase.everywhere for phase in self.phases}
        return found.pop() if len(found) == 1 else None

    @property
    def task(self) -> Literal["classification"]:
        """What is learned."""
        return "classification"

    @property
    def error_unit(self) -> str:
        """The unit of every error, as tables print it."""
        return "%"

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        position = max(index for index, (first, _) in enumerate(self.rates) if first <= step)
        first, rate = self.rates[position]
        if self.curve == "stairs" or position + 1 == len(self.rates):
            return rate
        last, goal = self.rates[position + 1]
        return rate + (goal - rate) * (step - first) / (last - first)

    def phase(self, step: int) -> Phase:
        """The phase that a step belongs to, counted from 0."""
        return self._within(step)[0]

    def dropout_strength(self, step: int) -> float:
        """The share of its phase's dropout that a step has, counted from 0."""
        phase, done = self._within(step)
        return 1.0 if self.dropout_curve == "stairs" else min(1.0, done / phase.steps)

    def _within(self, step: int) -> tuple[Phase, int]:
        """The phase of a step, the last one for those after all, and the steps of it that are done."""
        for phase in self.phases[:-1]:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        return self.phases[-1], step

    def check_parts(self, processes: int) -> None:
        """Whether the part of a batch that each of so many processes takes can be split as the recipe asks.

        Raises:
            ValueError: it cannot.
        """
        own = self.batch_size // processes
        if own % self.accumulate:
            raise ValueError(
                f"accumulate must divide each process's {own} images of a batch, got {self.accumulate}: change it or "
                f"batch_size in the recipe {self.name!r}"
            )
        if self.mixup and own % 2:
            raise ValueError(
                f"mixup mixes pairs of images, so that each process's part of a batch must be even, got {own}: change "
                f"batch_size in the recipe {self.name!r}, or set mixup=0"
            )

    def shortened(self, factor: float) -> ImageRecipe:
        """The same training in so many times its steps, at least one a phase; rates keep their place in it.

        Raises:
            ValueError: the factor is not positive or above 1000.
        """
        if not 0 < factor <= _LONGEST:
            raise ValueError(
                f"length must be a positive number and at most {_LONGEST:g}, got {factor:g}: 0.1 trains a tenth of the "
                "steps"
            )
        phases = tuple(replace(phase, steps=max(1, round(phase.steps * factor))) for phase in self.phases)
        # The first rate keeps its place, and of others that meet the last one holds.
        rates = {max(1, round(step * factor)) if step else 0: rate for step, rate in self.rates}
        return replace(self, phases=phases, rates=tuple(rates.items()))


def override(recipe: ImageRecipe, assignments: Sequence[str]) -> ImageRecipe:
    """The recipe with fields changed by ``field=value`` texts, as the command line gives them.

    Besides its own fields, ``length=0.01`` trains a hundredth of the steps (see :meth:`ImageRecipe.shortened`), and
    ``rate_factor=2`` doubles every learning rate, ``dropout_factor=0.5`` halves every dropout rate, and
    ``everywhere=true`` drops behind every layer of a stack in every phase, ``false`` behind its last one only. Another
    ``optimizer`` needs its ``weight_decay``: what fits one is a hundred times too much or too little for the other.

    Args:
        recipe: what to start from.
        assignments: such as ``batch_size=50``, ``flip=false``; lists are separated by commas.

    Raises:
        ValueError: an unknown field (names the nearest), a text without ``=``, a value of the wrong type, or another
            optimizer without a decay.
    """
    hints = typing.get_type_hints(ImageRecipe) | dict.fromkeys(_FACTORS, float) | {"everywhere": bool}
    changes: dict[str, Any] = {}
    for text in assignments:
        field, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"an override must read field=value, got {text!r}: for example length=0.01")
        if field not in hints.keys() - _FIXED:
            known = nearest(field, sorted(hints.keys() - _FIXED))
            raise ValueError(f"recipe {recipe.name!r} has no field {field!r} to override: {known}")
        if field in changes:
            raise ValueError(f"{field} must be named once, got {text!r} too: leave one of them out")
        changes[field] = _truth(field, value) if hints[field] is bool else parse_value(field, value, hints[field])
    named = changes.keys()
    changes = {field: value for field, value in changes.items() if value != getattr(recipe, field, 1.0)}
    if not changes:
        return recipe
    told = ", ".join(sorted(f"{field}={_told(value)}" for field, value in changes.items()))
    length, factor, dropout = (changes.pop(field, 1.0) for field in _FACTORS)
    if not 0 < factor < math.inf:
        raise ValueError(f"rate_factor must be a positive number, got {factor:g}: 2 doubles every learning rate")
    shortened = recipe.shortened(length)
    rates = tuple((step, rate * factor) for step, rate in shortened.rates)
    highest = max(rate for phase in shortened.phases for rate in phase.dropout)
    if not 0 <= dropout * highest < 1:
        raise ValueError(f"dropout_factor must keep rates in [0, 1), got {dropout:g}: the highest one is {highest:g}")
    everywhere = changes.pop("everywhere", None)
    phases = tuple(
        replace(
            phase,
            dropout=tuple(dropout * rate for rate in phase.dropout),
            everywhere=phase.everywhere if everywhere is None else everywhere,
        )
        for phase in shortened.phases
    )
    made = replace(shortened, **changes, rates=rates, phases=phases, title=f"{recipe.title} ({told})")
    if made.optimizer != recipe.optimizer and "weight_decay" not in named:
        raise ValueError(
            f"optimizer={made.optimizer} must come with weight_decay=, got none: the recipe's {recipe.weight_decay:g} "
            f"is for {recipe.optimizer}; sgd adds it to the gradient, usually 0.0005, muon takes it from the weights, "
            "usually 0.05"
        )
    return made


def _truth(field: str, text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{field} must be true or false, got {text!r}: for example {field}=false")
    return text == "true"


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _choices() -> dict[str, Sequence[str]]:
    hints = typing.get_type_hints(ImageRecipe)
    named = (
        "network",
        "normalization",
        "curve",
        "dropout_curve",
        "optimizer",
        "padding",
        "initialization",
        "precision",
    )
    return {name: typing.get_args(hints[name]) for name in named} | {"norms": typing.get_args(Norm)}


def _check(holds: bool, recipe: ImageRecipe, field: str, rule: str) -> None:
    if not holds:
        raise ValueError(
            f"{field} must be {rule}, got {getattr(recipe, field)}: change it in the recipe {recipe.name!r}"
        )
