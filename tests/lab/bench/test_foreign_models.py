"""The benchmark on models of others, on two that pose as such: rows, traces, layers, exit codes."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks import foreign_models
from benchmarks.foreign_models import Foreign, Subject, account, differences, fresh, measure, nulls, state
from torch import Tensor, nn

CPU = torch.device("cpu")


class SharedModule(nn.Module):
    """One layer at two places, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.act = nn.Linear(6, 6), nn.ReLU()
        self.stack, self.head = nn.Sequential(self.shared, self.act, self.shared, nn.Dropout(0.5)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stack(x))
        return y


class FunctionalCall(nn.Module):
    """A layer that is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(F.linear(x, self.used.weight, self.used.bias)))
        return y


class Broken(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("broken")


def subject(model: Callable[[], nn.Module]) -> Callable[[], Subject]:
    return lambda: Subject(model(), torch.randn(8, 6), torch.arange(8) % 3)


POSING = {
    "shared": Foreign("json", subject(SharedModule)),
    "functional": Foreign("json", subject(FunctionalCall)),
    "broken": Foreign("json", subject(Broken)),
    "absent": Foreign("no_such_package", subject(Broken)),
}


@pytest.fixture(autouse=True)
def _posing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(foreign_models, "MODELS", POSING)
    for name in ("HF_HUB_OFFLINE", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
    yield
    torch.use_deterministic_algorithms(False)


def run(folder: Path, *models: str) -> tuple[int, list[dict[str, Any]]]:
    code = foreign_models.main(["--models", *models, "--out", str(folder)])
    return code, [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_models_of_others_are_measured_without_a_trace(tmp_path: Path) -> None:
    code, rows = run(tmp_path, "shared", "functional", "absent")
    assert code == 0
    assert [(row["model"], row["preset"], row["status"]) for row in rows] == [
        (name, preset, status)
        for name, status in (("shared", "ok"), ("functional", "ok"), ("absent", "not installed"))
        for preset in ("light", "full")
    ]
    assert all(row["deterministic"] and row["no_trace"] and row["differs"] == [] for row in rows[:4])
    assert [(row["layers"], row["measured"], row["unseen"]) for row in rows[:4]] == [(2, 2, 0)] * 2 + [(2, 1, 1)] * 2
    assert rows[2]["skipped"] == {"Linear: did not run as a module in a measured pass": 1}
    assert any("of shared: it was called more than once" in note for note in rows[1]["notes"])
    assert rows[1]["page"].startswith("table")
    assert json.loads((tmp_path / "machine.json").read_text())["versions"]["torch"] == torch.__version__


def test_what_raises_is_told_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, "broken", "shared")
    assert code == 1
    assert [row["status"] for row in rows] == ["error without a probe"] * 2 + ["ok"] * 2
    assert rows[0]["error"] == "KeyError: 'broken'"
    assert "Traceback" in capsys.readouterr().err


def test_an_error_of_the_probe_is_one_of_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise ZeroDivisionError("of the probe")

    monkeypatch.setattr(foreign_models, "measure", refuse)
    code, rows = run(tmp_path, "shared")
    assert code == 1
    assert [row["status"] for row in rows] == ["ok", "error"]


def _hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: None)


def _replace(model: nn.Module) -> None:
    alias = model.get_parameter("shared.weight").detach().requires_grad_()
    model.get_submodule("shared")._parameters["weight"] = alias  # type: ignore[assignment]


TRACES: dict[str, Callable[[nn.Module], object]] = {
    "hooks": _hook,
    "modes": lambda model: model.eval(),
    "generator of the CPU": lambda model: torch.rand(1),
    "attributes": lambda model: setattr(model, "left", 1),
    "requires_grad": lambda model: model.get_parameter("head.bias").requires_grad_(False),
    "head.bias": lambda model: model.get_parameter("head.bias").data.add_(1e-7),
    "gradient of head.bias": lambda model: model.get_parameter("head.bias").grad.add_(1e-7),  # type: ignore[union-attr]
    "identities": _replace,
}


@pytest.mark.parametrize("what", TRACES)
def test_every_trace_is_found(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(chosen: Subject) -> Any:
        report = measure(chosen)
        if chosen.model.get_parameter("head.bias").grad is not None:
            TRACES[what](chosen.model)
        return report

    monkeypatch.setattr(foreign_models, "measure", measured)
    code, rows = run(tmp_path, "shared")
    assert code == 1
    assert [row["status"] for row in rows] == ["ok", "a trace"]
    assert what in rows[1]["differs"]


def test_nondeterministic_kernels_are_not_taken_for_a_trace() -> None:
    made = fresh(subject(SharedModule), CPU).model
    before = state(made)
    with torch.no_grad():
        made.get_parameter("head.bias").add_(1)
    assert differences(before, state(made)) == ["head.bias"]
    assert differences(before, state(made), computed=False) == []


def test_a_layer_without_a_word_is_found() -> None:
    made = fresh(subject(FunctionalCall), CPU)
    report = measure(made)
    row = foreign_models.Row("functional", "json", "full")
    account(row, made.model, report)
    assert row.unaccounted == []
    object.__setattr__(report, "skipped", ())
    account(row, made.model, report)
    assert row.unaccounted == ["used"]
    object.__setattr__(report.layers[0], "series", {})
    account(row, made.model, report)
    assert row.unaccounted == ["used", "used", "head: no natural gradient"]


def test_numbers_are_finite_or_null() -> None:
    assert nulls({"a": [1.0, None, {"b": None}], "c": "nan"}) == 2
    with pytest.raises(AssertionError):
        nulls([float("nan")])
