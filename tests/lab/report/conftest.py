"""Built pages, and the system's Chromium to open them in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, sync_playwright
from tests.lab.image_study import CPU, tiny_cifar, write_image_study

from zeromean.diagnostics import probe
from zeromean.lab.activation import parse
from zeromean.lab.inside import examined
from zeromean.lab.nets import mlp
from zeromean.lab.plan import describe, make
from zeromean.lab.recipes.cifar import cifar100_elu11
from zeromean.lab.report import write_report
from zeromean.lab.store import Study
from zeromean.lab.summary import load

StudyFolder = Callable[..., Study]
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
HOSTILE = '</script><img src="http://127.0.0.1:9/x" onerror="window.hacked=1"><script>window.hacked=1</script>'


@pytest.fixture(scope="session")
def page_file(study_folder: StudyFolder) -> Path:
    """Four arms x ten seeds with validation curves, a run of them diverged, learning rates tuned."""
    return write_report(study_folder(tune=True, validation=100, epochs=60, diverged=(("leaky_relu-0.1", 3),)).path)


@pytest.fixture(scope="session")
def rates_file(study_folder: StudyFolder) -> Path:
    """Three arms at two learning rates, an autoencoder."""
    arms = ("elu", "relu", "leaky_relu-0.1")
    return write_report(study_folder(task="reconstruction", rates=(0.01, 0.001), arms=arms, epochs=20).path)


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four arms, two of them with batch normalization, of an 18-layer network; a run diverged."""
    return write_report(write_image_study(tmp_path_factory.mktemp("images"), network="elu18", diverged=3).path)


@pytest.fixture(scope="session")
def many_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine arms, one more than the page has colours, of one run each."""
    plan = make(cifar100_elu11(), [f"leaky_relu:0.{arm}" for arm in range(1, 10)], seeds=1)
    study = Study(tmp_path_factory.mktemp("many") / "study")
    study.write_plan(describe(plan, tiny_cifar(train=100), CPU, None))
    for place, run in enumerate(plan.runs({})):
        study.begin(run)
        for epoch in (1, 2):
            row = {"epoch": epoch, "train_loss": 4.0 / epoch + place, "train_error": 9.0, "validation_error": None}
            study.append_metrics(run, {**row, "mean_activation": [0.1], "mean_activation_spread": [0.2]})
        outcome = {"status": "ok", "test_error": 30.0 + place, "epochs": 2, "seconds": 1.0}
        study.finish(run, {**outcome, "images_per_second": 4.0 * 7.0**place}, None)
    return write_report(study.path)


@pytest.fixture(scope="session")
def networks_file(study_folder: StudyFolder) -> Path:
    """Three arms, of which ReLU lost every run and LeakyReLU its first, with a probe of every trained network."""
    lost = (*(("relu", seed) for seed in range(7)), ("leaky_relu-0.1", 0))
    study = study_folder(arms=("elu", "relu", "leaky_relu-0.1"), seeds=7, epochs=5, diverged=lost)
    write_probes(study)
    return write_report(study.path)


def write_probes(study: Study) -> None:
    """Of small networks, whose first layers have dead units, in the place of those that the study trained."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(200, 6, generator=generator) + 2, torch.arange(200) % 3
    for arm in load(study).arms:
        run = examined(arm)
        if run is not None:
            network = mlp((6, 8, 7, 9, 3), parse("relu" if arm.name == "elu" else arm.activation), seed=1)
            with torch.no_grad():
                network.get_parameter("0.bias")[0] = -1000.0
            found = probe.measure(network.eval(), x, labels)
            study.write_probe(run, {**json.loads(found.to_json()), "samples": 200})


@pytest.fixture(scope="session")
def hostile_file(study_folder: StudyFolder) -> Path:
    """Every text of the plan that a user or a machine can choose tries to break out."""
    study = study_folder(arms=("elu", "relu"), seeds=7, epochs=5, diverged=(("elu", 0),))
    plan = study.plan()
    assert plan is not None
    arms = [{**arm, "label": f"{arm['label']} {HOSTILE}"} for arm in plan["arms"]]
    texts = {
        "study": HOSTILE + "x" * 300,
        "command": HOSTILE,
        "created": HOSTILE,
        "versions": {HOSTILE: HOSTILE, "zeromean": HOSTILE},
    }
    machine = {
        "device": {**plan["device"], "name": HOSTILE, "platform": HOSTILE},
        "git": {"commit": HOSTILE, "dirty": False},
    }
    recipe = {**plan["recipe"], "name": HOSTILE, "title": HOSTILE, "source": HOSTILE}
    data = {**plan["data"], "name": HOSTILE, "source": HOSTILE, "checksums": {HOSTILE: HOSTILE}}
    study.write_plan({**plan, **texts, **machine, "arms": arms, "recipe": recipe, "data": data})
    return write_report(study.path)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One headless browser for all tests."""
    path = os.environ.get("ZEROMEAN_CHROMIUM") or shutil.which("chromium")
    if path is None:
        remedy = "no Chromium found: apt-get install chromium, or name one in ZEROMEAN_CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(remedy)
        pytest.skip(remedy)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()
