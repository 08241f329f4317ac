"""``zeromean probe``: a model of the user's own, or a recipe's network, probed on a data set before or while it trains.

The user's code is imported, as Python does, and nothing else of it is loaded. A model of one's own gets images
``[N, C, H, W]``, a recipe's what the recipe trains on; both have pixels in [0, 1] unless the recipe normalizes them.
Training here is plain stochastic gradient descent on batches drawn with seed 0: enough to see a network start, not a
run of the recipe.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import cast

import torch
from torch import Tensor, nn

from zeromean.diagnostics import Report, probe
from zeromean.diagnostics.fisher import OnLayer
from zeromean.diagnostics.shield import default_loss
from zeromean.diagnostics.watch import Preset
from zeromean.lab.activation import parse
from zeromean.lab.data import AnyDataset, Dataset, FolderDataset, as_vectors, available, is_folder, load
from zeromean.lab.fit import check_data
from zeromean.lab.images import Material, material
from zeromean.lab.nets import mlp
from zeromean.lab.plan import make, splits
from zeromean.lab.recipes import RECIPES, AnyRecipe, ImageRecipe, find, override
from zeromean.lab.recording import ran_out_of_memory
from zeromean.lab.store import Run
from zeromean.lab.together import Samples
from zeromean.lab.train import build
from zeromean.spelling import nearest

_OVER_STEPS = ("input_shift", "saturated", "dead", "weight_gradient", "shift_ratio", "cosine")


@dataclass(frozen=True, eq=False)
class Subject:
    """What is probed.

    Attributes:
        title: for the terminal.
        model: on its device.
        images: to train on and to probe with, as the model takes them.
        targets: class indices, or numbers of the model's output.
        batch_size: of a training step.
        learning_rate: of plain stochastic gradient descent.
        samples: of the probe batch, drawn with seed 0 from the images.
    """

    title: str
    model: nn.Module
    images: Tensor
    targets: Tensor
    batch_size: int = 64
    learning_rate: float = 0.01
    samples: int = 500


def subject(
    target: str,
    data: str,
    activation: str | None,
    device: torch.device,
    *,
    flat: bool,
    norm: str = "none",
    samples: int = 500,
) -> Subject:
    """A model and what to probe it with.

    Args:
        target: ``module:function``, a function without arguments that returns a `torch.nn.Module`; or a recipe's name.
        data: a data set's name; of a recipe, its own if empty.
        activation: of a recipe's network.
        device: of everything.
        flat: whether a model of the user's own takes vectors.
        norm: of a convolutional recipe's network.
        samples: of the probe batch.

    Raises:
        ValueError: If there is no such recipe, module, function or data set, the function makes no module, the data are
            a folder of images, of another shape than the recipe's network takes or fewer than the samples, or an option
            is not for the target.
    """
    if is_folder(data):
        raise ValueError(
            f"data={data} is a folder of images, which zeromean probe does not read: choose one of "
            f"{', '.join(available())}, or call zm.probe in Python on a batch of your own"
        )
    if ":" not in target:
        if flat:
            raise ValueError(f"flat is for models of your own, got it for {target!r}: leave it out, a recipe chooses")
        return _of_recipe(target, data, activation, norm, samples, device)
    for option, value in (("activation", activation), ("norm", None if norm == "none" else norm)):
        if value is not None:
            raise ValueError(f"{option} is for recipes, got {value!r} for {target!r}: let its function choose")
    dataset = load(data or "digits")
    _check_samples(samples, len(dataset.train_labels), dataset.name)
    images = as_vectors(dataset)[0] if flat else dataset.train_images.float().div_(dataset.pixel_max)
    model = made_by(target).to(device)
    labels = dataset.train_labels.to(device)
    return Subject(f"{target} on {dataset.name}", model, images.to(device), labels, samples=samples)


def _check_samples(samples: int, count: int, data: str) -> None:
    if not 2 <= samples <= count:
        raise ValueError(
            f"samples must be at least 2 and at most {count}, as {data} has that many training images, got {samples}: "
            "500 is the default"
        )


def made_by(target: str) -> nn.Module:
    """Call ``module:function``, the module found as from a script in the current folder.

    Raises:
        ValueError: If the module or the function is not found, or it makes no `torch.nn.Module`.
    """
    name, _, function = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ValueError(f"no module {name!r} is found from {here}: write my_module:build for my_module.py") from error
    build_model = getattr(module, function, None)
    if not callable(build_model):
        known = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
        raise ValueError(f"{name} has no function {function!r}: {nearest(function, known)}")
    model = build_model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{target} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _of_recipe(name: str, data: str, activation: str | None, norm: str, samples: int, device: torch.device) -> Subject:
    if name not in RECIPES:
        raise ValueError(f"{name!r} is no recipe: {nearest(name, RECIPES)}, or my_module:build for a model of your own")
    published = find(name)
    if is_folder(published.data):
        raise ValueError(
            f"{name!r} is for a folder of images, data={published.data}, which zeromean probe does not read: probe "
            "another recipe, or call zm.probe in Python on a batch of your own"
        )
    recipe = override(published, [f"data={data}"] if data else [])
    arm = make(recipe, [activation or recipe.activations[0]], norms=[norm], seeds=1).arms[0]
    run = Run("probe", arm.activation, _first_rate(recipe), 0, norm=arm.norm)
    dataset = load(recipe.data)
    if isinstance(recipe, ImageRecipe):
        check_data(recipe, [norm], dataset, 1)
    _check_samples(samples, len(dataset.train_labels) - recipe.validation, dataset.name)
    known = training_samples(recipe, dataset, device)
    model = network(recipe, run, known, dataset).to(device)
    title, rate = f"{recipe.title}, {arm.label}", run.learning_rate
    return Subject(title, model, known.inputs, known.targets, recipe.batch_size, rate, samples)


def _first_rate(recipe: AnyRecipe) -> float:
    return recipe.rate(0) if isinstance(recipe, ImageRecipe) else recipe.learning_rates[0]


def training_samples(recipe: AnyRecipe, dataset: AnyDataset, device: torch.device) -> Samples:
    """All samples that the recipe's networks learn from, as they take them.

    Raises:
        ValueError: If they lie in a folder and are never all in memory.
    """
    if isinstance(recipe, ImageRecipe):
        if isinstance(dataset, FolderDataset):
            raise ValueError(
                f"the images of {recipe.name!r} are read from a folder while it trains and are never all in memory: "
                "call zm.probe in Python on a batch of them"
            )
        found = material(recipe, dataset, device)
        assert isinstance(found, Material)
        return Samples(found.train, found.train_labels)
    assert isinstance(dataset, Dataset)
    return splits(recipe, dataset, tuning=False).train.to(device)


def network(recipe: AnyRecipe, run: Run, samples: Samples, dataset: AnyDataset) -> nn.Module:
    """The network of a run, freshly initialised, on the CPU."""
    if isinstance(recipe, ImageRecipe):
        return build(recipe, run, len(dataset.classes))
    features = samples.inputs.shape[1]
    outputs = features if recipe.task == "reconstruction" else int(samples.targets.max()) + 1
    widths = (features, *recipe.hidden, outputs)
    return mlp(widths, parse(run.activation), seed=run.seed, initialization=recipe.initialization)


def run(
    chosen: Subject,
    *,
    preset: str = "full",
    layers: Sequence[str] = (),
    steps: int = 0,
    every: int = 10,
    on_layer: OnLayer | None = None,
) -> Report:
    """Probe on a fixed batch, before the first of so many training steps, on every so many, and after the last.

    Args:
        chosen: from `subject`.
        preset: ``light`` or ``full``.
        layers: names or globs; all that can be read if empty.
        steps: of plain stochastic gradient descent; 0 only probes.
        every: steps between two measurements.
        on_layer: see `zeromean.probe`.

    Raises:
        ValueError: If steps make no sense, memory runs out, or as `zeromean.probe`.
    """
    if steps < 0 or every < 1:
        raise ValueError(f"steps must be at least 0 and every 1, got {steps} and {every}: 0 steps only probe")
    try:
        return _run(chosen, cast(Preset, preset), list(layers) or None, steps, every, on_layer)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        lighter = " or choose --preset light" if preset == "full" else ""
        raise ValueError(
            f"out of memory ({error}): name fewer --samples than {chosen.samples}{lighter}, or make the network smaller"
        ) from error


def _run(
    chosen: Subject, preset: Preset, layers: list[str] | None, steps: int, every: int, on_layer: OnLayer | None
) -> Report:
    generator = torch.Generator().manual_seed(0)
    picked = draw(len(chosen.images), chosen.samples, generator).to(chosen.images.device)
    batch, targets = chosen.images[picked], chosen.targets[picked]
    if steps == 0:
        return probe.measure(chosen.model, batch, targets, preset, layers, on_layer=on_layer)

    def due(step: int) -> bool:
        return step % every == 0 or step == steps

    p = probe(chosen.model, preset, layers, due, inputs=batch, targets=targets, on_layer=on_layer)
    with p:
        _train(chosen, steps, generator)
    return p.report()


def draw(count: int, samples: int, generator: torch.Generator) -> Tensor:
    """Positions of so many different samples, or of all where there are fewer."""
    return torch.randperm(count, generator=generator)[:samples]


def _train(chosen: Subject, steps: int, generator: torch.Generator) -> None:
    """The last forward pass, behind the last update, is there to be measured."""
    optimizer = torch.optim.SGD(chosen.model.parameters(), chosen.learning_rate)
    for step in range(steps + 1):
        picked = draw(len(chosen.images), chosen.batch_size, generator).to(chosen.images.device)
        loss = default_loss(chosen.model(chosen.images[picked]), chosen.targets[picked])
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def check_output(folder: Path) -> None:
    """Whether a report can be written into a folder, which need not exist yet; nothing is left behind.

    Raises:
        ValueError: If a file is in its place or above it, or it cannot be written to.
    """
    there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    if not there.is_dir():
        raise ValueError(f"output must be a folder, old or new, got {folder}, where {there} is none: name another one")
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"output must be a folder that can be written to, got {folder} ({error.strerror}): name another one, or "
            f"change the permissions of {there}"
        ) from error


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.json and the pictures that the report has numbers for; returns their paths."""
    pictures = {"units": report.histograms("mean")}
    if len(report.steps) > 1:
        shown = {name for layer in report.layers for name in layer.series}
        pictures |= {f"steps_{name}": report.heat_map(name) for name in _OVER_STEPS if name in shown}
    if any("cosine" in layer.of_units for layer in report.layers):
        pictures["arrows"] = report.arrows()
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"report.json": report.to_json()} | {f"{name}.svg": svg for name, svg in pictures.items()}
    for name, content in contents.items():
        (folder / name).write_text(content)
    return [folder / name for name in contents]
