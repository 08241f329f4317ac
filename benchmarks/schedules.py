"""Vary what the ELU paper leaves open about the training of its 18-layer network, on training images held out.

    PYTHONPATH=src python -m benchmarks.schedules cifar100-elu18 length=0.2 --gpus 2 --together 2 --out DIR

Published are the first rate of 0.01, divided by 10 after 35,000 steps, and two fine-tunings: A, of 50,000 steps with
dropout behind all layers, and B, of 40,000 with 1.5 times its rates. The length of the base phase before them is not,
nor are the learning rates of A and B. Every schedule is trained, or those that are asked for, as in ``--schedules "as
it is" "all at 0.001"``, in the recipe's reading of the rest or each of ``--readings "" dropout=later padding=one``,
which are overrides of the recipe or of `DROPOUTS`; the test set is never read. What schedules have in common is trained
once: the base until each of its ends, and A where only B differs.

DIR gets ``results.jsonl``, a row a run, ``table.md``, a row a schedule and reading, and ``stems``, for each reading and
seed up to six states of the network, of 0.3 GB. The same command continues where the time was over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from benchmarks.open_points import Variant, variant_of
from benchmarks.trials import Row, Trial, ends_of_phases, mean_told, parser, run

from zeromean.lab import data
from zeromean.lab.recipes import find
from zeromean.lab.recipes.images import ImageRecipe, override

Rates = tuple[float, ...]


class Schedule(NamedTuple):
    """What is not published.

    Attributes:
        a: learning rate of the first fine-tuning.
        b: of the second one.
        middle: whether the base goes on at a tenth of its rate, for as many steps as A has.
        falls: the fine-tunings, of A and B, whose rate is divided by 10 after as many steps as the base has.
    """

    a: float
    b: float
    middle: bool = False
    falls: str = "B"


SCHEDULES = {
    "as it is": Schedule(a=1e-2, b=1e-3),
    "A falls": Schedule(a=1e-2, b=1e-3, falls="AB"),
    "B stays": Schedule(a=1e-2, b=1e-3, falls=""),
    "B at 0.005": Schedule(a=1e-2, b=5e-3),
    "all at 0.001": Schedule(a=1e-3, b=1e-3, falls=""),
    "middle": Schedule(a=1e-2, b=1e-3, middle=True),
}
# The paper gives seven rates for eight stacks: those of the first seven, those of the last seven, or, in the recipe,
# the largest one for two stacks.
DROPOUTS: dict[str, Callable[[Rates], Rates]] = {
    "dropout=earlier": lambda rates: (*rates[:-2], 0.0, 0.0),
    "dropout=later": lambda rates: (0.0, *rates[:-2], 0.0),
}


def read(recipe: ImageRecipe, reading: Variant) -> ImageRecipe:
    """The recipe with the overrides and the dropout of a reading."""
    plain = [text for text in reading if text not in DROPOUTS]
    for change in (DROPOUTS[text] for text in reading if text in DROPOUTS):
        phases = tuple(replace(phase, dropout=change(phase.dropout)) for phase in recipe.phases)
        recipe = replace(recipe, phases=phases)
    return override(recipe, plain)


def scheduled(recipe: ImageRecipe, schedule: Schedule) -> ImageRecipe:
    """The recipe, of a base at one rate and two fine-tunings, with another schedule."""
    base, a, b = recipe.phases
    (_, first), *_ = recipe.rates
    falls = base.steps
    phases = (replace(base, steps=falls + a.steps * schedule.middle), a, b)
    base_ends, a_ends, _ = ends_of_phases(replace(recipe, phases=phases))
    # Without a middle the base ends where its rate would fall.
    rates = {0: first, falls: first / 10, base_ends: schedule.a, a_ends: schedule.b}
    for name, begins, rate in (("A", base_ends, schedule.a), ("B", a_ends, schedule.b)):
        if name in schedule.falls:
            rates[begins + falls] = rate / 10
    pairs = tuple(next(same) for _, same in groupby(sorted(rates.items()), key=lambda pair: pair[1]))
    return replace(recipe, phases=phases, rates=pairs)


def trials(
    recipe: ImageRecipe, overrides: Sequence[str], names: Sequence[str], readings: Sequence[Variant], seeds: int
) -> list[Trial]:
    """Every schedule in each reading, or the recipe's, and seed.

    The first schedule is begun with all of them, so that as much as possible is trained while the others wait for what
    they have in common.
    """
    own = override(recipe, overrides)
    return [
        Trial(", ".join((name, *reading)), made, activation, seed)
        for activation in own.activations[:1]
        for name in names
        for reading in readings or ((),)
        for made in [override(read(scheduled(recipe, SCHEDULES[name]), reading), overrides)]
        for seed in range(seeds)
    ]


def shared(planned: Sequence[Trial]) -> list[int]:
    """The steps after which schedules part: where a phase ends or a rate changes."""
    recipes = [trial.recipe for trial in planned]
    parts = {end for recipe in recipes for end in ends_of_phases(recipe)[:-1]}
    return sorted(parts | {step for recipe in recipes for step, _ in recipe.rates if step})


def table(planned: Sequence[Trial], rows: Sequence[Row | None]) -> str:
    """A row a schedule and reading that has a finished run: means over seeds, but for those that diverged.

    The validation error is that at the last end of an epoch in each phase; after B, it is that of the training.
    """
    after = " | ".join(f"after {name}, %" for name in ("the base", "A", "B"))
    lines = [f"| schedule and reading | {after} | of the seeds, % | training, % | seconds |", "|---" * 7 + "|"]
    groups: dict[str, list[tuple[Trial, Row]]] = {}
    for trial, row in zip(planned, rows, strict=True):
        if row is not None:
            groups.setdefault(trial.variant, []).append((trial, row))
    for name, found in groups.items():
        courses = [_at_ends_of_phases(trial, row) for trial, row in found if row["status"] == "ok"]
        own = [f"{row['validation_error']:.2f}" if row["status"] == "ok" else "diverged" for _, row in found]
        cells = [
            *(mean_told([course[phase] for course in courses], 2) for phase in range(3)),
            ", ".join(own),
            mean_told([row["train_error"] for _, row in found], 1),
            mean_told([row["seconds"] for _, row in found], 0),
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines) + "\n"


def _at_ends_of_phases(trial: Trial, row: Row) -> list[float | None]:
    """The validation errors; None where no epoch ended before the phase did."""
    seen = [[error for steps, error, *_ in row["course"] if steps <= end] for end in ends_of_phases(trial.recipe)]
    return [errors[-1] if errors else None for errors in seen]


def main(words: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=tuple(SCHEDULES), metavar="NAME")
    made.add_argument("--readings", nargs="+", type=variant_of, default=(), help="of the rest, instead of the recipe's")
    made.add_argument("--seeds", type=int, default=1)
    options = made.parse_args(words)
    ends = time.time() + options.seconds
    recipe = find(options.recipe)
    assert isinstance(recipe, ImageRecipe), "that of the 18-layer network, such as cifar100-elu18"
    overrides = [*options.overrides, f"validation={options.validation}"]
    planned = trials(recipe, overrides, options.schedules, options.readings, options.seeds)
    options.share = [*options.share, *shared(planned)]
    rows = run(planned, data.load(recipe.data), options, ends)
    found = table(planned, rows)
    (options.out / "table.md").write_text(found)
    print(found, flush=True)


if __name__ == "__main__":
    main()
