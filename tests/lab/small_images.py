"""A convolutional network, images and a recipe that train in a moment; as a script, trainings in several processes."""

import math
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zeromean.lab.descent import Descent
from zeromean.lab.images import Material
from zeromean.lab.nets import NETWORKS, ConvolutionalNetwork
from zeromean.lab.nets.aligned import AlignedStack
from zeromean.lab.nets.convolutional import (
    ActivationSource,
    Layer,
    Norm,
    convolutional_stack,
    draw_weights,
    plan,
)
from zeromean.lab.recipes.cifar import cifar100_elu11
from zeromean.lab.recipes.images import ImageRecipe, Phase
from zeromean.lab.sharing import launched
from zeromean.lab.store import Run, Study
from zeromean.lab.train import Training, train
from zeromean.lab.update import Update

CPU = torch.device("cpu")
PIXELS, CLASSES = 8, 4
STACKS = ((Layer(6, 3),), (Layer(8, 1), Layer(10, 2)))
NO_DROPOUT = (0.0, 0.0, 0.0)
DROPOUT = (0.2, 0.4, 0.0)


def small_network(
    classes: int,
    activation: ActivationSource,
    norm: Norm = "none",
    *,
    seed: int,
    initialization: Any = "he",
    padding: Any = "one_ceil",
) -> ConvolutionalNetwork:
    """Three convolutions and the classes' own, in the place of elu11."""
    modules: dict[str, nn.Module] = {}
    channels = 3
    for number, stack in enumerate(plan(STACKS, padding, PIXELS), 1):
        modules[f"stack{number}"] = convolutional_stack(stack, channels, activation, norm)
        channels = stack.layers[-1].units
    last = {"conv1": nn.utils.skip_init(nn.Conv2d, channels, classes, 1)}
    modules["stack3"] = AlignedStack(OrderedDict(last))
    modules |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    network = ConvolutionalNetwork(OrderedDict(modules))
    return draw_weights(network, activation, initialization, seed)


MUON: dict[str, Any] = {"optimizer": "muon", "decay_biases": False, "weight_decay": 0.5, "rates": ((0, 0.02),)}


def recipe(**changes: Any) -> ImageRecipe:
    """Twelve steps of 16 images, five and a half an epoch's worth of 88 images, at a constant rate, no dropout."""
    small = replace(
        cifar100_elu11(),
        phases=(Phase(12, NO_DROPOUT),),
        batch_size=16,
        rates=((0, 0.05),),
        pad=1,
        probe_samples=20,
    )
    return replace(small, **changes)


def run(activation: str = "elu", seed: int = 0, norm: str = "none") -> Run:
    """An arm of its own for every activation and norm."""
    return Run(f"{activation.replace(':', '-')}-{norm}", activation, 0.05, seed, norm=norm)


def material(count: int = 88) -> Material:
    """Noise with a class's own mean: easy to learn."""
    generator = torch.Generator().manual_seed(0)

    def images(many: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(many) % CLASSES
        patterns = torch.randn(CLASSES, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))
        return patterns[labels] + torch.randn(many, 3, PIXELS, PIXELS, generator=generator), labels

    train_images, train_labels = images(count)
    return Material(
        train=train_images,
        train_labels=train_labels,
        probe=train_images[:20],
        probe_labels=train_labels[:20],
        test=(test := images(40))[0],
        test_labels=test[1],
        validation=images(24),
        classes=CLASSES,
    )


def untimed(found: dict[str, Any]) -> dict[str, Any]:
    """A row or a result without what differs from one time to the next."""
    timed = ("seconds", "images_per_second", "seconds_recording", "together", "checksum")
    return {key: value for key, value in found.items() if key not in timed}


def contents(study: Study, one: Run) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """What a run left on disk: weights, metrics and result, without times."""
    model = (study.path / one.folder / "model.safetensors").read_bytes()
    return model, [untimed(row) for row in study.metrics(one)], untimed(study.result(one) or {})


class KilledError(Exception):
    """Ends a training in a test."""


class Epochs:
    """Collects what a training tells after every epoch, and dies after one of them."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.seen: list[tuple[float, int]] = []
        self._last = dies_after

    def __call__(self, epoch: float, runs: int) -> None:
        self.seen.append((epoch, runs))
        if epoch == self._last:
            raise KilledError


@contextmanager
def small() -> Iterator[None]:
    """Within, the small network has elu11's place, and torch one thread."""
    threads, before = torch.get_num_threads(), NETWORKS["elu11"]
    torch.set_num_threads(1)
    NETWORKS["elu11"] = small_network
    try:
        yield
    finally:
        NETWORKS["elu11"] = before
        torch.set_num_threads(threads)


def endangered() -> ImageRecipe:
    """A recipe that uses all that a checkpoint must hold: 24 epochs of dropout, average, noise and statistics."""
    return recipe(phases=(Phase(70, DROPOUT), Phase(50, DROPOUT, everywhere=True)), ema=0.9, label_smoothing=0.1)


ENDANGERED_RUNS = [run("eelu"), run("rrelu", norm="batch")]


def killed(folder: Path, moments: list[float]) -> list[int]:
    """Train the endangered runs, killed so many seconds after each start; returns the signals that ended them."""
    ends = []
    for moment in moments:
        child = os.fork()
        if child == 0:
            train(endangered(), ENDANGERED_RUNS, material(), Study(folder), device=CPU, checkpoint_seconds=0)
            os._exit(0)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        ends.append(os.WTERMSIG(os.waitpid(child, 0)[1]))
    return ends


SHARED = {
    "plain": (recipe(), run(), False),
    "rich": (recipe(nesterov=True, clip=0.5, ema=0.8, accumulate=4, label_smoothing=0.1), run(), False),
    "batch": (recipe(), run(norm="batch"), False),
    "muon": (recipe(**MUON, clip=0.5), run(), False),
    "mixed": (recipe(mixup=0.4, cutout=2, alternate_flip=True), run(), False),
    "poisoned": (recipe(), run(seed=3), True),
    "poisoned-too": (recipe(), run(seed=1), True),
}


def poisoned(image: int) -> Material:
    """Images of which one is not finite."""
    clean = material()
    clean.train[image, 0, 2, 2] = math.inf
    return clean


HALVES = (torch.bfloat16, torch.float16)


def halved(training: Training, dtype: torch.dtype = torch.bfloat16, *, copies: bool = True) -> Training:
    """The training in half precision wherever it is, with copies of its weights or without any."""
    recipe, network = training.recipe, training.network
    seed, share = training.run.seed, training.share
    update = Update(recipe, network, training._batches, seed=seed, share=share, dtype=dtype)
    if not copies:
        update._descent = Descent(recipe, network, update._ledger)
    training._update, training._step = update, update.take
    return training


def copies(training: Training) -> dict[str, Tensor]:
    """Of all that its steps to come depend on."""
    return {name: tensor.clone() for name, tensor in training.state()[0].items()}


def begun(training: Training) -> Training:
    """The training at the beginning of its next epoch."""
    training.begin_epoch()
    return training


def taken(training: Training, steps: int) -> Training:
    """The training after so many steps from its beginning."""
    while training.steps_done < steps:
        if training.steps_left == 0:
            training.begin_epoch()
        training.advance()
        if training.steps_left == 0:
            training.finish_epoch()
    return training


def trained(training: Training, epochs: int = 2) -> Training:
    """The training after so many more epochs."""
    for _ in range(epochs):
        training.begin_epoch()
        while training.steps_left:
            training.advance()
        training.finish_epoch()
    return training


def overflown(training: Training, wait: Callable[[], None] = lambda: None) -> Training:
    """A training in float16 after three steps, of which the second's gradient overflows and it alone changes nothing.

    Args:
        training: at its beginning.
        wait: for the device, whose steps are queued elsewhere than what is done here.
    """
    ledger, tensors = training._update._ledger, training._update.tensors()

    def advance(scale: float) -> None:
        ledger.loss_scale.fill_(scale)
        wait()
        training.advance()
        wait()

    training.begin_epoch()
    advance(2.0**10)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    # The products of 16 images and a gradient as large do not fit into float16.
    advance(2.0**40)
    assert float(ledger.loss_scale) == 2.0**39
    for name in tensors.keys() - {"place", "number", "loss_sum", "loss_scale", "calm", "overflows"}:
        assert torch.equal(tensors[name], before[name]), name
    assert (int(tensors["number"]), int(tensors["overflows"])) == (2, 1)
    advance(2.0**10)
    training.finish_epoch()
    assert (training.diverged, training.watch()["overflows"]) == (None, 1)
    assert not torch.equal(tensors["network.stack1.conv1.weight"], before["network.stack1.conv1.weight"])
    return training


def shared(folder: Path) -> str:
    """Train as one of several processes that torchrun started; returns a sum over the final weights of this one."""
    sums = []
    with launched(CPU) as (share, device):
        if not share.writes:
            forbid_writing()
        for name, (chosen, one, poison) in SHARED.items():
            study = Study(folder / name)
            train(chosen, [one], poisoned(5) if poison else material(), study, device=device, share=share)
            training = Training(chosen, one, material(), device, share)
            training.begin_epoch()
            training.advance()
            sums.append(sum_of(training.network))
        for dtype in HALVES:
            half = trained(halved(Training(recipe(), run(), material(), device, share), dtype))
            sums.append(sum_of(half.network))
            if share.writes:
                named = half.network.named_parameters()
                save_file({name: one.detach().contiguous() for name, one in named}, folder / str(dtype))
    return " ".join(sums)


def sum_of(network: nn.Module) -> str:
    """Over all weights, to the last bit."""
    return float(torch.stack([parameter.detach().double().sum() for parameter in network.parameters()]).sum()).hex()


def forbid_writing() -> None:
    """Make every way to write a study's files an error."""

    def refuse(*_: Any) -> None:
        raise AssertionError("this process must not write")

    for name in ("begin", "append_metrics", "trim_metrics", "finish", "write_checkpoint", "drop_checkpoint", "sweep"):
        setattr(Study, name, refuse)


if __name__ == "__main__":
    what, target, *numbers = sys.argv[1:]
    with small():
        print(shared(Path(target)) if what == "shared" else killed(Path(target), [float(number) for number in numbers]))
