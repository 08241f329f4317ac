"""Trials that share their first steps, and the benchmark of schedules, which share many."""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import open_points, schedules, trials
from benchmarks.schedules import SCHEDULES, scheduled
from benchmarks.trials import Row, Trial
from tests.lab.held_out import DATA, FOREVER, options, small_and_held_out
from tests.lab.small_images import DROPOUT, NO_DROPOUT, recipe

from zeromean.lab.recipes.cifar import cifar10_elu18, cifar100_elu18, cifar100_elu18_fast
from zeromean.lab.recipes.images import ImageRecipe, Phase, override
from zeromean.lab.train import Training

SMALL = recipe(normalization="mean-std", validation=30, phases=(Phase(44, NO_DROPOUT),), rates=((0, 0.01),))
# Epochs of ten steps; the three are the same until step 20, the first and the last until step 30.
LONG = replace(SMALL, phases=(Phase(24, DROPOUT), Phase(20, DROPOUT, everywhere=True)), ema=0.9, label_smoothing=0.1)
SHORT = replace(LONG, phases=(Phase(24, DROPOUT), Phase(8, NO_DROPOUT)))
SLOWED = replace(LONG, rates=((0, 0.01), (33, 0.001)))
SHARE = [24, 39]
# Without noise: threads share the generator that dropout draws from.
BOTH = [Trial(str(pairs), replace(SMALL, rates=pairs), "elu", 0) for pairs in (LONG.rates, SLOWED.rates)]


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    with small_and_held_out():
        yield


def three(*recipes: ImageRecipe) -> list[Trial]:
    """Of an activation with noise of its own."""
    return [Trial(str(number), chosen, "rrelu", 2) for number, chosen in enumerate(recipes or (LONG, SHORT, SLOWED))]


def _stems(out: Path) -> list[Path]:
    return list((out / "stems").rglob("*.safetensors"))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the steps that are trained."""
    steps: list[int] = []
    advance = Training.advance

    def counted(training: Training) -> None:
        steps.append(training.steps_done)
        advance(training)

    monkeypatch.setattr(Training, "advance", counted)
    return steps


def _judged(rows: list[Row | None]) -> list[list[Any]]:
    """What does not depend on which trial left a stem."""
    keys = ("status", "validation_error", "train_error", "train_loss", "steps")
    return [[row and row[key] for key in keys] for row in rows]


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("recipes", [(LONG, SHORT, SLOWED), (SHORT, SLOWED, LONG)])
def test_trials_that_share_steps_train_them_once_with_the_same_bits(
    tmp_path: Path, taken: list[int], together: int, recipes: tuple[ImageRecipe, ...]
) -> None:
    """The first one leaves the stem: the other is shorter, or longer."""
    planned = three(*recipes)
    alone = trials.run(planned, DATA, options(tmp_path / "alone"), FOREVER)
    assert len(taken) == 44 + 32 + 44
    taken.clear()
    rows = trials.run(planned, DATA, options(tmp_path / "shared", share=SHARE, together=together), FOREVER)
    assert len(taken) == 20 + (24 + 12 + 14)
    assert _judged(rows) == _judged(alone)
    assert len({row["train_loss"] for row in rows if row}) == 3
    assert len(_stems(tmp_path / "shared")) == 1 + 2
    taken.clear()
    again = [replace(planned[0], recipe=replace(LONG, phases=(*LONG.phases, Phase(6, DROPOUT))))]
    trials.run(again, DATA, options(tmp_path / "shared", share=SHARE), FOREVER)
    assert min(taken) == 30


def test_a_stem_is_named_by_all_that_its_steps_depend_on() -> None:
    def stem(chosen: ImageRecipe, step: int = 25, activation: str = "elu", seed: int = 0) -> list[Any]:
        return list(Trial("any", chosen, activation, seed).stems([step], DATA).items())

    (base,) = stem(LONG)
    assert base[0] == 20
    same = (SHORT, SLOWED, replace(LONG, name="other", title="x", rates=((0, 0.01), (20, 7.0))))
    assert all(stem(other) == [base] for other in same)
    changes: tuple[dict[str, Any], ...] = (
        {"batch_size": 17},
        {"flip": False},
        {"rates": ((0, 0.01), (19, 0.001))},
        {"curve": "linear"},
        {"phases": (Phase(19, DROPOUT), Phase(25, NO_DROPOUT))},
        {"precision": "float32"},
        {"drop_before_pooling": True},
    )
    others = [*(stem(replace(LONG, **change)) for change in changes), stem(LONG, seed=1), stem(LONG, activation="relu")]
    assert len({base, *(one for (one,) in others)}) == 1 + len(others)
    assert stem(LONG, 9) == stem(LONG, 50) == stem(replace(LONG, phases=(Phase(20, DROPOUT),))) == []
    line = replace(LONG, curve="linear", rates=((0, 0.01), (22, 0.005), (30, 0.0)))
    assert stem(line) == stem(replace(line, rates=((0, 0.01), (22, 0.005), (31, 0.1))))
    assert stem(line) != stem(replace(line, rates=((0, 0.01), (22, 0.006), (30, 0.0))))
    late = replace(LONG, phases=(Phase(24, NO_DROPOUT), Phase(20, DROPOUT)))
    never = replace(late, phases=(Phase(44, NO_DROPOUT),))
    assert stem(late) == stem(never)
    pooled = [replace(chosen, drop_before_pooling=True) for chosen in (late, never)]
    assert stem(pooled[0]) != stem(pooled[1])


def test_a_line_is_shared_until_its_next_pair_differs(tmp_path: Path, taken: list[int]) -> None:
    down = replace(LONG, curve="linear", rates=((0, 0.01), (22, 0.005), (44, 0.0)))
    planned = three(down, replace(down, rates=((0, 0.01), (22, 0.005), (44, 0.01))))
    alone = trials.run(planned, DATA, options(tmp_path / "alone"), FOREVER)
    taken.clear()
    rows = trials.run(planned, DATA, options(tmp_path / "shared", share=[20, 30]), FOREVER)
    assert len(taken) == 20 + 2 * 24
    assert _judged(rows) == _judged(alone)


@pytest.mark.parametrize("cuts", [1, 3])
def test_what_the_time_cuts_off_goes_on_first_and_from_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[int], cuts: int
) -> None:
    """Before its stem ends, or an epoch behind it."""
    alone = trials.run(three(), DATA, options(tmp_path / "alone"), FOREVER)
    taken.clear()
    with monkeypatch.context() as patched:
        patched.setattr(trials, "_BEGINNING", 2.0)
        for _ in range(cuts):
            cut = trials.run(three()[::-1], DATA, options(tmp_path / "cut", share=[24], together=1), time.time())
            assert cut == [None] * 3
    assert taken == list(range(10 * cuts))
    rows = trials.run(three(), DATA, options(tmp_path / "cut", share=[24]), FOREVER)
    assert len(taken) == 20 + (24 + 12 + 24)
    assert _judged(rows) == _judged(alone)
    assert rows[2] is not None
    assert alone[2] is not None
    assert rows[2]["course"] == alone[2]["course"]


def test_a_training_that_diverged_leaves_no_stem_and_nobody_waits(tmp_path: Path, taken: list[int]) -> None:
    wild = [replace(trial, recipe=override(trial.recipe, ["rate_factor=1e30"])) for trial in three()]
    rows = trials.run(wild, DATA, options(tmp_path, share=[10, 24]), time.time() + 40)
    assert [row and row["status"] for row in rows] == ["diverged"] * 3
    assert _stems(tmp_path) == []
    assert len(taken) == 3 * 10
    assert rows[0] is not None
    assert rows[0]["course"] == [[10, None, None, None]]


class Thread(threading.Thread):
    """In the place of a process, so that it has the small network."""

    exitcode = 0

    def run(self) -> None:
        try:
            super().run()
        except RuntimeError:
            self.exitcode = 1


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    array = torch.multiprocessing.get_context("spawn").Array
    monkeypatch.setattr(
        trials, "multiprocessing", SimpleNamespace(get_context=lambda _: SimpleNamespace(Array=array, Process=Thread))
    )
    monkeypatch.setattr(trials, "first_gpus", lambda count: (torch.device("cpu"),) * count)
    # Its settings are those of a whole process, which two threads would put back in the wrong order.
    monkeypatch.setattr(trials, "arithmetic", lambda precision, device: nullcontext())
    yield
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.usefixtures("threads")
def test_another_process_waits_for_a_stem(tmp_path: Path, taken: list[int]) -> None:
    alone = trials.run(BOTH, DATA, options(tmp_path / "alone"), FOREVER)
    taken.clear()
    rows = trials.run(BOTH, DATA, options(tmp_path / "shared", gpus=2, together=1, share=SHARE), FOREVER)
    assert len(taken) == 30 + 2 * 14
    assert _judged(rows) == _judged(alone)


@pytest.mark.usefixtures("threads")
def test_nobody_waits_for_a_process_that_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, broken = Training.advance, threading.Event()

    def break_once(training: Training) -> None:
        if training.steps_done == 25 and not broken.is_set():
            broken.set()
            raise RuntimeError
        advance(training)

    monkeypatch.setattr(Training, "advance", break_once)
    with pytest.raises(RuntimeError, match="the processes ended with"):
        trials.run(BOTH, DATA, options(tmp_path, gpus=2, together=1, share=SHARE), time.time() + 60)
    assert [row["variant"] for row in trials.Results(tmp_path).rows()] == [BOTH[1].variant]


def test_a_course_is_judged_at_ends_of_epochs(tmp_path: Path) -> None:
    """Epochs of two steps; twentieths of 99 steps, a phase of 37 and a shared step."""
    chosen = replace(SMALL, batch_size=64, phases=(Phase(37, DROPOUT), Phase(62, NO_DROPOUT)), rates=((0, 1e-3),))
    planned = [Trial("", chosen, "elu", 0), Trial("", replace(chosen, rates=((0, 1e-3), (60, 1e-4))), "elu", 0)]
    rows = trials.run(planned, DATA, options(tmp_path, share=[53]), FOREVER)
    twentieths = {4, 8, 14, 18, 24, 28, 34, 38, 44, 48, 54, 58, 64, 68, 74, 78, 84, 88, 94, 99}
    for row in rows:
        assert row is not None
        assert [steps for steps, *_ in row["course"]] == sorted({*twentieths, 36, 52})
        assert row["course"][-1] == [99, row["validation_error"], row["train_error"], row["train_loss"]]
    first, second = (row["course"] for row in rows if row)
    assert first[:13] == second[:13]
    assert first != second
    whole = replace(chosen, phases=(Phase(36, DROPOUT),))
    (part,) = trials.run([Trial("", whole, "elu", 0)], DATA, options(tmp_path / "part"), FOREVER)
    assert part is not None
    assert part["course"][-1] in first


def test_judging_costs_no_time_and_a_stem_brings_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def slow(call: Any, seconds: float) -> Any:
        def slowed(training: Training) -> Any:
            clock[0] += seconds
            return call(training)

        return slowed

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Training, "advance", slow(Training.advance, 0.5))
    monkeypatch.setattr(Training, "watch", slow(Training.watch, 1000.0))
    rows = trials.run(three(), DATA, options(tmp_path, share=SHARE, together=1), FOREVER)
    assert [row and row["seconds"] for row in rows] == [22.0, 16.0, 22.0]
    assert [row and row["images_per_second"] for row in rows] == [32] * 3


# Where the published numbers are 35, 50 and 40 thousand steps; epochs of ten.
ELU18 = recipe(
    normalization="mean-std",
    phases=(Phase(14, DROPOUT), Phase(16, DROPOUT, everywhere=True), Phase(18, (0.3, 0.6, 0.0), everywhere=True)),
    rates=((0, 0.01), (30, 0.001), (44, 0.0001)),
)


@pytest.mark.parametrize("published", [cifar100_elu18(), cifar10_elu18()])
def test_schedules_are_those_that_the_paper_leaves_open(published: ImageRecipe) -> None:
    base, a, b = published.phases
    made = {name: scheduled(published, schedule) for name, schedule in SCHEDULES.items()}
    assert made.pop("as it is") == published
    assert {name: (one.phases, one.rates) for name, one in made.items()} == {
        "A falls": (published.phases, ((0, 0.01), (70_000, 0.001), (120_000, 0.0001))),
        "B stays": (published.phases, ((0, 0.01), (85_000, 0.001))),
        "B at 0.005": (published.phases, ((0, 0.01), (85_000, 0.005), (120_000, 0.0005))),
        "all at 0.001": (published.phases, ((0, 0.01), (35_000, 0.001))),
        "middle": (
            (replace(base, steps=85_000), a, b),
            ((0, 0.01), (35_000, 0.001), (85_000, 0.01), (135_000, 0.001), (170_000, 0.0001)),
        ),
    }


def test_a_reading_has_the_seven_rates_of_dropout_elsewhere_or_changes_a_field() -> None:
    published = cifar100_elu18()
    earlier, later = (schedules.read(published, (text,)) for text in schedules.DROPOUTS)
    assert [phase.dropout for phase in earlier.phases[:2]] == [(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0, 0)] * 2
    assert [phase.dropout for phase in later.phases[:2]] == [(0, 0, 0.1, 0.2, 0.3, 0.4, 0.5, 0)] * 2
    assert earlier.phases[2].dropout == pytest.approx((0, 0.15, 0.3, 0.45, 0.6, 0.75, 0, 0))
    assert [phase.everywhere for phase in later.phases] == [False, True, True]
    both = schedules.read(published, ("dropout=later", "padding=ceil"))
    assert (both.phases, both.padding, both.rates) == (later.phases, "ceil", published.rates)


def test_schedules_are_shortened_as_recipes_are_and_begin_with_what_others_wait_for() -> None:
    overrides = ["length=0.1", "validation=5000", "rate_factor=2"]
    readings = [(), ("padding=one_ceil",)]
    planned = schedules.trials(cifar100_elu18(), overrides, list(SCHEDULES), readings, 2)
    assert len({(trial.variant, trial.recipe.padding, trial.seed) for trial in planned}) == 6 * 2 * 2
    firsts = [*["as it is"] * 2, *["as it is, padding=one_ceil"] * 2, "A falls"]
    assert [trial.variant for trial in planned[:5]] == firsts
    assert planned[0].settings() == Trial("", override(cifar100_elu18(), overrides), "elu", 0).settings()
    assert [phase.steps for phase in planned[-1].recipe.phases] == [8500, 5000, 4000]
    assert planned[-1].recipe.rates == ((0, 0.02), (3500, 0.002), (8500, 0.02), (13500, 0.002), (17000, 0.0002))
    assert schedules.shared(planned) == [3500, 7000, 8500, 12000, 13500, 17000]
    assert schedules.shared(planned[:1]) == [3500, 8500, 12000]


def test_every_schedule_trains_and_what_they_have_in_common_is_trained_once(tmp_path: Path, taken: list[int]) -> None:
    planned = schedules.trials(ELU18, ["validation=30"], list(SCHEDULES), (), 1)
    alone = trials.run(planned, DATA, options(tmp_path / "alone"), FOREVER)
    assert len(taken) == 5 * 48 + 64
    taken.clear()
    shared = schedules.shared(planned)
    assert shared == [14, 28, 30, 44, 46, 60]
    rows = trials.run(planned, DATA, options(tmp_path / "shared", share=shared), FOREVER)
    # From the start; from 20, 40, 30, 10 and 10.
    assert len(taken) == 48 + 28 + 8 + 18 + 38 + 54
    assert _judged(rows) == _judged(alone)
    assert len({row["train_loss"] for row in rows if row}) == 6


def _row(course: list[list[Any]], **changes: Any) -> Row:
    last = {"validation_error": course[-1][1], "train_error": course[-1][2]}
    return {"status": "ok", "course": course, "seconds": 20.0, **last, **changes}


def test_a_table_tells_what_each_phase_came_to() -> None:
    planned = schedules.trials(ELU18, ["validation=30"], ["middle", "as it is"], [(), ("padding=ceil",)], 2)
    first = [
        [8, 60.0, 9.0, 1.0],
        [26, 50.0, 8.0, 1.0],
        [34, 45.0, 7.0, 1.0],
        [46, 40.0, 6.0, 1.0],
        [60, 31.0, 2.0, 1.0],
    ]
    second = [[26, 51.0, 8.5, 1.0], [46, 42.0, 6.5, 1.0], [60, 30.0, 3.0, 1.0]]
    lost = [[10, None, None, None]]
    wild = _row(lost, status="diverged")
    none_at_first = [[20, 48.0, 5.0, 1.0], [44, 41.5, 4.0, 1.0]]
    rows = [_row(first), _row(second, seconds=21.0), None, None, _row(none_at_first), wild, wild, None]
    head, line, *told = schedules.table(planned, rows).splitlines()
    assert head.split(" | ")[1:5] == ["after the base, %", "after A, %", "after B, %", "of the seeds, %"]
    assert head.count("|") == line.count("|") == 8
    assert told == [
        "| middle | 50.50 | 41.00 | 30.50 | 31.00, 30.00 | 2.5 | 20 |",
        "| as it is |  | 48.00 | 41.50 | 41.50, diverged | 4.0 | 20 |",
        "| as it is, padding=ceil |  |  |  | diverged |  | 20 |",
    ]


def test_the_command_shares_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    monkeypatch.setattr(schedules, "find", lambda name: ELU18)
    monkeypatch.setattr("zeromean.lab.data.load", lambda name: DATA)
    recipes, words = ["cifar100-elu18", "length=2"], ["--validation", "30", "--out", str(tmp_path)]
    chosen = ["--schedules", "as it is", "middle", "--readings", "padding=one", "padding=ceil", "--seeds", "2"]
    schedules.main([*recipes, *words, *chosen])
    assert len(taken) == 4 * (96 + 128 - 20)
    rows = trials.Results(tmp_path).rows()
    assert {row["settings"]["recipe"]["padding"] for row in rows} == {"one", "ceil"}
    table = (tmp_path / "table.md").read_text()
    names = [f"{name}, padding={padding}" for name in ("as it is", "middle") for padding in ("one", "ceil")]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {name}" for name in names]
    assert {row["variant"] for row in rows} == set(names)
    assert all("|  |" not in line for line in table.splitlines())
    taken.clear()
    schedules.main([*recipes, *words, *chosen])
    assert taken == []
    assert (tmp_path / "table.md").read_text() == table
    schedules.main([*recipes, "padding=ceil", *words])
    # From the base's end, where B falls, from A's end and from the base's.
    assert len(taken) == 76 + 16 + 36 + 76
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in SCHEDULES]


def test_the_first_steps_of_a_recipe_are_as_in_all_of_it() -> None:
    published = cifar100_elu18()
    base, a, _ = published.phases
    within_base = trials.cut(published, 30_000)
    assert within_base == replace(published, phases=(replace(base, steps=30_000),), rates=published.rates[:1])
    within_a = trials.cut(published, 50_000)
    assert within_a.phases == (base, replace(a, steps=15_000))
    within_b = trials.cut(published, 100_000)
    assert [within_b.rate(step) for step in range(0, 100_000, 999)] == [
        published.rate(step) for step in range(0, 100_000, 999)
    ]
    fast = cifar100_elu18_fast()
    assert [trials.cut(fast, 300).rate(step) for step in range(300)] == [fast.rate(step) for step in range(300)]


def test_variants_of_the_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: list[int]) -> None:
    monkeypatch.setattr(open_points, "find", lambda name: ELU18)
    monkeypatch.setattr("zeromean.lab.data.load", lambda name: DATA)
    words = ["cifar100-elu18", "--first", "12", "--validation", "30", "--out", str(tmp_path), "--activations", "elu"]
    open_points.main([*words, "--variants", "", "clip=5", "--seeds", "1"])
    assert len(taken) == 2 * 12
    assert [row["settings"]["recipe"]["clip"] for row in trials.Results(tmp_path).rows()] == [0.0, 5.0]
