"""Training: against a plain loop, alone against together, killed against undisturbed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import zeromean.nn as zmnn
from zeromean.lab.activation import parse
from zeromean.lab.nets import mlp
from zeromean.lab.order import noise_seeds, sample_order
from zeromean.lab.recipes import Recipe
from zeromean.lab.recipes.mnist import digits_mlp8
from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.together import Samples, Splits, train

CPU = torch.device("cpu")
RUNS = [Run(arm.replace(":", "-"), arm, 0.05, seed) for arm in ("elu", "relu", "eelu") for seed in (0, 1)]


def recipe(**changes: Any) -> Recipe:
    small = replace(digits_mlp8(), hidden=(8, 8), epochs=3, batch_size=16, probe_samples=20)
    return replace(small, **changes)


def splits(*, task: str = "classification") -> Splits:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100, 12, generator=generator)
    y = (x @ torch.randn(12, 4, generator=generator)).argmax(1)
    whole = Samples(x, x if task == "reconstruction" else y)
    first, last = torch.arange(70), torch.arange(70, 100)
    return Splits(whole.take(first), whole.take(first[:20]), whole.take(last), whole.take(last))


def results(study: Study, runs: list[Run]) -> list[dict[str, Any]]:
    found = [study.result(run) for run in runs]
    return [{key: value for key, value in (one or {}).items() if key not in ("seconds", "together")} for one in found]


def test_a_run_equals_a_plain_training_loop(tmp_path: Path) -> None:
    study, parts, chosen = Study(tmp_path), splits(), recipe()
    train(chosen, RUNS[:4], parts, study, device=CPU)
    run = RUNS[1]
    network = mlp((12, 8, 8, 4), parse(run.activation), seed=run.seed)
    optimizer = torch.optim.SGD(network.parameters(), run.learning_rate)
    losses: list[float] = []
    for epoch in range(3):
        order = sample_order(torch.tensor([run.seed]), epoch, 70)[0]
        losses = []
        for batch in order[:64].split(16):
            loss = F.cross_entropy(network(parts.train.inputs[batch]), parts.train.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    result = study.result(run) or {}
    assert result["train_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert parts.test is not None
    wrong = network(parts.test.inputs).argmax(1) != parts.test.targets
    assert result["test_error"] == pytest.approx(100 * wrong.float().mean().item())
    hidden = network[:2](parts.probe.inputs).mean(0)
    assert study.metrics(run)[-1]["mean_activation"][0] == pytest.approx(hidden.quantile(0.5).item(), rel=1e-4)


def test_alone_and_together_agree(tmp_path: Path) -> None:
    together, alone = Study(tmp_path / "together"), Study(tmp_path / "alone")
    train(recipe(), RUNS, splits(), together, device=CPU)
    for run in RUNS:
        train(recipe(), [run], splits(), alone, device=CPU)
    for one, other in zip(results(together, RUNS), results(alone, RUNS), strict=True):
        assert one == {
            key: pytest.approx(value, rel=1e-4) if isinstance(value, float) else value for key, value in other.items()
        }


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    first, second = Study(tmp_path / "1"), Study(tmp_path / "2")
    train(recipe(), RUNS, splits(), first, device=CPU)
    train(recipe(), RUNS, splits(), second, device=CPU)
    assert results(first, RUNS) == results(second, RUNS)
    losses = [result["train_loss"] for result in results(first, RUNS)]
    assert len(set(losses)) == len(losses)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_killed_training_continues_to_the_same_numbers(tmp_path: Path, killed_after: int) -> None:
    class KilledError(Exception):
        pass

    def kill(epoch: float, runs: int) -> None:
        if epoch == killed_after:
            raise KilledError

    whole, cut = Study(tmp_path / "whole"), Study(tmp_path / "cut")
    train(recipe(), RUNS, splits(), whole, device=CPU)
    with pytest.raises(KilledError):
        train(recipe(), RUNS, splits(), cut, device=CPU, on_epoch=kill)
    seen: list[float] = []
    train(recipe(), RUNS, splits(), cut, device=CPU, on_epoch=lambda epoch, runs: seen.append(epoch))
    assert seen[0] == killed_after
    assert results(cut, RUNS) == results(whole, RUNS)
    assert all(untimed(cut.metrics(run)) == untimed(whole.metrics(run)) for run in RUNS)


def test_a_kill_between_two_results_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = Study(tmp_path / "whole"), Study(tmp_path / "cut")
    train(recipe(), RUNS, splits(), whole, device=CPU)
    finish = Study.finish
    written: list[Run] = []

    def die(self: Study, run: Run, result: dict[str, Any], weights: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(run)
        finish(self, run, result, weights)

    monkeypatch.setattr(Study, "finish", die)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), RUNS, splits(), cut, device=CPU)
    monkeypatch.undo()
    assert len(cut.pending(RUNS)) == 3
    train(recipe(), RUNS, splits(), cut, device=CPU)
    assert results(cut, RUNS) == results(whole, RUNS)
    assert cut.read_checkpoint("final") is None


def test_checkpoints_may_be_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    monkeypatch.setattr(Study, "write_checkpoint", lambda self, stage, tensors, state: epochs.append(state["epoch"]))
    train(recipe(epochs=5), RUNS[:1], splits(), Study(tmp_path), device=CPU, checkpoint_every=2)
    assert epochs == [2, 4, 5]


def test_only_what_is_missing_is_trained(tmp_path: Path) -> None:
    study = Study(tmp_path)
    train(recipe(), RUNS, splits(), study, device=CPU)
    before = results(study, RUNS)
    (tmp_path / RUNS[2].folder / "result.json").unlink()
    counts: list[int] = []
    train(recipe(), RUNS, splits(), study, device=CPU, on_epoch=lambda epoch, runs: counts.append(runs))
    assert set(counts) == {1}
    assert results(study, RUNS)[2]["train_loss"] == pytest.approx(before[2]["train_loss"], rel=1e-4)


def test_a_diverged_run_is_marked_and_harms_no_other(tmp_path: Path) -> None:
    study, reference = Study(tmp_path / "one"), Study(tmp_path / "two")
    wild = replace(RUNS[0], learning_rate=1e30)
    train(recipe(), [wild, *RUNS[1:]], splits(), study, device=CPU)
    train(recipe(), RUNS[1:], splits(), reference, device=CPU)
    result = study.result(wild) or {}
    assert (result["status"], result["diverged_at"], result["test_error"]) == ("diverged", 1, None)
    assert study.metrics(wild)[-1]["train_loss"] is None
    assert not (tmp_path / "one" / wild.folder / "model.safetensors").exists()
    for one, other in zip(results(study, RUNS[1:]), results(reference, RUNS[1:]), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)


def test_weights_that_blow_up_in_the_very_last_step_are_no_success(tmp_path: Path) -> None:
    study, wild = Study(tmp_path), [replace(run, learning_rate=1e30) for run in RUNS]
    train(recipe(epochs=1, batch_size=64), wild, splits(), study, device=CPU)
    for result in results(study, wild):
        assert (result["status"], result["diverged_at"], result["test_error"]) == ("diverged", 1, None)


def test_reconstruction_scores_the_mean_squared_error(tmp_path: Path) -> None:
    study = Study(tmp_path)
    train(recipe(task="reconstruction"), RUNS, splits(task="reconstruction"), study, device=CPU)
    for result in results(study, RUNS):
        assert result["test_error"] == pytest.approx(1000 * result["test_loss"], rel=1e-4)


def test_tuning_never_reads_the_test_set(tmp_path: Path) -> None:
    study, parts = Study(tmp_path), splits()
    tuning = [replace(run, stage="tuning") for run in RUNS]
    train(recipe(), tuning, replace(parts, test=None), study, device=CPU)
    for result in results(study, tuning):
        assert result["test_error"] is None
        assert result["validation_error"] is not None


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 200 exceeds the 70"):
        train(recipe(batch_size=200), RUNS, splits(), Study(tmp_path), device=CPU)


def test_a_damaged_checkpoint_is_not_half_used(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-final.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(DamagedFileError, match="checkpoint"):
        train(recipe(), RUNS, splits(), Study(tmp_path), device=CPU)


def test_orders_are_permutations_that_differ_by_seed_and_epoch() -> None:
    seeds = torch.tensor([0, 1, 7])
    orders = [sample_order(seeds, epoch, 50) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort(1).values, torch.arange(50).expand(3, 50))
    assert len({tuple(row.tolist()) for order in orders for row in order}) == 6
    assert torch.equal(orders[0][2:], sample_order(seeds[2:], 0, 50))


def test_orders_are_uniform() -> None:
    order = sample_order(torch.arange(4000), 0, 5)
    counts = torch.stack([torch.bincount(order[:, place], minlength=5) for place in range(5)]).float()
    assert (counts - 800).abs().max() < 5 * (4000 * 0.2 * 0.8) ** 0.5


def test_many_samples_do_not_keep_their_own_order_where_first_keys_are_equal() -> None:
    (order,) = sample_order(torch.tensor([3]), 0, 200_000)
    assert torch.equal(order.sort().values, torch.arange(200_000))
    rising = (order.diff() > 0).double().mean()
    assert abs(rising - 0.5) < 5 * (1 / 12 / 200_000) ** 0.5
    assert not torch.equal(order, sample_order(torch.tensor([3]), 1, 200_000)[0])


def test_noise_seeds_are_distinct_over_runs_layers_and_steps() -> None:
    seeds = [noise_seeds(torch.tensor([0, 1, 65535]), 8, torch.tensor([step])) for step in (0, 1, 2**31)]
    assert torch.stack(seeds).unique().numel() == 3 * 8 * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the graph of a step is CUDA's")
@pytest.mark.parametrize("task", ["classification", "reconstruction"])
def test_a_graph_on_cuda_trains_as_the_cpu_does(tmp_path: Path, task: Any) -> None:
    cuda, cpu = Study(tmp_path / "cuda"), Study(tmp_path / "cpu")
    runs = [Run(name, name, 0.05, seed) for name in zmnn.ACTIVATIONS for seed in (0, 1)]
    train(recipe(task=task), runs, splits(task=task), cuda, device=torch.device("cuda"))
    train(recipe(task=task), runs, splits(task=task), cpu, device=CPU)
    for one, other in zip(results(cuda, runs), results(cpu, runs), strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=2e-3), one["arm"]
    again = Study(tmp_path / "again")
    train(recipe(task=task), runs, splits(task=task), again, device=torch.device("cuda"))
    assert results(cuda, runs) == results(again, runs)
