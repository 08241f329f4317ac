"""What a probe finds in the trained networks of a study: one an arm, after the training, for the report.

Of each arm the network of its first seed that ended well is rebuilt from the stored weights and measured, in evaluation
mode, on the same 500 training samples for all. The values of single units are left out of ``probe.json``, but for their
means: with them a deep network's file would have several megabytes.

A network on images is measured with the preset ``light``, without natural gradients, where those would cost more than a
tenth of the training of its arm, all seeds counted. Their price, in gradients of a training image (counted, not
timed):

    500 samples * 2/3 a class    the exact Fisher matrix takes a backward pass for each, of up to 100
    4096 rows * 66               50 iterations of conjugate gradients with two right-hand sides
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from zeromean.diagnostics import Report, probe
from zeromean.diagnostics.fisher import OnLayer
from zeromean.diagnostics.watch import Preset
from zeromean.lab.data import AnyDataset
from zeromean.lab.plan import Plan
from zeromean.lab.probing import draw, network, training_samples
from zeromean.lab.recipes import ImageRecipe
from zeromean.lab.schedule import Teller, duration
from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.summary import Arm, Summary
from zeromean.lab.summary import load as load_summary
from zeromean.lab.together import Samples

SAMPLES = 500
_PRICE = SAMPLES * 100 * 2 / 3 + 4096 * 66
_MOST_OF_TRAINING = 0.1
_QUIET_SECONDS = 30


@dataclass(frozen=True)
class Inside:
    """What was found in one network.

    Attributes:
        seed: of its run.
        samples: it was measured on.
        report: the numbers, of the last step alone.
    """

    seed: int
    samples: int
    report: Report


def examined(arm: Arm) -> Run | None:
    """The run whose network stands for the arm: the first that ended well; None where there is none."""
    seeds = [run.seed for run in arm.runs if run.status == "ok"]
    if not seeds:
        return None
    assert arm.learning_rate is not None
    return Run(arm.name, arm.activation, arm.learning_rate, seeds[0], norm=arm.norm)


def look(plan: Plan, study: Study, dataset: AnyDataset, device: torch.device, say: Callable[[str], None]) -> None:
    """Measure a network of every arm that has no sound ``probe.json``, and leave the study's other files alone.

    A file that cannot be trusted is set aside, so that the report comes about without it. Where a network cannot be
    measured, that is said and the others are; the study's results do not depend on it.

    Args:
        plan: of the study.
        study: trained, with its plan written.
        dataset: of the recipe.
        device: where to measure.
        say: told of damaged files, of what cannot be measured, how far it is, and how long it took.
    """
    runs = [run for arm in load_summary(study).arms if (run := examined(arm)) and not _known(study, run, say)]
    if not runs:
        return
    teller = Teller(say, _QUIET_SECONDS)
    try:
        samples = training_samples(plan.recipe, dataset, device)
    except ValueError as error:
        say(f"the report does not look inside the networks: {error}")
        return
    batch = samples.take(draw(len(samples), SAMPLES, torch.Generator().manual_seed(0)).to(device))
    done = 0
    for place, run in enumerate(runs):
        tell = partial(_tell, teller, len(runs), place)
        tell()
        try:
            trained = network(plan.recipe, run, samples, dataset)
            trained.load_state_dict(study.weights(run))
            _examine(trained.to(device).eval(), run, batch, _preset(plan), study, tell)
            done += 1
        except (ValueError, RuntimeError, MemoryError) as error:
            say(f"the network of {run.folder} cannot be looked into, and the report leaves it out: {error}")
    say(f"looked inside {done} trained network{'' if done == 1 else 's'}: {duration(max(1.0, teller.spent))}")


def _tell(teller: Teller, networks: int, place: int, layer: str = "", share: float = 0.0) -> None:
    """Of so many networks, those before that place are done, and of this one that share of the natural gradients."""
    done = (place + share) / networks
    teller.tell(done, f"looking inside the trained networks: {done:.0%} done")


def _known(study: Study, run: Run, say: Callable[[str], None]) -> bool:
    try:
        return _read(study, run) is not None
    except DamagedFileError as error:
        say(f"{error}; it is set aside as {study.set_aside(run, 'probe.json').name} and measured anew")
        return False


def _preset(plan: Plan) -> Preset:
    recipe = plan.recipe
    if not isinstance(recipe, ImageRecipe):
        return "full"
    trained_on = recipe.steps * recipe.batch_size * len(plan.seeds)
    return "full" if _MOST_OF_TRAINING * trained_on >= _PRICE else "light"


def _examine(trained: nn.Module, run: Run, batch: Samples, preset: Preset, study: Study, on_layer: OnLayer) -> None:
    found = probe.measure(trained, batch.inputs, batch.targets, preset, on_layer=on_layer)
    layers = tuple(replace(layer, of_units={"mean": layer.of_units["mean"]}) for layer in found.layers)
    study.write_probe(run, {**json.loads(replace(found, layers=layers).to_json()), "samples": len(batch)})


def load(study: Study, summary: Summary) -> dict[str, Inside]:
    """What was found, by the arm's name; arms without a measured network are left out.

    Raises:
        DamagedFileError: a file is there and cannot be trusted.
    """
    runs = [run for arm in summary.arms if (run := examined(arm))]
    return {run.arm: found for run in runs if (found := _read(study, run))}


def _read(study: Study, run: Run) -> Inside | None:
    content = study.probe(run)
    if content is None:
        return None
    try:
        return Inside(run.seed, content["samples"], Report.from_json(json.dumps(content)))
    except (ValueError, KeyError, TypeError) as error:
        file = study.path / run.folder / "probe.json"
        raise DamagedFileError(f"{file} cannot be read ({error}): run the study again, or delete the file") from error
