"""The plan of a study: decided, printed and written before anything runs.

Arms x seeds, what is compared with what, the tuning budget (the same for every arm), the smallest difference that
the design can detect, and where it runs. ``plan.json`` is this, and a study continues only under the same plan.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import torch

import zeromean
from zeromean.lab import data
from zeromean.lab.activation import Activation, parse
from zeromean.lab.data.augment import part_of_batch
from zeromean.lab.fit import check_network
from zeromean.lab.nets import StackedNetwork
from zeromean.lab.recipes.images import ImageRecipe, Norm
from zeromean.lab.recipes.recipe import Recipe, Task, unset
from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.together import Samples, Splits, Steps, build, watch
from zeromean.spelling import nearest

AnyRecipe = Recipe | ImageRecipe
NORMS: tuple[Norm, ...] = get_args(Norm)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: its folder, such as ``leaky_relu-0.1``.
        label: as tables print it, such as ``LeakyReLU(0.1)``.
        activation: its canonical text.
        learning_rate: None where tuning chooses it.
        norm: the normalization layers, ``none`` or ``batch``.
    """

    name: str
    label: str
    activation: str
    learning_rate: float | None
    norm: str = "none"


@dataclass(frozen=True)
class Side:
    """What makes one arm differ from another: the activation and the normalization layers."""

    activation: Activation
    norm: str = "none"

    @property
    def text(self) -> str:
        """The canonical spelling: ``relu+batch``, or ``relu`` without normalization."""
        return self.activation.text if self.norm == "none" else f"{self.activation.text}+{self.norm}"

    def arm(self, rate: float | None, suffix: str, note: str) -> Arm:
        """The arm at that learning rate; suffix and note tell it from the same side at another rate."""
        name, label = self.activation.slug, self.activation.label
        if self.norm != "none":
            name, label = f"{name}-{self.norm}", f"{label} + {self.norm.capitalize()}Norm"
        return Arm(name + suffix, label + note, self.activation.text, rate, self.norm)


def parse_side(text: str) -> Side:
    """Read ``relu`` or ``relu+batch``.

    Raises:
        ValueError: the activation or the normalization is unknown.
    """
    activation, plus, norm = text.rpartition("+")
    if not plus or not norm.isalpha():
        return Side(parse(text))
    return Side(parse(activation), _norm(norm))


def _norm(text: str) -> str:
    if text not in NORMS:
        raise ValueError(f"unknown normalization {text!r}: {nearest(text, NORMS)}")
    return text


@dataclass(frozen=True)
class Plan:
    """Everything that a study's numbers depend on.

    Attributes:
        study: the folder's name.
        recipe: the experiment.
        arms: in the order of the report.
        comparisons: pairs (arm, baseline) of arm names.
        seeds: every arm runs with each of them.
        tune: whether each arm's learning rate is chosen on validation data first.
    """

    study: str
    recipe: AnyRecipe
    arms: tuple[Arm, ...]
    comparisons: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    tune: bool

    def runs(self, chosen: Mapping[str, float]) -> list[Run]:
        """The final runs, neighbours sharing an activation; ``chosen`` holds the tuned learning rates."""
        rates = {arm.name: chosen[arm.name] if arm.learning_rate is None else arm.learning_rate for arm in self.arms}
        return [
            Run(arm.name, arm.activation, rates[arm.name], seed, norm=arm.norm)
            for arm in self.arms
            for seed in self.seeds
        ]

    def tuning_runs(self) -> list[Run]:
        """The runs of ``--tune``: every arm x every learning rate of the grid x the tuning seeds."""
        if not self.tune:
            return []
        assert isinstance(self.recipe, Recipe)
        return [
            Run(arm.name, arm.activation, rate, seed, "tuning")
            for arm in self.arms
            for rate in self.recipe.tuning_grid
            for seed in range(self.recipe.tuning_seeds)
        ]

    def decided(self) -> dict[str, Any]:
        """The part of ``plan.json`` that must not change between sessions of one study."""
        recipe = {**asdict(self.recipe), "task": self.recipe.task, "error_unit": self.recipe.error_unit}
        return _plain_dict(
            {
                "study": self.study,
                "recipe": recipe,
                "arms": [asdict(arm) for arm in self.arms],
                "comparisons": self.comparisons,
                "seeds": self.seeds,
                "tune": self.tune,
            }
        )

    def known(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of a ``plan.json``, with the fields that recipes did not have yet when it was written."""
        return {**_plain_dict(unset(type(self.recipe))), **recipe}


def make(
    recipe: AnyRecipe,
    activations: Sequence[str],
    *,
    seeds: int,
    norms: Sequence[str] = (),
    tune: bool = False,
    baseline: str | None = None,
    name: str | None = None,
    first_seed: int = 0,
) -> Plan:
    """Plan a comparison.

    Args:
        recipe: the experiment.
        activations: texts of the arms; none takes the recipe's.
        seeds: runs an arm.
        norms: normalization layers, each with each activation; none takes the recipe's.
        tune: choose every arm's learning rate from the recipe's grid on a validation split.
        baseline: the arm to compare with, such as ``relu`` or ``relu+batch``; by default the recipe's, or the first
            arm if that is not among them.
        name: of the study's folder; by default the recipe's name.
        first_seed: seeds count up from it.

    Raises:
        ValueError: an arm is named twice or unknown, the baseline is no arm, the recipe cannot be tuned or
            normalized, does not fit its network or its data, or a number is out of range.
    """
    check_network(recipe)
    sides = _sides(recipe, activations, norms)
    if seeds < 1 or first_seed < 0 or first_seed + seeds > 2**16:
        raise ValueError(f"seeds must lie between 0 and 65535 and be at least one, got {seeds} from {first_seed}")
    if tune and isinstance(recipe, ImageRecipe):
        raise ValueError(
            f"--tune is not offered for {recipe.name!r}, whose schedule has several learning rates: compare studies "
            "with rate_factor=0.5, rate_factor=2 and validation=5000 instead"
        )
    if isinstance(recipe, ImageRecipe) and recipe.ema and any(side.norm == "batch" for side in sides):
        raise ValueError(
            f"ema must be 0 with batch normalization, whose statistics are not those of averaged weights, got "
            f"{recipe.ema:g}: leave it out of {recipe.name!r}, or compare --norm none"
        )
    reference = _baseline(sides, baseline, recipe)
    rates: Sequence[float | None] = [None] if tune else recipe.learning_rates
    notes = [(f"-lr{rate:g}", f", lr {rate:g}") if len(rates) > 1 else ("", "") for rate in rates]
    arms = [side.arm(rate, *note) for side in sides for rate, note in zip(rates, notes, strict=True)]
    if len({arm.name for arm in arms}) < len(arms):
        raise ValueError(
            f"arms must have different folders, got {', '.join(arm.name for arm in arms)}: round their settings"
        )
    comparisons = tuple(
        (side.arm(rate, *note).name, reference.arm(rate, *note).name)
        for rate, note in zip(rates, notes, strict=True)
        for side in sides
        if side != reference
    )
    return Plan(
        name or recipe.name, recipe, tuple(arms), comparisons, tuple(range(first_seed, first_seed + seeds)), tune
    )


def _sides(recipe: AnyRecipe, activations: Sequence[str], norms: Sequence[str]) -> list[Side]:
    """Every activation with every kind of normalization, those without any first."""
    wanted = [_norm(text) for text in norms] or (list(recipe.norms) if isinstance(recipe, ImageRecipe) else ["none"])
    if isinstance(recipe, Recipe) and set(wanted) != {"none"}:
        raise ValueError(
            f"--norm {' '.join(wanted)} is not offered for {recipe.name!r}: its runs are trained as one stack of fully "
            "connected networks, which has no normalization layers; take a convolutional recipe, as cifar100-elu11"
        )
    wanted.sort(key=NORMS.index)
    sides = [Side(parse(text), norm) for norm in wanted for text in activations or recipe.activations]
    if len(set(sides)) < len(sides):
        raise ValueError(
            f"every arm must be named once, got {', '.join(side.text for side in sides)}: remove the repeats"
        )
    return sides


def _baseline(sides: list[Side], baseline: str | None, recipe: AnyRecipe) -> Side:
    wanted = parse_side(recipe.baseline if baseline is None else baseline)
    if baseline is None:
        return next((side for side in sides if side.activation == wanted.activation), sides[0])
    if wanted not in sides:
        raise ValueError(
            f"the baseline {wanted.text!r} is no arm: choose one of {', '.join(side.text for side in sides)}"
        )
    return wanted


def written_plan(study: Study) -> dict[str, Any] | None:
    """The plan in a study's folder, or None where none has begun.

    Raises:
        DamagedFileError: it cannot be read, or it is of a version whose plans did not name normalization layers.
    """
    plan = study.plan()
    if plan is not None and any("norm" not in arm for arm in plan["arms"]):
        raise DamagedFileError(
            f"{study.path / 'plan.json'} is of an older version of zeromean, which named no normalization layers: "
            "read it with that version, or start in another folder with --name"
        )
    return plan


def splits(recipe: Recipe, dataset: data.Dataset, *, tuning: bool) -> Splits:
    """The samples of a stage: tuning never sees the test set."""
    held_out = recipe.tuning_validation if tuning else recipe.validation
    train, test = _samples(recipe.task, dataset)
    validation = None
    if held_out:
        try:
            kept, out = data.split_validation(dataset.train_labels, held_out)
        except ValueError as error:
            raise ValueError(f"{'tuning_validation' if tuning else 'validation'}={held_out}: {error}") from error
        train, validation = train.take(kept), train.take(out)
    probe = train.take(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: recipe.probe_samples])
    return Splits(train, probe, validation, None if tuning else test)


def _samples(task: Task, dataset: data.Dataset) -> tuple[Samples, Samples]:
    train, test = data.as_vectors(dataset)
    if task == "reconstruction":
        return Samples(train, train), Samples(test, test)
    return Samples(train, dataset.train_labels), Samples(test, dataset.test_labels)


def estimate_seconds(plan: Plan, dataset: data.AnyDataset, device: torch.device) -> float | None:
    """Training time of the whole study, from a few timed steps of each stage's real stacked network.

    None for a convolutional recipe: to compile and warm up a step takes longer than a reader of plans waits, and the
    first epoch tells it.
    """
    if isinstance(plan.recipe, ImageRecipe):
        return None
    assert isinstance(dataset, data.Dataset)
    recipe = plan.recipe
    stages = [(plan.tuning_runs(), True), (plan.runs(dict.fromkeys((arm.name for arm in plan.arms), 0.01)), False)]
    return sum(
        _stage_seconds(recipe, runs, splits(recipe, dataset, tuning=tuning), device) for runs, tuning in stages if runs
    )


def _stage_seconds(recipe: Recipe, runs: list[Run], parts: Splits, device: torch.device) -> float:
    batches = len(parts.train) // recipe.batch_size
    parts = parts.to(device)
    timed = min(batches, 5 if device.type == "cpu" else 200) * recipe.batch_size
    idle = [replace(run, learning_rate=0.0) for run in runs]
    network = build(recipe, idle, parts.train).to(device)
    steps = Steps(recipe, idle, network, parts.train.take(torch.arange(timed or len(parts.train), device=device)))
    watch(network, recipe.task, parts, steps.epoch(0))
    times = [_timed(steps, network, recipe, parts) for _ in range(3)]
    stepping, watching = (min(taken[part] for taken in times) for part in (0, 1))
    return recipe.epochs * (stepping / steps.count * batches + watching)


def _timed(steps: Steps, network: StackedNetwork, recipe: Recipe, parts: Splits) -> tuple[float, float]:
    started = time.perf_counter()
    losses = steps.epoch(1)
    losses.sum().item()
    stepped = time.perf_counter()
    watch(network, recipe.task, parts, losses)
    return stepped - started, time.perf_counter() - stepped


def epochs_of(recipe: AnyRecipe, samples: int) -> int:
    """Passes over that many training samples in a run, the last of which may be cut short.

    Raises:
        ValueError: the batch is larger than the training set.
    """
    if isinstance(recipe, Recipe):
        return recipe.epochs
    part_of_batch(recipe.batch_size, samples, (0, 1))
    return -(-recipe.steps // (samples // recipe.batch_size))


def describe(
    plan: Plan, dataset: data.AnyDataset, device: torch.device, seconds: float | None, *, processes: int = 1
) -> dict[str, Any]:
    """The whole of ``plan.json``: what was decided, and where and from what it runs."""
    from zeromean.lab import stats

    detectable = stats.smallest_detectable_difference(
        len(plan.seeds), plan.recipe.expected_sd, comparisons=max(1, len(plan.comparisons))
    )
    samples = len(dataset.train_labels) - plan.recipe.validation
    return _plain_dict(
        {
            **plan.decided(),
            "budget": {
                "epochs": epochs_of(plan.recipe, samples),
                "runs": len(plan.arms) * len(plan.seeds),
                "runs_per_arm": len(plan.seeds),
                "tuning_runs_per_arm": len(plan.tuning_runs()) // len(plan.arms),
                "seconds_estimate": None if seconds is None else round(seconds, 1),
            },
            "detectable_difference": round(detectable, 4) if detectable != float("inf") else None,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "versions": {
                "zeromean": zeromean.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "device": {**device_facts(device), "processes": processes},
            "git": git_state(),
            "data": {
                "name": dataset.name,
                "source": dataset.source,
                "checksums": dataset.checksums,
                "classes": dataset.classes,
                "train": samples,
                "validation": plan.recipe.validation,
                "test": len(dataset.test_labels),
            },
        }
    )


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the study runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"kind": device.type, "name": name, "threads": torch.get_num_threads(), "platform": platform.platform()}


def _processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state() -> dict[str, Any] | None:
    """Commit and cleanness of the repository that we run in, or None outside of one."""

    def ask(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _plain_dict(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON would give it back: tuples are lists."""
    return {key: _plain(value) for key, value in facts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
