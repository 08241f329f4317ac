"""The probe leaves no trace: not in weights, buffers, gradients, generators, hooks and modes, and not in memory."""

import copy
import gc
import io
import pickle
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Literal, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

import zeromean as zm


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), zm.nn.EELU(16), nn.Linear(16, 16), nn.RReLU(), nn.Linear(16, 3))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 3))


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.3)),
        *(nn.Flatten(), nn.Linear(32, 8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 3)),
    )


def norm(model: nn.Module) -> float:
    """Of the gradient of the first weight."""
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return float(gradient.norm())


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True, activation=F.gelu)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(x).mean(1))
        return scores


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "convolutional": (convolutional, (3, 4, 4)),
    "transformer": (Transformer, (5, 8)),
}
LOOKS = ("never", "light", "light every second", "light on a batch", "full on a batch")


def train(name: str, look: str) -> tuple[dict[str, Tensor], list[Tensor], object]:
    """Six steps; what the model, its gradients and the generators are like afterwards."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what a model may draw from)
    build, shape = MODELS[name]
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    batches = [(torch.randn(10, *shape), torch.randint(0, 3, (10,))) for _ in range(6)]
    probe_batch = {"inputs": batches[0][0], "targets": batches[0][1]} if "batch" in look else {}

    def loop() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    if look == "never":
        loop()
    else:
        preset = "full" if "full" in look else "light"
        with zm.probe(model, preset, every=2 if "second" in look else 1, **probe_batch) as p:  # type: ignore[arg-type]
            loop()
        assert p.report()
    gradients = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    numpy = str(np.random.get_state())  # noqa: NPY002
    generators = (torch.get_rng_state().tolist(), random.getstate(), numpy)
    return copy.deepcopy(model.state_dict()), gradients, generators


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_for_bit(name: str) -> None:
    state, gradients, generators = train(name, "never")
    for look in LOOKS[1:]:
        found_state, found_gradients, found_generators = train(name, look)
        assert state.keys() == found_state.keys()
        assert all(torch.equal(state[key], found_state[key]) for key in state), look
        assert all(torch.equal(a, b) for a, b in zip(gradients, found_gradients, strict=True)), look
        assert generators == found_generators, look


def hooks(model: nn.Module) -> int:
    of_modules = sum(
        len(getattr(module, f"_{kind}"))
        for module in model.modules()
        for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    )
    calls = sum("_compiled_call_impl" in vars(module) for module in model.modules())
    return of_modules + calls + sum(len(one._backward_hooks or ()) for one in model.parameters())


def test_hooks_are_gone_between_measured_steps_and_afterwards() -> None:
    model, x = convolutional(), torch.randn(4, 3, 4, 4)
    with zm.probe(model, every=2) as p:
        assert hooks(model) == 1
        y = model(x)
        assert hooks(model) == 1 + 3
        y.sum().backward()
        model(x)
        assert hooks(model) == 1
    assert hooks(model) == 0
    assert not y._backward_hooks
    assert p.report().steps == (0,)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_a_probe_is_not_watched(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = plain(), torch.randn(4, 6)
    with zm.probe(model) as p:
        other = copied(model)
        assert hooks(other) == 0
        assert torch.equal(other(x), model(x))
    assert p.report().steps == (0,)


def test_what_data_parallel_copies_runs_as_itself() -> None:
    """It copies a module's attributes and calls the copies in threads."""
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    found: list[Tensor] = []
    with zm.probe(model) as p:
        replica = model._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.ones(2, 3), torch.zeros(2)
        thread = threading.Thread(target=lambda: found.append(replica(x)))
        thread.start()
        thread.join()
        elsewhere = threading.Thread(target=lambda: found.append(model(x)))
        elsewhere.start()
        elsewhere.join()
    assert torch.allclose(found[0], x.sum(1, keepdim=True).expand(4, 2))
    assert torch.equal(found[1], model(x))
    assert p.report().steps == (0,)


def test_a_pass_through_copies_is_one_pass() -> None:
    class Copying(nn.DataParallel[nn.Module]):
        """Calls copies in threads, as DataParallel does on several devices."""

        def forward(self, x: Tensor) -> Tensor:
            found: dict[int, Tensor] = {}
            copies = [self.module._replicate_for_data_parallel() for _ in range(2)]

            def run(place: int) -> None:
                found[place] = copies[place](x)

            threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return found[0] + found[1]

    model, x = Copying(plain()), torch.randn(4, 6)
    usual = model(x)
    with zm.probe(model, inputs=x) as p:
        for _ in range(3):
            assert torch.equal(model(x), usual)
    assert p.report().steps == (0, 1, 2)


def test_a_model_with_a_hook_is_watched_by_hooks_and_seen_alike() -> None:
    reports, seen = [], list[int]()
    for hooked in (False, True):
        torch.manual_seed(0)
        model = plain()
        if hooked:
            model.register_forward_pre_hook(lambda module, args: seen.append(hooks(module)))
        with zm.probe(model, every=2) as p:
            for _ in range(6):
                model(torch.randn(4, 6)).sum().backward()
        assert hooks(model) == hooked
        reports.append(p.report())
    assert len(seen) == 6
    assert [one.series for one in reports[0].layers] == [one.series for one in reports[1].layers]


def saved(model: nn.Module, x: Tensor) -> Tensor:
    torch.save(model, io.BytesIO())
    found: Tensor = model(x)
    return found


def within_one_graph(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = torch.compile(lambda z: model(z) + 0, backend="eager", fullgraph=True)(x)
    return found


def exported(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = torch.export.export(model, (x,)).module()(x)
    return found


def traced(model: nn.Module, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found: Tensor = torch.jit.trace(model, x)(x)
    return found


@pytest.mark.parametrize("made", [saved, within_one_graph, exported, traced])
def test_what_is_made_of_a_model_within_a_probe_works(made: Callable[[nn.Module, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = plain(), torch.randn(4, 6)
    usual = model(x)
    with zm.probe(model, every=2) as p:
        for _ in range(5):
            model(x).sum().backward()
        assert torch.allclose(made(model, x), usual)
    assert p.report().steps[:3] == (0, 2, 4)
    assert hooks(model) == 0


def test_a_compiled_call_that_comes_within_a_probe_stays() -> None:
    model = plain()
    with zm.probe(model) as p:
        model(torch.randn(4, 6))
        model.compile(backend="eager")
        own = vars(model)["_compiled_call_impl"]
    assert vars(model)["_compiled_call_impl"] is own
    assert p.report().steps == (0,)


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("broken")


def test_exceptions_pass_and_hooks_go() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Broken())
    with pytest.raises(KeyError, match="broken"), zm.probe(model):
        model(torch.randn(2, 3))
    assert hooks(model) == 0
    with pytest.raises(KeyError, match="broken"):
        zm.probe.measure(model, torch.randn(2, 3))
    assert hooks(model) == 0
    assert not torch.overrides._get_current_function_mode_stack()
    with zm.probe(model) as p:
        with pytest.raises(KeyError):
            model(torch.randn(2, 3))
        assert hooks(model) == 1
        assert not torch.overrides._get_current_function_mode_stack()
    with pytest.raises(ZeroDivisionError), zm.probe(model):
        raise ZeroDivisionError
    assert p is not None


def test_measuring_once_touches_nothing() -> None:
    model, x, y = convolutional(), torch.randn(6, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    model[5].eval()
    model(x).sum().backward()
    fired: list[str] = []
    next(model.parameters()).register_hook(lambda gradient: fired.append("hook"))
    pending = model(x).sum()
    before = copy.deepcopy(model.state_dict()), [one.grad.clone() for one in model.parameters()]  # type: ignore[union-attr]
    versions = [one._version for one in (*model.parameters(), *model.buffers())]
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    with torch.no_grad():
        zm.probe.measure(model, x, y, "light")
        zm.probe.measure(model, x, y, "full")
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values(), strict=True))
    assert all(torch.equal(a, b.grad) for a, b in zip(before[1], model.parameters(), strict=True) if b.grad is not None)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert fired == []
    assert versions[: len(list(model.parameters()))] == [one._version for one in model.parameters()]
    pending.backward()
    assert fired == ["hook"]


class Drawing(nn.Module):
    """Draws from every generator there is, as layer drop and stochastic depth do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (random.random() + np.random.random() + torch.rand(()))  # noqa: NPY002


def test_generators_of_python_and_numpy_are_put_back() -> None:
    model, x = nn.Sequential(Drawing(), nn.Linear(3, 2)), torch.randn(4, 3)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    zm.probe.measure(model, x, torch.tensor([0, 1, 0, 1]))
    assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002


def test_nothing_of_a_step_is_kept_alive() -> None:
    model = mlp()
    with zm.probe(model) as p:
        output = model(torch.randn(5, 12))
        alive = weakref.ref(output)
        output.sum().backward()
        del output
        gc.collect()
        assert alive() is None
    assert p.report()


def test_evaluation_and_inference_mode() -> None:
    model, x = mlp().eval(), torch.randn(5, 12)
    with zm.probe(model) as p, torch.inference_mode():
        model(x)
    watched = p.report()
    with torch.inference_mode():
        once = zm.probe.measure(model, x, preset="light")
    assert watched["2"].series["mean"] == once["2"].series["mean"]
    assert watched["2"].notes == ("in evaluation mode",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_measured_as_it_runs_and_leaves_no_trace(dtype: torch.dtype) -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(12, 16), nn.ELU(), nn.Linear(16, 16)), torch.randn(64, 12)
        with torch.autocast("cpu", dtype):
            if watched:
                with zm.probe(model) as p:
                    output = model(x)
                    output.float().sum().backward()
                layer = p.report()["2"]
            else:
                output = model(x)
                output.float().sum().backward()
        results.append((output, model[0].weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert layer.value("weight_gradient") == pytest.approx(float(model[2].weight.grad.norm()), rel=1e-3)  # type: ignore[union-attr, operator]
    seen = output.detach().double()
    assert layer.of_units["spread"] == pytest.approx(seen.std(0, correction=0).tolist(), rel=1e-5)


def test_checkpointed_layers_are_measured_once() -> None:
    inner = nn.Sequential(nn.Linear(4, 6), nn.ELU())

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = inner, nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            from torch.utils.checkpoint import checkpoint

            y: Tensor = self.head(checkpoint(self.inner, x, use_reentrant=False))
            return y

    model = Checkpointed()
    with zm.probe(model) as p:
        model(torch.randn(5, 4)).sum().backward()
    assert [layer.name for layer in p.report().layers] == ["inner.0", "inner.1", "head"]
    assert p.report()["inner.0"].value("weight_gradient")


@pytest.fixture
def compiled() -> Iterator[Callable[[nn.Module], nn.Module]]:
    torch.compiler.reset()
    yield lambda model: cast(nn.Module, torch.compile(model, backend="aot_eager"))
    torch.compiler.reset()


def test_a_compiled_model_is_probed_through_the_original(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 2))
    fast, x, y = compiled(model), torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0])
    plain = zm.probe.measure(model, x, y)
    assert zm.probe.measure(fast, x, y) == plain
    with pytest.raises(ValueError, match="a compiled model ignores hooks"):
        zm.probe(fast)
    fast(x)
    counter = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with zm.probe(fast, "full", inputs=x, targets=y) as p:
        fast(x)
        fast(x)
    fast(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counter
    assert p.report().steps == (0, 1)
    assert p.report()["2"].series["k"][0] == plain["2"].value("k")
    assert hooks(model) == hooks(fast) == 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_a_compiled_part_is_listed(compiled: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), compiled(nn.Sequential(nn.ELU(), nn.Linear(6, 2))))
    x = torch.randn(3, 4)
    with zm.probe(model) as p:
        model(x)
    report = p.report()
    assert [layer.name for layer in report.layers] == ["0"]
    assert {one.name for one in report.skipped} == {"1.0", "1.1"}
    assert len(zm.probe.measure(model, x, preset="light").layers) == 3


def test_a_model_compiled_in_place_says_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    model.compile(backend="aot_eager")
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"model.compile\(\) compiles hooks in"), zm.probe(model, inputs=x):
        pass
    assert len(zm.probe.measure(model, x, preset="light").layers) == 1


def test_wrappers_of_data_parallelism_are_looked_through() -> None:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model, x, y = mlp(), torch.randn(5, 12), torch.tensor([0, 1, 0, 1, 0])
        wrapped = nn.parallel.DistributedDataParallel(model)
        with zm.probe(wrapped) as p:
            F.cross_entropy(wrapped(x), y).backward()
        assert [layer.name for layer in p.report().layers] == ["0", "1", "2", "3", "4"]
        assert p.report()["0"].value("weight_gradient") == pytest.approx(norm(model), rel=1e-5)
        assert len(zm.probe.measure(wrapped, x, y).layers) == 5
    finally:
        torch.distributed.destroy_process_group()
    assert len(zm.probe.measure(nn.DataParallel(mlp()), x).layers) == 5


class Shared(nn.Module):
    """One module under three names, with a buffer, and its weight in another module too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.stack, self.head = nn.Sequential(self.inner, self.inner), nn.Linear(4, 4)
        self.head.weight = self.inner.get_parameter("0.weight")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.stack(x))
        return y


@pytest.mark.parametrize("preset", ["light", "full"])
def test_a_module_with_several_names_keeps_its_tensors(preset: Literal["light", "full"]) -> None:
    model, x, y = Shared(), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: one.detach().clone() for name, one in tensors.items()}
    report = zm.probe.measure(model, x, y, preset)
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == tensors.keys()
    assert all(found[name] is tensors[name] for name in tensors)
    assert all(torch.equal(found[name], values[name]) for name in tensors)
    assert model.head.weight is model.inner.get_parameter("0.weight")
    assert {layer.name for layer in report.layers if layer.role == "unit"} == {"inner.0", "inner.0#2", "head"}
