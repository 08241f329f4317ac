"""The plan: arms, pairs, refusals, and what a stage may see."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.lab.image_study import planned, tiny_cifar

from zeromean.lab import data
from zeromean.lab.compare import choose, exclusive, mend, open_study, study_at
from zeromean.lab.plan import epochs_of, estimate_seconds, make, parse_side, splits
from zeromean.lab.recipes import RECIPES, ImageRecipe, find
from zeromean.lab.recipes.cifar import cifar100_elu11
from zeromean.lab.recipes.images import Phase
from zeromean.lab.recipes.mnist import digits_mlp8, mnist_autoencoder
from zeromean.lab.store import DamagedFileError, Run, Study
from zeromean.lab.summary import load as load_summary

CPU = torch.device("cpu")
DIGITS = digits_mlp8()


def test_arms_and_comparisons_of_the_default() -> None:
    plan = make(DIGITS, (), seeds=10)
    assert [arm.name for arm in plan.arms] == ["elu", "relu", "leaky_relu-0.1", "shifted_relu"]
    assert plan.comparisons == (("elu", "relu"), ("leaky_relu-0.1", "relu"), ("shifted_relu", "relu"))
    assert len(plan.runs({})) == 40
    assert plan.runs({})[0] == Run("elu", "elu", 0.01, 0)
    assert plan.tuning_runs() == []


def test_several_learning_rates_are_compared_each_with_its_own_baseline() -> None:
    plan = make(mnist_autoencoder(), ["elu", "relu"], seeds=2)
    assert plan.comparisons[0] == ("elu-lr0.01", "relu-lr0.01")
    assert len(plan.arms) == 8
    assert len({run.folder for run in plan.runs({})}) == 16
    activations = [run.activation for run in plan.runs({})]
    assert activations == sorted(activations), "runs of one activation must be neighbours to share a launch"


def test_tuning_gives_every_arm_the_same_budget() -> None:
    plan = make(DIGITS, ["elu", "relu"], seeds=3, tune=True)
    counts = {arm.name: sum(run.arm == arm.name for run in plan.tuning_runs()) for arm in plan.arms}
    assert counts == dict.fromkeys(counts, len(DIGITS.tuning_grid) * DIGITS.tuning_seeds)
    assert {run.learning_rate for run in plan.runs({"elu": 0.1, "relu": 0.03})} == {0.1, 0.03}


def test_the_baseline_can_be_chosen_and_must_be_an_arm() -> None:
    assert make(DIGITS, ["elu", "relu"], seeds=1, baseline="elu").comparisons == (("relu", "elu"),)
    assert make(DIGITS, ["elu", "gelu"], seeds=1).comparisons == (("gelu", "elu"),)
    with pytest.raises(ValueError, match="no arm"):
        make(DIGITS, ["elu", "relu"], seeds=1, baseline="gelu")


@pytest.mark.parametrize(("seeds", "first"), [(0, 0), (-1, 0), (1, -1), (2, 65535)])
def test_seeds_out_of_range(seeds: int, first: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 65535"):
        make(DIGITS, (), seeds=seeds, first_seed=first)


def test_an_arm_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="named once"):
        make(DIGITS, ["leaky_relu:0.1", "leaky_relu(0.10)"], seeds=1)


def test_tuning_holds_out_training_samples_and_sees_no_test_set() -> None:
    dataset = data.load("digits")
    tuning, final = (splits(DIGITS, dataset, tuning=stage) for stage in (True, False))
    assert tuning.test is None
    assert tuning.validation is not None
    assert final.validation is None
    assert final.test is not None
    assert len(tuning.train) + len(tuning.validation) == len(final.train) == len(dataset.train_labels)
    assert len(final.probe) == DIGITS.probe_samples
    both = torch.cat([tuning.train.inputs, tuning.validation.inputs])
    assert torch.equal(both.sum(0), final.train.inputs.sum(0))


def test_a_validation_curve_costs_training_samples() -> None:
    dataset = data.load("digits")
    parts = splits(replace(DIGITS, validation=137), dataset, tuning=False)
    assert parts.validation is not None
    assert len(parts.validation) == 137
    assert len(parts.train) == len(dataset.train_labels) - 137


def test_the_estimate_grows_with_the_epochs() -> None:
    dataset = data.load("digits")
    short, long = (make(replace(DIGITS, epochs=epochs), ["elu"], seeds=1) for epochs in (1, 1000))
    seconds = [estimate_seconds(plan, dataset, CPU) or 0 for plan in (short, long)]
    assert seconds[1] > 10 * seconds[0] > 0


def test_a_folder_with_another_plan_is_refused(tmp_path: Path) -> None:
    dataset = data.load("digits")
    study = Study(tmp_path)
    plan = make(DIGITS, ["elu", "relu"], seeds=2)
    facts = open_study(plan, study, dataset, CPU)
    assert facts["detectable_difference"] is None, "two seeds can show nothing"
    assert facts["budget"]["runs"] == 4
    study.write_plan(facts)
    assert open_study(plan, study, dataset, CPU)["created"] == facts["created"]
    with pytest.raises(ValueError, match=r"its seeds is \[0, 1\], not \[0, 1, 2\]"):
        open_study(make(DIGITS, ["elu", "relu"], seeds=3), study, dataset, CPU)
    with pytest.raises(ValueError, match=r"its recipe\.epochs is 100, not 7"):
        open_study(make(replace(DIGITS, epochs=7), ["elu", "relu"], seeds=2), study, dataset, CPU)
    changed = replace(dataset, checksums=dict.fromkeys(dataset.checksums, "0"))
    with pytest.raises(ValueError, match="its checksums"):
        open_study(plan, study, changed, CPU)


def test_tuning_chooses_by_validation_and_skips_rates_that_diverge(tmp_path: Path) -> None:
    study = Study(tmp_path)
    plan = make(replace(DIGITS, tuning_grid=(0.01, 0.1, 1.0), tuning_seeds=2), ["elu"], seeds=1, tune=True)
    errors = {(0.01, 0): 3.0, (0.01, 1): 3.0, (0.1, 0): 1.0, (0.1, 1): 2.0, (1.0, 0): 0.5, (1.0, 1): None}
    for run in plan.tuning_runs():
        study.finish(run, {"validation_error": errors[run.learning_rate, run.seed]}, None)
    assert choose(plan, study) == {"elu": 0.1}
    written = json.loads((tmp_path / "tuning.json").read_text())
    assert written["arms"]["elu"]["at_edge"] is False
    assert written["arms"]["elu"]["grid"][2] == {"learning_rate": 1.0, "validation_errors": [0.5, None]}


def test_an_arm_that_always_diverges_cannot_be_tuned(tmp_path: Path) -> None:
    plan = make(DIGITS, ["elu"], seeds=1, tune=True)
    for run in plan.tuning_runs():
        Study(tmp_path).finish(run, {"validation_error": None}, None)
    with pytest.raises(ValueError, match="ELU diverged at every learning rate"):
        choose(plan, Study(tmp_path))


def test_damage_is_told_and_mended(tmp_path: Path) -> None:
    study, run = Study(tmp_path), Run("elu", "elu", 0.1, 0)
    told: list[str] = []
    study.finish(run, {"status": "ok"}, None)
    (tmp_path / run.folder / "result.json").write_text("{")
    (tmp_path / "checkpoint-final.safetensors").write_bytes(b"no")
    mend(study, [run], ["final"], told.append)
    assert len(told) == 2
    assert "the run repeated" in told[0]
    assert study.pending([run]) == [run]
    assert study.read_checkpoint("final") is None


def test_runs_without_a_plan_are_not_taken_over(tmp_path: Path) -> None:
    Study(tmp_path).finish(Run("elu", "elu", 0.01, 0), {"epochs": 1}, None)
    with pytest.raises(ValueError, match=r"has no plan\.json, but holds elu"):
        open_study(make(DIGITS, ["elu", "relu"], seeds=1), Study(tmp_path), data.load("digits"), CPU)


def test_two_processes_cannot_share_a_study(tmp_path: Path) -> None:
    study = Study(tmp_path / "one")
    with exclusive(study), pytest.raises(ValueError, match="another process"), exclusive(study):
        pass


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp", ".hidden"])
def test_a_study_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="plain folder name"):
        study_at(tmp_path, name)


def test_every_activation_meets_every_norm_and_those_without_come_first() -> None:
    plan = make(cifar100_elu11(), ["elu", "leaky_relu:0.1"], norms=["batch", "none"], seeds=2, baseline="elu+batch")
    assert [(arm.name, arm.label, arm.norm) for arm in plan.arms] == [
        ("elu", "ELU", "none"),
        ("leaky_relu-0.1", "LeakyReLU(0.1)", "none"),
        ("elu-batch", "ELU + BatchNorm", "batch"),
        ("leaky_relu-0.1-batch", "LeakyReLU(0.1) + BatchNorm", "batch"),
    ]
    assert {pair[1] for pair in plan.comparisons} == {"elu-batch"}
    assert len(plan.comparisons) == 3
    assert plan.runs({})[4] == Run("elu-batch", "elu", 0.01, 0, norm="batch")
    assert len({run.folder for run in plan.runs({})}) == 8


def test_the_default_baseline_of_an_image_study() -> None:
    def baselines(*norms: str) -> set[str]:
        return {base for _, base in make(cifar100_elu11(), ["elu", "relu"], norms=norms, seeds=1).comparisons}

    assert baselines() == {"relu"}
    assert baselines("none", "batch") == {"relu"}
    assert baselines("batch") == {"relu-batch"}


@pytest.mark.parametrize(
    ("text", "norm"),
    [("relu+batch", "batch"), ("relu", "none"), ("relu+none", "none"), ("leaky_relu:1e+0", "none")],
)
def test_spellings_of_a_side(text: str, norm: str) -> None:
    side = parse_side(text)
    assert side.norm == norm
    assert parse_side(side.text) == side


def test_a_norm_must_be_known_once_and_possible() -> None:
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        make(cifar100_elu11(), (), norms=["btach"], seeds=1)
    with pytest.raises(ValueError, match="unknown normalization 'layer'"):
        parse_side("relu+layer")
    with pytest.raises(ValueError, match="named once"):
        make(cifar100_elu11(), (), norms=["batch", "batch"], seeds=1)
    with pytest.raises(ValueError, match="has no normalization layers"):
        make(DIGITS, (), norms=["none", "batch"], seeds=1)
    assert make(DIGITS, (), norms=["none"], seeds=1) == make(DIGITS, (), seeds=1)
    with pytest.raises(ValueError, match="--tune is not offered"):
        make(cifar100_elu11(), (), seeds=1, tune=True)


def test_an_image_plan_tells_its_length_and_no_time(tmp_path: Path) -> None:
    recipe = replace(cifar100_elu11(), batch_size=4, validation=3)
    facts = open_study(planned(recipe), Study(tmp_path), tiny_cifar(), CPU, processes=2)
    assert facts["budget"]["seconds_estimate"] is None
    assert facts["budget"]["epochs"] == 165_000 / 2, "two batches of four from nine images"
    assert facts["data"]["train"] == 9
    assert facts["device"]["processes"] == 2
    assert facts["arms"][2]["norm"] == "batch"
    assert facts["recipe"]["phases"][0]["steps"] == 165_000
    assert facts["recipe"]["error_unit"] == "%"
    assert facts == json.loads(json.dumps(facts)), "a plan must be what its file gives back"


def test_epochs_count_the_one_that_is_cut_short() -> None:
    assert epochs_of(cifar100_elu11(), 50_000) == 330
    assert epochs_of(cifar100_elu11(), 50_099) == 330
    assert epochs_of(cifar100_elu11(), 49_999) == 331
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 99\]"):
        epochs_of(cifar100_elu11(), 99)


def test_a_plan_of_an_older_version_is_refused(tmp_path: Path) -> None:
    study, dataset, plan = Study(tmp_path), data.load("digits"), make(DIGITS, ["elu"], seeds=1)
    facts = open_study(plan, study, dataset, CPU)
    study.write_plan({**facts, "arms": [{key: arm[key] for key in arm if key != "norm"} for arm in facts["arms"]]})
    for read in (lambda: open_study(plan, study, dataset, CPU), lambda: load_summary(study)):
        with pytest.raises(DamagedFileError, match="of an older version of zeromean, which named no normalization"):
            read()


def test_a_study_goes_on_when_recipes_have_more_fields(tmp_path: Path) -> None:
    recipe = replace(cifar100_elu11(), batch_size=4)
    study, dataset, plan = Study(tmp_path), tiny_cifar(), planned(recipe)
    facts = open_study(plan, study, dataset, CPU)
    older = {key: value for key, value in facts["recipe"].items() if key not in ("optimizer", "norms")}
    study.write_plan({**facts, "recipe": older})
    assert open_study(plan, study, dataset, CPU)["recipe"] == older
    other = replace(recipe, optimizer="muon", decay_biases=False)
    with pytest.raises(ValueError, match=r'its recipe\.optimizer is "sgd", not "muon"'):
        open_study(planned(other), study, dataset, CPU)


def test_every_phase_has_a_dropout_rate_for_each_stack_of_its_network() -> None:
    recipe = cifar100_elu11()
    wrong = replace(recipe, phases=(*recipe.phases, Phase(5, (0.0, 0.5, 0.0))))
    with pytest.raises(ValueError, match="phase 2 of 'cifar100-elu11' must have a dropout rate for each of the 7 stac"):
        make(wrong, ["elu"], seeds=1)
    for name in RECIPES:
        published = find(name)
        assert not isinstance(published, ImageRecipe) or make(published, ["elu"], seeds=1).seeds == (0,)


def test_a_network_in_memory_cannot_train_on_a_folder() -> None:
    with pytest.raises(ValueError, match="data=/data/photos is a folder of images, which 'digits-mlp8' cannot train"):
        make(replace(digits_mlp8(), data="/data/photos"), ["elu"], seeds=1)
