"""Train the runs of a study together: one stacked network, one loop that reads from top to bottom.

Plain stochastic gradient descent, ``w <- w - learning_rate * dL/dw``, on every run of a stage at once. Each run has its
own initial weights, order of samples, noise and learning rate, all functions of its seed (and the epoch or step)
alone, so a run is the same whichever runs it shares the stack with, up to the rounding of a batched product, and a
killed training continues from its last epoch with nothing but the weights. On CUDA the step is a graph, replayed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeromean.lab.activation import parse
from zeromean.lab.nets import StackedNetwork, mlp
from zeromean.lab.observe import finite, mean_size
from zeromean.lab.order import noise_seeds, sample_order
from zeromean.lab.pauses import OnEpoch
from zeromean.lab.recipes.recipe import Recipe, Task
from zeromean.lab.store import Checkpoint, Run, Study


@dataclass(frozen=True)
class Samples:
    """Inputs ``[N, features]`` in float32 and targets: labels ``[N]``, or the inputs themselves."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Samples:
        """On that device; a reconstruction keeps one tensor for both."""
        inputs = self.inputs.to(device)
        return Samples(inputs, inputs if self.targets is self.inputs else self.targets.to(device))

    def take(self, index: Tensor) -> Samples:
        """The samples at those positions."""
        inputs = self.inputs[index]
        return Samples(inputs, inputs if self.targets is self.inputs else self.targets[index])

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Splits:
    """What a stage trains on, the fixed training subset it is watched on, and what it is judged on."""

    train: Samples
    probe: Samples
    validation: Samples | None
    test: Samples | None

    def to(self, device: torch.device) -> Splits:
        """On that device."""
        validation, test = (part and part.to(device) for part in (self.validation, self.test))
        return Splits(self.train.to(device), self.probe.to(device), validation, test)


def train(
    recipe: Recipe,
    runs: Sequence[Run],
    splits: Splits,
    study: Study,
    *,
    device: torch.device,
    on_epoch: OnEpoch = lambda epoch, runs: None,
    checkpoint_every: int = 1,
) -> None:
    """Train every run that has no result yet, and leave its files in the study's folder.

    Args:
        recipe: network, schedule and task.
        runs: of one stage.
        splits: the stage's data.
        study: where results and checkpoints lie.
        device: where to train.
        on_epoch: called with the epochs done and the runs in training, at the start and after each epoch.
        checkpoint_every: epochs between checkpoints; a killed training loses at most as many.

    Raises:
        DamagedFileError: a result or the checkpoint cannot be read.
    """
    stage = runs[0].stage
    while pending := study.pending(runs):
        checkpoint = study.read_checkpoint(stage)
        stacked = _runs_of(checkpoint, runs) or pending
        if not set(stacked) & set(pending):
            study.drop_checkpoint(stage)
            continue
        _train_stack(recipe, stacked, splits, study, checkpoint, device, on_epoch, checkpoint_every)


def _runs_of(checkpoint: Checkpoint | None, runs: Sequence[Run]) -> list[Run]:
    folders = {run.folder: run for run in runs}
    return [folders[folder] for folder in checkpoint[1]["runs"]] if checkpoint else []


def _train_stack(
    recipe: Recipe,
    runs: Sequence[Run],
    splits: Splits,
    study: Study,
    checkpoint: Checkpoint | None,
    device: torch.device,
    on_epoch: OnEpoch,
    checkpoint_every: int,
) -> None:
    torch.set_float32_matmul_precision("high" if recipe.precision == "tf32" else "highest")
    splits = splits.to(device)
    network = build(recipe, runs, splits.train).to(device)
    steps = Steps(recipe, runs, network, splits.train)

    done, diverged, spent = _restore(network, runs, study, checkpoint)
    on_epoch(done, len(runs))
    for epoch in range(done, recipe.epochs):
        started = time.perf_counter()
        losses = steps.epoch(epoch)
        rows = watch(network, recipe.task, splits, losses)
        spent += time.perf_counter() - started
        for position, row in enumerate(rows):
            if diverged[position] is None and row["train_loss"] is None:
                diverged[position] = epoch + 1
            study.append_metrics(runs[position], {"epoch": epoch + 1, **row, "seconds": round(spent, 3)})
        if (epoch + 1) % checkpoint_every == 0 or epoch + 1 == recipe.epochs:
            state = {"runs": [run.folder for run in runs], "epoch": epoch + 1, "diverged": diverged, "seconds": spent}
            study.write_checkpoint(runs[0].stage, network.state_dict(), state)
        on_epoch(epoch + 1, len(runs))

    _finish(network, recipe, runs, splits, study, diverged, spent)
    study.drop_checkpoint(runs[0].stage)


def build(recipe: Recipe, runs: Sequence[Run], samples: Samples) -> StackedNetwork:
    """The stacked network of those runs, freshly initialised."""
    outputs = samples.inputs.shape[1] if recipe.task == "reconstruction" else int(samples.targets.max()) + 1
    widths = (samples.inputs.shape[1], *recipe.hidden, outputs)
    return StackedNetwork(
        [mlp(widths, parse(run.activation), seed=run.seed, initialization=recipe.initialization) for run in runs]
    )


class Steps:
    """The training steps of an epoch; on CUDA one step is captured as a graph, and an epoch replays it.

    Args:
        recipe: batch size and task.
        runs: give seeds and learning rates.
        network: is updated in place.
        samples: the training set, on the network's device.
    """

    def __init__(self, recipe: Recipe, runs: Sequence[Run], network: StackedNetwork, samples: Samples) -> None:
        self.recipe, self.network, self.samples = recipe, network, samples
        self.count = len(samples) // recipe.batch_size
        if self.count == 0:
            raise ValueError(
                f"batch_size {recipe.batch_size} exceeds the {len(samples)} training samples: make it smaller"
            )
        device = samples.inputs.device
        self.seeds = torch.tensor([run.seed for run in runs], device=device)
        self.rates = torch.tensor([run.learning_rate for run in runs], device=device).view(-1, 1, 1)
        self.noisy, self.slopes = network.noisy, network.slopes()
        self.order = torch.zeros(self.count, len(runs), recipe.batch_size, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.first = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss_sum = torch.zeros(len(runs), dtype=torch.float64, device=device)
        self.graph = self._capture() if device.type == "cuda" else None

    def epoch(self, epoch: int) -> Tensor:
        """Train one epoch; returns every run's mean loss over its steps."""
        kept = self.count * self.recipe.batch_size
        order = sample_order(self.seeds, epoch, len(self.samples))[:, :kept]
        self.order.copy_(order.view(len(self.seeds), self.count, -1).transpose(0, 1))
        self.step.zero_()
        self.first.fill_(epoch * self.count)
        self.loss_sum.zero_()
        for _ in range(self.count):
            self.graph.replay() if self.graph is not None else self._step()
        return self.loss_sum / self.count

    def _step(self) -> None:
        batch = self.samples.take(self.order.index_select(0, self.step)[0])
        if self.noisy:
            self.network.set_seeds(noise_seeds(self.seeds, self.network.hidden_layers, self.first + self.step))
        outputs = self.network.descend(batch.inputs, self.rates)
        losses = loss_of_each(self.recipe.task, outputs, batch.targets).mean(1)
        losses.sum().backward()
        with torch.no_grad():
            for slope, rows in self.slopes:
                assert slope.grad is not None
                slope.addcmul_(slope.grad, self.rates[rows], value=-1)
                slope.grad = None
            self.loss_sum += losses
            self.step += 1

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
                self.step.zero_()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.network.load_state_dict(before)
        return graph


def loss_of_each(task: Task, outputs_rbk: Tensor, targets: Tensor) -> Tensor:
    """The loss ``[R, B]`` of every sample: cross-entropy, or the mean squared error of its outputs."""
    if task == "reconstruction":
        return (outputs_rbk - targets).square().mean(2)
    runs, batch, classes = outputs_rbk.shape
    labels = targets.expand(runs, batch).reshape(-1)
    return F.cross_entropy(outputs_rbk.reshape(-1, classes), labels, reduction="none").view(runs, batch)


def error_of_each(task: Task, outputs_rbk: Tensor, targets: Tensor) -> Tensor:
    """The error ``[R, B]`` of every sample: 100 where the class is wrong, or 1000 x the mean squared error."""
    if task == "reconstruction":
        return loss_of_each(task, outputs_rbk, targets) * 1000
    return (outputs_rbk.argmax(2) != targets).float() * 100


@torch.no_grad()
def evaluate(network: StackedNetwork, task: Task, samples: Samples) -> tuple[list[float], list[float]]:
    """Every run's mean loss and error on the samples, in evaluation mode; no error where the loss is not finite."""
    network.eval()
    sums = torch.zeros(2, network.runs, dtype=torch.float64, device=samples.inputs.device)
    for first in range(0, len(samples), 1000):
        part = samples.take(torch.arange(first, min(first + 1000, len(samples)), device=samples.inputs.device))
        outputs = network(part.inputs.expand(network.runs, -1, -1))
        sums[0] += loss_of_each(task, outputs, part.targets).double().sum(1)
        sums[1] += error_of_each(task, outputs, part.targets).double().sum(1)
    network.train()
    losses, errors = (sums / len(samples)).tolist()
    return losses, [error if math.isfinite(loss) else math.nan for loss, error in zip(losses, errors, strict=True)]


@torch.no_grad()
def mean_activations(network: StackedNetwork, samples: Samples) -> tuple[Tensor, Tensor]:
    """Median and interquartile range over a layer's units of each unit's mean activation, both ``[R, layers]``."""
    network.eval()
    _, hidden = network.activations(samples.inputs.expand(network.runs, -1, -1))
    network.train()
    points = torch.tensor([0.25, 0.5, 0.75], device=samples.inputs.device)
    quartiles = torch.stack([torch.quantile(layer.mean(1), points, dim=1) for layer in hidden], dim=2)
    return quartiles[1], quartiles[2] - quartiles[0]


def watch(network: StackedNetwork, task: Task, splits: Splits, losses: Tensor) -> list[dict[str, Any]]:
    """What an epoch leaves in ``metrics.jsonl``, a row a run; ``losses`` are its mean training losses."""
    _, train_errors = evaluate(network, task, splits.probe)
    validation = evaluate(network, task, splits.validation)[1] if splits.validation else [math.nan] * network.runs
    medians, spreads = mean_activations(network, splits.probe)
    return [
        {
            "train_loss": finite(loss),
            "train_error": finite(train_error) if math.isfinite(loss) else None,
            "validation_error": finite(validation_error) if math.isfinite(loss) else None,
            "mean_activation": [finite(value) for value in median],
            "mean_activation_spread": [finite(value) for value in spread],
        }
        for loss, train_error, validation_error, median, spread in zip(
            losses.tolist(), train_errors, validation, medians.tolist(), spreads.tolist(), strict=True
        )
    ]


def _restore(
    network: StackedNetwork, runs: Sequence[Run], study: Study, checkpoint: Checkpoint | None
) -> tuple[int, list[int | None], float]:
    if checkpoint is None:
        for run in runs:
            study.begin(run)
        return 0, [None] * len(runs), 0.0
    tensors, state = checkpoint
    network.load_state_dict(tensors)
    for run in runs:
        study.trim_metrics(run, state["epoch"])
    return state["epoch"], state["diverged"], state["seconds"]


def _finish(
    network: StackedNetwork,
    recipe: Recipe,
    runs: Sequence[Run],
    splits: Splits,
    study: Study,
    diverged: list[int | None],
    spent: float,
) -> None:
    judged = splits.test or splits.validation
    assert judged is not None
    losses, errors = evaluate(network, recipe.task, judged)
    for position, run in enumerate(runs):
        if study.result(run) is not None:
            continue
        last = study.metrics(run)[-1]
        if not math.isfinite(losses[position]) or None in last["mean_activation"]:
            diverged[position] = diverged[position] or recipe.epochs
        ok = diverged[position] is None
        known = {
            "train_loss": last["train_loss"],
            "train_error": last["train_error"],
            "validation_error": last["validation_error"],
            "test_loss": finite(losses[position]) if splits.test else None,
            "test_error": finite(errors[position]) if splits.test else None,
            "median_mean_activation": mean_size(last["mean_activation"]) if ok else None,
        }
        outcome = {
            "status": "ok" if ok else "diverged",
            "diverged_at": diverged[position],
            "epochs": recipe.epochs,
            **(known if ok else dict.fromkeys(known)),
            "seconds": round(spent / len(runs), 3),
            "together": len(runs),
        }
        study.finish(run, outcome, network.weights(position) if ok and run.stage == "final" else None)
