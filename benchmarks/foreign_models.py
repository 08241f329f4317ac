"""Does the probe work on models that nobody here wrote: no error, no trace, a sensible page, every layer named?

    python benchmarks/foreign_models.py [--device cuda] [--models timm/resnet18 ...] [--presets light full] --out DIR

Models of timm, torchvision and transformers, with random weights and small random batches; those whose package is not
installed have a row that says so. Of each, four short trainings from the same seed on the same batch: two plain, whose
difference tells whether the kernels are deterministic, one watched by ``light`` at every step, one with ``full``
measured before and behind it. Then

    trace     parameters, buffers and gradients, bit for bit (on nondeterministic kernels their names and types only);
              generators, modes, hooks, requires_grad and the attributes of all modules
    layers    every Linear and Conv module is measured, or skipped with a reason; with ``full``, every measured one has
              its natural gradient, or a note why not
    page      the table, strict JSON and back, rows, and the pictures where altair is installed

Writes ``results.jsonl`` (a row a model and preset) and ``machine.json``; exits with 1 unless every row is well.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import math
import os
import random
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zeromean as zm
from zeromean.diagnostics import Report
from zeromean.diagnostics.layers import CONVOLUTIONS
from zeromean.lab.plan import device_facts, git_state

STEPS = 3
WELL = ("ok", "not installed")
PRESETS = ("light", "full")


@dataclass(frozen=True)
class Subject:
    """A model with a batch; `loss` takes its output and the targets."""

    model: nn.Module
    inputs: Any
    targets: Tensor
    loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy


@dataclass(frozen=True)
class Foreign:
    """Who wrote a model, and how to build it, with random weights."""

    package: str
    build: Callable[[], Subject]


@dataclass
class Row:
    """What was found of a model with a preset; `status` is ok, not installed, or what went wrong."""

    model: str
    package: str
    preset: str
    status: str = "ok"
    version: str = ""
    device: str = ""
    parameters: int = 0
    layers: int = 0
    measured: int = 0
    activations: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    unaccounted: list[str] = field(default_factory=list)
    unseen: int = 0
    notes: list[str] = field(default_factory=list)
    deterministic: bool | None = None
    no_trace: bool | None = None
    differs: list[str] = field(default_factory=list)
    seconds_step: float | None = None
    seconds_probe: float | None = None
    page: str = ""
    nulls: int = 0
    findings: int = 0
    top: list[str] = field(default_factory=list)
    error: str = ""


def of_timm(name: str) -> Subject:
    """On eight images of 224."""
    return _images(importlib.import_module("timm").create_model(name, pretrained=False))


def of_torchvision(name: str, **settings: Any) -> Subject:
    """On eight images of 224."""
    return _images(importlib.import_module("torchvision").models.get_model(name, weights=None, **settings))


def googlenet() -> Subject:
    """With its auxiliary classifiers, which run in training mode only, and the loss they are trained with."""

    def loss(output: Any, targets: Tensor) -> Tensor:
        heads = (output.logits, output.aux_logits2, output.aux_logits1)
        losses = [F.cross_entropy(one, targets) for one in heads]
        return losses[0] + 0.3 * (losses[1] + losses[2])

    made = of_torchvision("googlenet", aux_logits=True, init_weights=False)
    return Subject(made.model, made.inputs, made.targets, loss)


def _images(model: nn.Module) -> Subject:
    return Subject(model, torch.randn(8, 3, 224, 224), torch.randint(1000, (8,)))


def own_loss(output: Any, targets: Tensor) -> Tensor:
    """The one that a transformers model returns."""
    loss: Tensor = output.loss
    return loss


def of_transformers(family: str, head: str, task: str, settings: dict[str, int]) -> Subject:
    """A small configuration with the model's own loss, on four inputs, sequences of 32 tokens.

    Args:
        family: of model and configuration.
        head: the rest of the model's class.
        task: ``classify``, ``next`` token, ``translate``, ``image`` or ``speech``.
        settings: of the configuration, besides 1000 tokens.
    """
    package = importlib.import_module("transformers")
    model = getattr(package, family + head)(getattr(package, f"{family}Config")(**settings | {"vocab_size": 1000}))
    tokens, words, labels = torch.randint(5, 100, (4, 32)), torch.randint(5, 100, (4, 12)), torch.randint(5, (4,))
    match task:
        case "classify":
            return Subject(model, {"input_ids": tokens, "labels": labels}, labels, own_loss)
        case "next":
            following = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], -100)), 1)
            return Subject(model, {"input_ids": tokens, "labels": tokens}, following, own_loss)
        case "translate":
            return Subject(model, {"input_ids": tokens, "labels": words}, words, own_loss)
        case "image":
            return Subject(model, {"pixel_values": torch.randn(4, 3, 64, 64), "labels": labels}, labels, own_loss)
        case _:
            return Subject(model, {"input_features": torch.randn(4, 80, 200), "labels": words}, words, own_loss)


_SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_TIMM = (
    *("resnet18", "vit_small_patch16_224", "convnext_tiny", "efficientnet_b0", "mobilenetv3_small_100"),
    *("mixer_s16_224", "swin_tiny_patch4_window7_224", "regnety_004"),
)
_TORCHVISION = ("resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_small", "shufflenet_v2_x1_0", "swin_t", "vit_b_16")
_T5 = {"d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
_SPEECH = {"max_source_positions": 100, "decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
_TRANSFORMERS: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "bert": ("Bert", "ForSequenceClassification", "classify", _SMALL | {"num_labels": 5}),
    "gpt2": ("GPT2", "LMHeadModel", "next", {"n_embd": 128, "n_layer": 2, "n_head": 4}),
    "llama": ("Llama", "ForCausalLM", "next", _SMALL),
    "t5": ("T5", "ForConditionalGeneration", "translate", _T5 | {"pad_token_id": 0}),
    "vit": ("ViT", "ForImageClassification", "image", _SMALL | {"image_size": 64, "num_labels": 5}),
    "mamba": ("Mamba", "ForCausalLM", "next", {"hidden_size": 128, "num_hidden_layers": 2}),
    "whisper-tiny": ("Whisper", "ForConditionalGeneration", "speech", _SPEECH | {"eos_token_id": 2}),
}
MODELS: dict[str, Foreign] = (
    {f"timm/{name}": Foreign("timm", partial(of_timm, name)) for name in _TIMM}
    | {f"torchvision/{name}": Foreign("torchvision", partial(of_torchvision, name)) for name in _TORCHVISION}
    | {"torchvision/googlenet": Foreign("torchvision", googlenet)}
    | {
        f"transformers/{name}": Foreign("transformers", partial(of_transformers, *parts))
        for name, parts in _TRANSFORMERS.items()
    }
)


@dataclass(frozen=True)
class State:
    """Of a model and its surroundings: what kernels computed, and what does not depend on them."""

    computed: dict[str, Tensor]
    fixed: dict[str, Any]


def state(model: nn.Module) -> State:
    """All that a probe might have changed."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gradients = {f"gradient of {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    computed = {name: one.detach().clone() for name, one in (named | gradients).items()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    fixed = {
        "names and types": {name: (one.shape, one.dtype, one.device) for name, one in computed.items()},
        "requires_grad": {name: one.requires_grad for name, one in named.items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": hooks(model),
        "identities": alike(model),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "generator of the CPU": torch.get_rng_state().tolist(),
        "generators of CUDA": [one.tolist() for one in cuda],
        "generators of Python and numpy": (random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    }
    return State(computed, fixed)


def alike(model: nn.Module) -> list[list[str]]:
    """Names that stand for one tensor."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    together: dict[int, list[str]] = {}
    for name, one in every:
        together.setdefault(id(one), []).append(f"{name}: {type(one).__name__}")
    return list(together.values())


def hooks(model: nn.Module) -> dict[str, int]:
    """How many there are, of each module and parameter."""
    of_modules = {
        name: sum(len(value) for key, value in vars(module).items() if key.endswith("_hooks") and value)
        for name, module in model.named_modules()
    }
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
    return of_modules | {
        f"{name}.": sum(len(getattr(one, kind, None) or ()) for kind in kinds) for name, one in model.named_parameters()
    }


def differences(a: State, b: State, *, computed: bool = True) -> list[str]:
    """Names of what is not the same, bit for bit; of what was computed only if asked for."""
    found = [name for name in a.fixed if a.fixed[name] != b.fixed[name]]
    if computed:
        found += [
            name for name in a.computed.keys() & b.computed.keys() if not _same(a.computed[name], b.computed[name])
        ]
    return sorted(found)


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and a.nan_to_num().equal(b.nan_to_num())
    )


@dataclass(frozen=True)
class Training:
    """How a short training went."""

    state: State
    seconds: float
    reports: tuple[Report, ...] = ()
    seconds_probe: float = 0.0


def train(build: Callable[[], Subject], device: torch.device, preset: str | None) -> Training:
    """Build the model and take three steps, without a probe, or with one."""
    subject = fresh(build, device)
    if preset is None:
        seconds = steps(subject)
        return Training(state(subject.model), seconds)
    if preset == "light":
        with zm.probe(subject.model) as p:
            seconds = steps(subject)
        return Training(state(subject.model), seconds, (p.report(),))
    first, before = timed(lambda: measure(subject), device)
    seconds = steps(subject)
    last, behind = timed(lambda: measure(subject), device)
    return Training(state(subject.model), seconds, (first, last), min(before, behind))


def fresh(build: Callable[[], Subject], device: torch.device) -> Subject:
    """The same model, batch and generators every time, in training mode."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what a model may draw from)
    torch.manual_seed(0)
    made = build()
    inputs = {k: v.to(device) for k, v in made.inputs.items()} if isinstance(made.inputs, Mapping) else made.inputs
    inputs = inputs if isinstance(inputs, dict) else inputs.to(device)
    return Subject(made.model.to(device).train(), inputs, made.targets.to(device), made.loss)


def measure(subject: Subject) -> Report:
    """Measure ``full`` once."""
    return zm.probe.measure(subject.model, subject.inputs, subject.targets, "full", loss=subject.loss)


def steps(subject: Subject) -> float:
    """Plain stochastic gradient descent; returns the seconds of a step, of those behind the first."""
    optimizer = torch.optim.SGD(subject.model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        output = subject.model(**subject.inputs) if isinstance(subject.inputs, dict) else subject.model(subject.inputs)
        subject.loss(output, subject.targets).backward()
        optimizer.step()

    taken = [timed(step, subject.targets.device)[1] for _ in range(STEPS)]
    return statistics.median(taken[1:])


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What the work returns, and its seconds."""
    _wait(device)
    started = time.perf_counter()
    result = work()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def examine(name: str, foreign: Foreign, device: torch.device, presets: Iterable[str]) -> Iterator[Row]:
    """A row for each preset; what a model or the probe raises is told in the row, and printed."""
    rows = [Row(name, foreign.package, preset, device=device.type) for preset in presets]
    if missing := missing_package(foreign.package):
        for row in rows:
            row.status = missing
        yield from rows
        return
    try:
        plain, again = (train(foreign.build, device, None) for _ in range(2))
        unequal = differences(plain.state, again.state)
    except Exception as error:  # whatever a package raises: the other models are to be seen too
        for row in rows:
            row.status, row.error = "error without a probe", told(error)
        yield from rows
        return
    for row in rows:
        row.version = getattr(sys.modules.get(foreign.package), "__version__", "")
        row.deterministic, row.seconds_step = not unequal, plain.seconds
        try:
            watched = train(foreign.build, device, row.preset)
            fill(row, fresh(foreign.build, device).model, watched, plain)
        except Exception as error:
            row.status, row.error = "error", told(error)
        yield row


def missing_package(package: str) -> str:
    """Why a package cannot be used; empty if it can."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == package else f"not installed: {package} lacks {error.name}"
    except Exception as error:  # a package built for another torch raises what it likes
        return f"cannot be imported: {told(error)}"
    return ""


def told(error: BaseException) -> str:
    """The last line of a traceback, all of which is printed."""
    traceback.print_exception(error)
    return traceback.format_exception_only(error)[-1].strip()


def fill(row: Row, model: nn.Module, watched: Training, plain: Training) -> None:
    """Judge what the probe said and left."""
    row.differs = differences(plain.state, watched.state, computed=bool(row.deterministic))
    row.no_trace = not row.differs
    row.parameters = sum(one.numel() for one in model.parameters())
    row.seconds_probe = watched.seconds_probe or max(0.0, watched.seconds - plain.seconds)
    for report in watched.reports:
        account(row, model, report)
        row.page, row.nulls = page(report)
        row.findings, row.top = len(report.findings), [str(one) for one in report.findings[:3]]
    if row.unaccounted:
        row.status = "layers without a word"
    if not row.no_trace:
        row.status = "a trace"


def account(row: Row, model: nn.Module, report: Report) -> None:
    """Count layers; every Linear and Conv module is read or skipped, and not both."""
    kinds = (nn.Linear, *CONVOLUTIONS)
    wanted = {name or type(model).__name__ for name, one in model.named_modules() if isinstance(one, kinds)}
    read = {layer.name.partition("#")[0] for layer in report.layers}
    skipped = {one.name: one.reason for one in report.skipped}
    row.layers, row.measured = len(wanted), len(wanted & read)
    row.activations = sum(layer.role == "activation" for layer in report.layers)
    row.skipped = dict(Counter(f"{one.kind}: {one.reason}" for one in report.skipped))
    row.unseen, row.notes = len(report.unseen), list(report.notes)
    row.unaccounted += sorted(wanted - read - skipped.keys()) + sorted(read & skipped.keys())
    row.unaccounted += [f"{name}: no reason" for name, reason in skipped.items() if not reason]
    if report.preset == "full":
        natural = {layer.name for layer in report.layers if "residual" in layer.series}
        row.unaccounted += [
            f"{n}: no natural gradient" for n in sorted(wanted & read - natural) if not noted(n, report)
        ]


def noted(name: str, report: Report) -> bool:
    """Whether a note says why a layer, or all, have no natural gradient."""
    return any(
        f" {name}," in note or f" {name}:" in note or " of " not in note.partition(":")[0] for note in report.notes
    )


def page(report: Report) -> tuple[str, int]:
    """Make everything that a report can be made into; how that went, and how many numbers are null."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report)
    assert console.export_text().strip()
    text = report.to_json()
    assert Report.from_json(text) == report
    assert len(report.rows()) == len(report.layers) * len(report.steps)
    assert report.frame() is not None
    absent = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if absent:
        return f"table and JSON; no pictures: {' and '.join(absent)} not installed", nulls(json.loads(text))
    drawn = [report.heat_map("mean"), report.histograms("mean")]
    drawn += [report.arrows()] if any("cosine" in layer.of_units for layer in report.layers) else []
    assert all(one.startswith("<svg") for one in drawn)
    return f"table, JSON and {len(drawn)} pictures", nulls(json.loads(text))


def nulls(content: Any) -> int:
    """How many numbers are null; refuses any that is not finite."""
    if isinstance(content, dict):
        return sum(map(nulls, content.values()))
    if isinstance(content, list):
        return sum(map(nulls, content))
    assert not isinstance(content, float) or math.isfinite(content)
    return content is None


def table(rows: Iterable[Row]) -> Table:
    """For the terminal."""
    shown = Table(
        "model", "preset", "status", "Linear, Conv", "read", "activations", "skipped", "unseen", "trace", box=None
    )
    for head in ("step, s", "probe, s", "findings", "nulls"):
        shown.add_column(head, justify="right")
    for row in rows:
        trace = "" if row.no_trace is None else "none" if row.no_trace else f"{len(row.differs)} differ"
        trace += "" if row.deterministic is not False else " (kernels vary)"
        counts = (row.layers, row.measured, row.activations, sum(row.skipped.values()), row.unseen)
        seconds = ("" if s is None else f"{s:.3f}" for s in (row.seconds_step, row.seconds_probe))
        shown.add_row(
            row.model, row.preset, row.status, *map(str, counts), trace, *seconds, str(row.findings), str(row.nulls)
        )
    return shown


def main(arguments: list[str] | None = None) -> int:
    """Examine the models; 0 if every row is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with (options.out / "results.jsonl").open("w") as file:
        for name in options.models:
            for row in examine(name, MODELS[name], device, options.presets):
                rows.append(row)
                file.write(json.dumps(asdict(row)) + "\n")
                file.flush()
                print(f"{row.model} {row.preset}: {row.status} {row.error}", flush=True)
    machine = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_facts(device),
        "versions": {"zeromean": zm.__version__, "python": sys.version.split()[0], "torch": torch.__version__},
        "git": git_state(),
    }
    (options.out / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
    Console(width=200).print(table(rows))
    return int(any(row.status not in WELL for row in rows))


if __name__ == "__main__":
    sys.exit(main())
