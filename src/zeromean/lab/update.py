"""One update of a network: all that a step reads and changes, at addresses that stay, and the step itself.

    g <- gradient of the mean cross entropy of the batch, over its parts and over all processes
    g <- g min(1, clip / |g|)                              where the recipe clips
    v <- momentum v + g + weight_decay w                   slopes, and where the recipe says so biases, do not decay
    w <- w - rate v      or, with Nesterov's momentum,     w <- w - rate (g + weight_decay w + momentum v)
    average <- ema average + (1 - ema) w                   where the recipe averages

By Muon, weights of layers move by the orthogonal matrix next to v instead, see `zeromean.kernels.muon`.

A step whose loss or gradient is not finite is void, and so is every one after it: weights, momentum, average and
buffers (running statistics, turns of noisy activations) stay as they were before it. Nothing waits for the device, so
the whole step can be recorded as a CUDA graph.

In float16 the loss is multiplied by a scale before it is differentiated, and the gradient divided by it in the update.
There a gradient that is not finite makes its own step void and halves the scale, see `zeromean.kernels.sgd.Ledger`.

In several processes each normalizes and draws its noise for its own part of the batch: the result is that of one
process up to rounding, except with batch normalization, dropout or noise. Running statistics are those of process 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zeromean.kernels.linear import HALF_TYPES
from zeromean.kernels.sgd import Ledger
from zeromean.lab.data.augment import Batch, Source
from zeromean.lab.descent import Descent
from zeromean.lab.nets import ConvolutionalNetwork
from zeromean.lab.observe import logits_of, outputs_of
from zeromean.lab.order import noise_seeds
from zeromean.lab.recipes.images import ImageRecipe
from zeromean.lab.sharing import ALONE, Share, cut


class Update:
    """The steps of one training, on the device of its network.

    Args:
        recipe: schedule and optimizer.
        network: in training mode; updated in place.
        batches: give this process's part of each batch.
        seed: the run's.
        share: this process's place among several.
        dtype: of images and arithmetic: float32, bfloat16 or float16.

    Attributes:
        place: of the next batch in its epoch, int64 ``[1]``.
        number: of the next step, counted from 0, int64 ``[1]``.
        loss_sum: over steps, float64, until it is set to zero.
        first_void: number of the step from which on all are void, or the recipe's steps, int64 ``[1]``.
        overflows: steps that were void by themselves, in float16, int64 ``[]``.

    Raises:
        ValueError: a process's part of a batch cannot be split as the recipe asks.
    """

    def __init__(
        self,
        recipe: ImageRecipe,
        network: ConvolutionalNetwork,
        batches: Source,
        *,
        seed: int,
        share: Share = ALONE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        recipe.check_parts(share.processes)
        self.recipe, self.network, self.batches, self.share, self.dtype = recipe, network, batches, share, dtype
        device = next(network.parameters()).device
        rates = torch.tensor([recipe.rate(step) for step in range(recipe.steps)], dtype=torch.float32)
        self._ledger = Ledger.opened(rates.to(device), scales=dtype == torch.float16)
        self.place, self.number, self.loss_sum = self._ledger.place, self._ledger.number, self._ledger.loss_sum
        self.first_void, self.overflows = self._ledger.first_void, self._ledger.overflows
        half = dtype if dtype in HALF_TYPES and recipe.accumulate == 1 else None
        self._descent = Descent(recipe, network, self._ledger, half=half)
        self.parameters = self._descent.parameters
        self._average = [parameter.detach().clone() for parameter in self.parameters] if recipe.ema else []
        by_type = sorted(network.buffers(), key=lambda buffer: str(buffer.dtype))
        self._buffers = [list(group) for _, group in groupby(by_type, key=lambda buffer: buffer.dtype)]
        self._noisy = [module for module in network.modules() if hasattr(module, "seed")]
        self._noise = torch.zeros(len(self._noisy), 1, dtype=torch.int64, device=device)
        for module, own in zip(self._noisy, self._noise, strict=True):
            module.seed = own[0]
        self._seed = torch.tensor([seed], device=device)
        self._strengths: Tensor | None = None
        if recipe.dropout_curve == "linear":
            strengths = [recipe.dropout_strength(step) for step in range(recipe.steps)]
            self._strengths, self._strength = torch.tensor(strengths, device=device), torch.ones((), device=device)
            network.set_dropout_strength(self._strength)
        self._front: nn.Module | None = None
        self._back: nn.Module = network
        if share.processes > 1:
            self._front, self._back = cut(network)
        self._hidden_of, self._loss_of = _compiled() if device.type == "cuda" else _EAGER

    def take(self) -> None:
        """Take the next step."""
        before = [_joined(buffers) for buffers in self._buffers]
        loss = self._differentiate()
        self._ledger.settle(loss, self._descent.norms(), self.recipe.clip)
        self._descent.step()
        if self._average:
            weight = (1 - self.recipe.ema) * (1 - self._ledger.void)
            for average, parameter in zip(self._average, self.parameters, strict=True):
                average.lerp_(parameter.detach(), weight)
        for buffers, old in zip(self._buffers, before, strict=True):
            _put_back(buffers, old, where=self._ledger.void)

    def parts(self) -> Iterator[Batch]:
        """The parts of the step's batch, one after the other; each sets the noise that is its own.

        Where dropout rises, the step's strength of it is set as well.
        """
        recipe, layers = self.recipe, len(self._noisy)
        if self._strengths is not None:
            self._strength.copy_(self._strengths.index_select(0, self.number)[0])
        images, labels = self.batches.take(self.place)
        pairs = zip(images.chunk(recipe.accumulate), labels.chunk(recipe.accumulate), strict=True)
        for part, pair in enumerate(pairs):
            if layers:
                pass_number = self.number * recipe.accumulate + part
                seeds = noise_seeds(self._seed, layers * self.share.processes, pass_number)
                self._noise.copy_(seeds[layers * self.share.rank :][:layers])
            yield pair

    def _differentiate(self) -> Tensor:
        """Find the gradient of the batch's mean loss, and return that loss."""
        recipe, descent = self.recipe, self._descent
        copies = descent.copies_of(self._back)
        scale = 1 / (recipe.accumulate * self.share.processes)
        loss: Tensor | None = None
        sums_of_back: Callable[[], list[Tensor]] = list
        for part, (x, labels) in enumerate(self.parts(), 1):
            hidden = self._hidden(x)
            cut_off = x if hidden is None else hidden.detach().requires_grad_()
            own = self._loss_of(self._back, cut_off, labels, self.dtype, recipe.label_smoothing, copies)
            own = own if scale == 1 else own * scale
            (own * self._ledger.loss_scale if self._ledger.scales else own).backward()
            loss = own.detach() if loss is None else loss + own.detach()
            if hidden is not None:
                if part == recipe.accumulate:
                    sums_of_back = self.share.begin_sum(descent.collect(self._back))
                hidden.backward(cut_off.grad)
        assert loss is not None
        if self._front is None:
            descent.collect(self.network)
            return loss
        *sums_of_front, loss = self.share.begin_sum([*descent.collect(self._front), loss])()
        descent.put(self._front, sums_of_front)
        descent.put(self._back, sums_of_back())
        return loss

    def _hidden(self, x: Tensor) -> Tensor | None:
        """What goes from the front of a network that is cut in two to its back."""
        if self._front is None:
            return None
        return self._hidden_of(self._front, x, self.dtype, self._descent.copies_of(self._front))

    def tensors(self) -> dict[str, Tensor]:
        """All that the steps to come depend on: the tensors themselves, by name."""
        named = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        named |= {f"momentum.{index}": tensor for index, tensor in enumerate(self._descent.momenta)}
        named |= {f"average.{index}": tensor for index, tensor in enumerate(self._average)}
        counters = {"place": self.place, "number": self.number, "loss_sum": self.loss_sum}
        if self._ledger.scales:
            counters |= {"loss_scale": self._ledger.loss_scale, "calm": self._ledger.calm, "overflows": self.overflows}
        return named | counters | {"first_void": self.first_void}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put the values of such tensors in place.

        Raises:
            ValueError: they are of another network or recipe.
        """
        own = self.tensors()
        if {name: tensor.shape for name, tensor in own.items()} != {name: t.shape for name, t in tensors.items()}:
            different = sorted(own.keys() ^ tensors.keys()) or ["shapes"]
            if "loss_scale" in different:
                where = "on a GPU, in float16" if "loss_scale" in tensors else "not in float16, as on a CPU"
                raise ValueError(f"it was begun {where}: continue it there, or start the run again")
            raise ValueError(f"tensors must be those of this recipe, got others ({different[0]}): start the run again")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self._descent.refresh()

    @contextmanager
    def evaluated(self) -> Iterator[ConvolutionalNetwork]:
        """The network in evaluation mode; with an average, that of the weights in their place."""
        own = [parameter.detach().clone() for parameter in self.parameters] if self._average else []
        weights = [parameter.detach() for parameter in self.parameters] if self._average else []
        self.network.eval()
        try:
            _copy(weights, self._average)
            yield self.network
        finally:
            _copy(weights, own)
            self.network.train()


def loss_of(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    dtype: torch.dtype,
    label_smoothing: float,
    copies: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The mean cross entropy of a batch, with these in place of parameters."""
    return F.cross_entropy(logits_of(network, x, dtype, copies), labels, label_smoothing=label_smoothing)


_Passes = tuple[Callable[..., Tensor], Callable[..., Tensor]]
_EAGER: _Passes = (outputs_of, loss_of)


@functools.cache
def _compiled() -> _Passes:
    hidden, loss = (torch.compile(function, dynamic=False, fullgraph=True) for function in _EAGER)
    return hidden, loss


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.view(-1) for tensor in tensors])


def _put_back(tensors: list[Tensor], old: Tensor, *, where: Tensor) -> None:
    """Give tensors of one type their old values, joined, where the number is not 0; in four launches for all."""
    values = torch.where(where.bool(), old, _joined(tensors)).split([tensor.numel() for tensor in tensors])
    _copy(tensors, [value.view_as(tensor) for value, tensor in zip(values, tensors, strict=True)])


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
