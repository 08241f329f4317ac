"""``zm.probe``: read what goes through a model's layers, within a training loop or once, and leave no trace.

Two ways to look. *Watching* reads the passes that the training makes anyway: hooks are registered when a step's forward
pass begins and removed when it ends, those for gradients when the next one begins. A *probe batch* is run through the
model besides, shielded as `zeromean.diagnostics.shield` says; it needs nothing of the training's own passes, so that it
works where they run compiled.

The model is called through a function in the place where torch keeps a compiled call: a hook would make torch call it
the long way in every step, measured or not, which of a small network's steps is up to 1 %. Where a hook is on it
already, or it is not called as any module, it has a hook instead.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zeromean.diagnostics import full
from zeromean.diagnostics.fisher import OnLayer
from zeromean.diagnostics.full import Fisher
from zeromean.diagnostics.history import History
from zeromean.diagnostics.layers import CALL, OF_A_PROBE, Patterns, Selection, Skipped, runs_compiled, select
from zeromean.diagnostics.light import Learned, Pass, first_tensor, has_usual_call, is_called_plainly
from zeromean.diagnostics.report import Report
from zeromean.diagnostics.shield import Loss, forward_and_backward
from zeromean.diagnostics.tails import tails

Preset = Literal["light", "full"]
Schedule = int | Callable[[int], bool]


class probe:  # noqa: N801  (used as a function: with zm.probe(model) as p)
    """Measure a model's layers while it trains; `probe.measure` does so once.

    A step is a forward pass of the model in the mode, training or evaluation, that it had when the probe was entered;
    the first is 0, and passes in the other mode are not counted. A step's gradients are those that arrive before the
    next step begins.

    ``light`` measures, for every unit of every layer, mean and spread over the samples, and which units are saturated,
    dead or never off; for every layer the norms of its gradients. ``full`` adds what tells the gradient from the unit
    natural gradient; it needs a probe batch, and is measured in evaluation mode.

    The model must be what the training calls: a probe does not see the passes of what torch.compile made of it, and
    those that torch.jit.trace records are not measured. Modules used through their weights alone and activations called
    as functions are not seen either; both are named.

    Example:
        >>> with zm.probe(model, every=10) as p:
        ...     train(model)
        >>> print(p.report())

    Args:
        model: any module; layers are found also within the wrappers of torch.compile, DistributedDataParallel (numbers
            are those of this process) and DataParallel.
        preset: ``light`` or ``full``.
        layers: names, globs or classes; None reads every Linear and Conv layer and every elementwise activation.
        every: measure each so many steps, or those for which a function of the step's number is true.
        inputs: of a fixed probe batch: a tensor, a tuple of arguments, or a mapping of keyword arguments. None watches
            the training's own passes.
        targets: of the probe batch, without which there are no gradients: class indices, or numbers.
        loss: of the model's output and the targets; cross entropy or half the mean squared error if None.
        fisher: of ``full``: ``exact``, ``sampled``, ``empirical``, or ``auto``: exact up to 100 classes, else sampled.
        damping: of ``full``, as a fraction of a layer's mean square input.
        on_layer: called with each layer's name before its natural gradients are solved for, and with the share of the
            solves' work that is done: on a wide model they take minutes.

    Raises:
        ValueError: If no layer matches, if ``full`` has no probe batch, or if hooks cannot see the model's passes.
    """

    def __init__(
        self,
        model: nn.Module,
        preset: Preset = "light",
        layers: Patterns | None = None,
        every: Schedule = 1,
        *,
        inputs: Any = None,
        targets: Tensor | None = None,
        loss: Loss | None = None,
        fisher: Fisher = "auto",
        damping: float = 1e-3,
        on_layer: OnLayer | None = None,
    ) -> None:
        _check(model, preset, every, inputs)
        self._model = model
        self._preset = preset
        self._every = every
        self._batch = (inputs, targets, loss)
        self._fisher: Fisher = fisher
        self._damping = damping
        self._on_layer = on_layer
        self._selection: Selection = select(model, layers, compiled=inputs is not None)
        self._root = self._selection.root
        self._tails = {
            layer.name: tails(layer.module)
            for layer in self._selection.layers
            if layer.role == "activation" and not layer.module._parameters
        }
        self._learned = Learned()
        self._history = History()
        self._refused: dict[str, str] = {}
        self._unseen: tuple[str, ...] = ()
        self._notes: tuple[str, ...] = ()
        self._steps = 0
        self._busy = False
        self._pass: Pass | None = None
        self._leave: Callable[[], None] | None = None
        self._key = RemovableHandle(OrderedDict()).id
        self._running: nn.Module | None = None

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        inputs: Any,
        targets: Tensor | None = None,
        preset: Preset = "full",
        layers: Patterns | None = None,
        *,
        loss: Loss | None = None,
        fisher: Fisher = "auto",
        damping: float = 1e-3,
        on_layer: OnLayer | None = None,
    ) -> Report:
        """Measure one batch, in the mode that the model is in, and leave the model as it was.

        Args:
            model: see `probe`, as for the other arguments.
            inputs: of the batch.
            targets: of the batch.
            preset: ``light`` or ``full``.
            layers: to read.
            loss: of the output and the targets.
            fisher: of ``full``.
            damping: of ``full``.
            on_layer: of ``full``.

        Raises:
            ValueError: As `probe`.
        """
        one = cls(
            model,
            preset,
            layers,
            inputs=inputs,
            targets=targets,
            loss=loss,
            fisher=fisher,
            damping=damping,
            on_layer=on_layer,
        )
        one._run_batch(0)
        return one.report()

    def __enter__(self) -> Self:
        if self._leave is not None:
            raise ValueError("the probe is entered already: leave it first, or make another one")
        model = self._model
        if runs_compiled(model) and getattr(model, CALL, None) is not None:
            raise ValueError(
                "model.compile() compiles hooks in: pass what torch.compile(model) returned, with inputs= for a probe "
                "batch, or call zm.probe.measure between steps"
            )
        # DataParallel calls copies of the model, one a device.
        whole = runs_compiled(model) or isinstance(model, nn.DataParallel)
        anchor = model if whole else self._root
        self._training = self._root.training
        if is_called_plainly(anchor) and has_usual_call(anchor):
            self._leave = self._call_instead_of(anchor)
        else:
            self._leave = anchor.register_forward_pre_hook(self._before, prepend=True).remove
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leave is not None:
            self._leave()
            self._leave = None
        self._unhook()
        self._end_pass()

    def report(self) -> Report:
        """What was measured until now.

        Raises:
            ValueError: If nothing was.
        """
        self._end_pass()
        if not self._history.steps:
            raise ValueError(
                f"the probe measured no pass, of {self._steps} that it counted: call the model within the probe, in "
                "the mode it was entered in, on a step that every= names, and not through torch.compile of this model"
            )
        layers = self._history.layers()
        return Report(
            preset=self._preset,
            steps=tuple(self._history.steps),
            layers=layers,
            skipped=(*self._selection.skipped, *self._not_read({layer.name for layer in layers})),
            unseen=self._unseen,
            notes=self._notes,
        )

    def _not_read(self, read: set[str]) -> list[Skipped]:
        unread = "did not run as a module in a measured pass"
        return [
            Skipped(layer.name, layer.kind, self._refused.get(layer.name, unread))
            for layer in self._selection.layers
            if layer.name not in read
        ]

    def _call_instead_of(self, module: nn.Module) -> Callable[[], None]:
        """Put a function in the place of the module's call; returns what takes it away."""
        usual: Callable[..., Any] = module._call_impl
        home = threading.get_ident()

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != home:
                # DataParallel runs copies of a module in threads, and they have this function too: call those as usual.
                called = sys._getframe(1).f_locals.get("self", module)
                if called is not module:
                    return called._call_impl(*args, **kwargs)
            if not self._begins():
                return usual(*args, **kwargs)
            measured = self._pass
            assert measured is not None
            try:
                output = usual(*args, **kwargs)
            except BaseException:
                self._give_up(measured)
                raise
            measured.end_forward()
            return output

        def leave() -> None:
            if module.__dict__.get(CALL) is call:
                del module.__dict__[CALL]

        setattr(call, OF_A_PROBE, True)
        module.__dict__[CALL] = call
        return leave

    def _begins(self) -> bool:
        """Count a pass that is about to run; where it is to be measured, put everything in place."""
        if self._busy or self._root.training != self._training:
            return False
        if self._pass is not None:
            self._end_pass()
        step, every = self._steps, self._every
        self._steps = step + 1
        if (not every(step) if callable(every) else step % every) or torch._C._is_tracing():
            return False
        if self._batch[0] is not None:
            self._run_batch(step)
            return False
        self._pass = self._new_pass()
        self._pass_step = step
        self._pass.begin()
        return True

    def _give_up(self, measured: Pass) -> None:
        """Keep nothing of a pass that raised."""
        measured.end()
        if self._pass is measured:
            self._pass = None

    def _before(self, module: nn.Module, args: Any) -> None:
        handled = sys.exception()
        if self._begins():
            self._handled, self._running = handled, module
            # As register_forward_hook does, without a handle, which takes most of its time.
            module._forward_hooks[self._key] = self._after
            module._forward_hooks_always_called[self._key] = True

    def _unhook(self) -> None:
        module, self._running = self._running, None
        if module is not None:
            module._forward_hooks.pop(self._key, None)
            module._forward_hooks_always_called.pop(self._key, None)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Called also where the pass raised, which leaves an exception that was not there before: no pass then."""
        self._unhook()
        assert self._pass is not None
        if sys.exception() is self._handled:
            self._pass.end_forward()
        else:
            self._give_up(self._pass)

    def _new_pass(self) -> Pass:
        first = not self._history.steps
        functional = first and (self._batch[0] is not None or not any(map(runs_compiled, self._root.modules())))
        return Pass(self._selection.layers, self._tails, self._learned, first=first, functional=functional)

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._pass.end()
            self._take(self._pass_step, self._pass)
            self._pass = None

    def _take(self, step: int, measured: Pass) -> None:
        if measured.functional:
            self._unseen = measured.functional.sentences()
        self._refused |= measured.refused
        self._history.add(step, measured)

    def _run_batch(self, step: int) -> None:
        inputs, targets, loss = self._batch
        root, one = self._root, self._new_pass()
        self._busy = True
        try:
            one.begin()
            output = forward_and_backward(root, inputs, targets, loss, after_forward=one.end_forward)
            one.end()
            self._take(step, one)
            if self._preset == "full":
                self._add_natural(step, one, output)
        finally:
            one.end()
            self._busy = False

    def _add_natural(self, step: int, measured: Pass, output: Any) -> None:
        inputs, targets, _ = self._batch
        layers, left_out = full.measurable(self._selection.layers, measured.names)
        scores = first_tensor(output)
        try:
            if not layers or scores is None:
                raise ValueError("no Linear or Conv layer ran exactly once, or the output holds no numbers")
            found, wrong = full.natural(
                self._root,
                layers,
                inputs,
                targets,
                scores,
                which=self._fisher,
                damping=self._damping,
                on_layer=self._on_layer,
            )
        except ValueError as error:
            self._notes = (f"natural gradients were not measured at step {step}: {error}",)
            return
        self._notes = full.notes(step, left_out | wrong)
        if not found:
            return
        values = {name: full.of_layer(one) for name, one in found.items()}
        together = torch.stack([value.double().cpu() for of in values.values() for value in of.values()]).tolist()
        plain = iter(together)
        self._history.add_values(step, {name: {key: next(plain) for key in of} for name, of in values.items()})
        self._history.add_units({name: full.of_units(one) for name, one in found.items()})


def _check(model: nn.Module, preset: str, every: Schedule, inputs: Any) -> None:
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be light or full, got {preset!r}")
    if not callable(every) and every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}: 10 measures each tenth step")
    if preset == "full" and inputs is None:
        raise ValueError("preset='full' needs a probe batch: give inputs= and targets=, or choose preset='light'")
    if inputs is None and runs_compiled(model):
        raise ValueError(
            "a compiled model ignores hooks, or compiles them in: give a probe batch as inputs= (and targets=), which "
            "is run through the original module, or enter the probe with a model that is not compiled"
        )
    if inputs is None and isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            f"DataParallel runs copies on {len(model.device_ids)} devices, which hooks cannot tell apart: give a probe "
            "batch as inputs=, or use DistributedDataParallel"
        )
