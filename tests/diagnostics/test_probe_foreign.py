"""What models of others brought up: parts that run in training only, weights without a layer, remedies that fit."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zeromean as zm
from zeromean.diagnostics import Report

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3


class Auxiliary(nn.Module):
    """A second head, in training only, as image classifiers of old had; a layer called twice, and a fused one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.twice, self.fused = nn.Linear(6, 8), nn.Linear(8, 8), zm.nn.LinearAct(8, 8)
        self.head, self.extra = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fused(self.twice(self.twice(self.body(x))))
        y: Tensor = self.head(x)
        return y + self.extra(x) if self.training else y


def test_one_layer_without_a_natural_gradient_does_not_cost_the_others_theirs() -> None:
    report = zm.probe.measure(Auxiliary(), X, Y)
    assert {layer.name for layer in report.layers if layer.value("k") is not None} == {"body", "head"}
    said = "\n".join(report.notes)
    assert "at step 0 of twice: it was called more than once" in said
    assert "at step 0 of fused: a LinearAct yields no net inputs" in said
    assert "at step 0 of extra: it must be called once in a forward pass, got 0 calls" in said
    assert len(report.notes) == 3


class AllInTraining(nn.Module):
    """Nothing of it runs in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x) if self.training else x
        return y


def test_no_layer_with_a_natural_gradient_is_no_error() -> None:
    report = zm.probe.measure(AllInTraining(), X, Y)
    assert report["head"].value("k") is None
    assert report.notes[0].startswith("natural gradients were not measured at step 0 of head: ")


def test_outputs_that_are_not_finite_are_no_error_with_sampled_labels() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ELU(), nn.Linear(4, 200))
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = torch.nan
    report = zm.probe.measure(model, X, Y)
    assert report.notes == (
        "natural gradients were not measured at step 0: labels are drawn from finite outputs, got nan or infinity: "
        "measure before training diverges",
    )


class Bare(nn.Module):
    """A weight of its own and a child, a Linear layer used as a function, attention with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.used, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.relu(x @ self.matrix), self.used.weight, self.used.bias)[:, None]
        y: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0][:, 0])
        return y


def test_weights_outside_of_layers_are_named() -> None:
    report = zm.probe.measure(Bare(), X, Y)
    reasons = {one.name: one.reason for one in report.skipped}
    assert reasons.keys() == {"Bare", "used", "attention", "attention.out_proj"}
    assert "not read: its matrix; name the module in layers=" in reasons["Bare"]
    assert "not read: its in_proj_weight;" in reasons["attention"]
    assert reasons["used"] == reasons["attention.out_proj"] == "did not run as a module in a measured pass"
    assert zm.probe.measure(Bare(), X, Y, layers="attention", preset="light").layers


def remedies(model: nn.Module, quantity: str, x: Tensor = X) -> dict[str, str]:
    return {
        one.layer: one.remedy
        for one in zm.probe.measure(model, x, Y, preset="full").findings
        if one.quantity == quantity
    }


def shifted(activation: nn.Module, *behind: nn.Module) -> nn.Module:
    """The second layer's inputs lie far from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), activation, *behind, nn.Linear(8, 3))
    with torch.no_grad():
        model.get_parameter("0.bias").add_(3)
    return model


@pytest.mark.parametrize("activation", [nn.ELU(), zm.nn.ELU(), nn.SELU(), zm.nn.PELU(8), nn.Tanh()])
def test_nobody_who_uses_elu_is_told_to_use_it(activation: nn.Module) -> None:
    said = remedies(shifted(activation), "input_shift")["2"]
    assert said.startswith(f"the {type(activation).__name__} before it has negative values already: normalize")
    assert not any("ELU in place" in one for one in remedies(shifted(activation), "cosine").values())


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.Sigmoid()])
def test_others_are_told_what_to_replace(activation: nn.Module) -> None:
    said = remedies(shifted(activation, nn.Dropout(0.1)), "input_shift")["3"]
    assert said.startswith(
        f"use an activation with negative values (ELU) in place of the {type(activation).__name__} before it"
    )


class Gate(nn.Module):
    """Its output is not that of the activation which ran last."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.sigmoid = nn.Linear(8, 8), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.sigmoid(self.gate(x))
        return y


def test_an_activation_whose_outputs_the_inputs_are_not_is_not_blamed() -> None:
    said = remedies(shifted(nn.ReLU(), Gate()), "input_shift")
    assert "in place of the ReLU" in said["2.gate"]
    assert said["3"] == "centre its inputs: the data if it is the first layer, else by normalizing in front of it"
    assert remedies(shifted(nn.ELU()), "input_shift", X + 3)["0"] == said["3"]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.body.bias.add_(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.elu(self.body(x)))
        return y


def test_activations_called_as_functions_are_known_too() -> None:
    report = zm.probe.measure(Functional(), X, Y)
    said = next(one.remedy for one in report.findings if one.quantity == "input_shift" and one.layer == "head")
    assert said.startswith("the elu before it has negative values already")
    again = Report.from_json(report.to_json())
    assert again.findings == report.findings


def test_dead_units_of_elu_and_the_initialization_name_the_activation() -> None:
    model = shifted(nn.ELU())
    with torch.no_grad():
        model.get_parameter("0.bias").fill_(-50)
    assert re.match("lower the learning rate or the initial weights: ELU is flat", remedies(model, "dead")["1"])
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1e-6)
    assert remedies(model, "spread")["0"].startswith("initialize for ELU (zeromean.init_)")
