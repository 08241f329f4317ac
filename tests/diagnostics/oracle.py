"""Dense float64 twins of the theory, from the definitions alone: whole matrices, explicit inverses, plain loops."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


def softmax_metric(f: Tensor) -> Tensor:
    """Fisher matrix of a softmax in its logits: diag(p) - p p^T, as the expectation over labels that it is."""
    p = f.softmax(-1)
    scores = torch.eye(len(p), dtype=f.dtype) - p
    return torch.stack([p[y] * torch.outer(scores[y], scores[y]) for y in range(len(p))]).sum(0)


def metric(f: Tensor, output: str) -> Tensor:
    return softmax_metric(f) if output == "softmax" else torch.eye(len(f), dtype=f.dtype)


def network_jacobian(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """d output / d parameter of each input [N, C, *parameter]."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(p: dict[str, Tensor], x: Tensor) -> Tensor:
        result: Tensor = functional_call(model, p, (x[None],))
        return result[0].flatten()

    jacobian: dict[str, Tensor] = vmap(jacrev(one), (None, 0))(parameters, inputs)
    return jacobian


def network_fisher(model: nn.Module, inputs: Tensor, output: str) -> tuple[Tensor, dict[str, slice]]:
    """The Fisher matrix of all parameters, by definition, and where each parameter is in it."""
    jacobian = network_jacobian(model, inputs)
    flat = torch.cat([j.flatten(2) for j in jacobian.values()], 2).detach()
    places, start = {}, 0
    for name, j in jacobian.items():
        size = j[0, 0].numel()
        places[name] = slice(start, start + size)
        start += size
    outputs = model(inputs).detach().flatten(1)
    total = torch.zeros(start, start, dtype=flat.dtype)
    for j, f in zip(flat, outputs, strict=True):
        total += j.T @ metric(f, output) @ j
    return total / len(inputs), places


def unit_block(fisher: Tensor, places: dict[str, slice], layer: str, unit: int, fan_in: int) -> Tensor:
    """Rows and columns of one unit's weights and bias, the bias last."""
    weight = range(places[f"{layer}.weight"].start, places[f"{layer}.weight"].stop)
    own = [*weight[unit * fan_in : (unit + 1) * fan_in], places[f"{layer}.bias"].start + unit]
    return fisher[own][:, own]


def divergence(old: Tensor, new: Tensor, output: str) -> Tensor:
    """KL(p_old || p_new), mean over inputs."""
    if output == "gaussian":
        return (old - new).square().sum(-1).mean() / 2
    return (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1).mean()


@dataclass(frozen=True)
class Unit:
    """One unit's dense quantities: inputs a [N, I] and squared deltas [N], every expectation a plain mean."""

    a: Tensor
    square: Tensor

    @property
    def c(self) -> Tensor:
        return self.square.mean()

    @property
    def mean(self) -> Tensor:
        return self.a.mean(0)

    @property
    def q(self) -> Tensor:
        """q(z) of each row; sums to 1."""
        return self.square / self.square.sum()

    @property
    def mean_q(self) -> Tensor:
        return self.q @ self.a

    @property
    def second_q(self) -> Tensor:
        return self.a.T @ torch.diag(self.q) @ self.a

    @property
    def var_q(self) -> Tensor:
        return self.second_q - torch.outer(self.mean_q, self.mean_q)

    def fisher(self) -> Tensor:
        """E_p(delta^2 a_k a_j) with a_0 = 1 last, one outer product a row."""
        extended = torch.cat((self.a, torch.ones_like(self.a[:, :1])), 1)
        rows = [s * torch.outer(x, x) for s, x in zip(self.square, extended, strict=True)]
        return torch.stack(rows).mean(0)

    @property
    def k(self) -> Tensor:
        k: Tensor = 1 + (self.mean_q - self.mean) @ torch.linalg.inv(self.var_q) @ self.mean_q
        return k

    def theorem_1(self, g: Tensor, g0: Tensor) -> tuple[Tensor, Tensor]:
        """(dw, dw_0) as the paper writes them."""
        A, b = self.c * self.second_q, self.c * self.mean_q
        s = (1 + self.mean_q @ torch.linalg.inv(self.var_q) @ self.mean_q) / self.c
        bias = s * (g0 - b @ torch.linalg.solve(A, g))
        return torch.linalg.solve(A, g - bias * b), bias

    def theorem_2(self, g: Tensor, g0: Tensor) -> Tensor:
        """The natural gradient's bias shift, through k."""
        whitened = torch.linalg.solve(self.c * self.second_q, g)
        shift: Tensor = (self.mean - self.k * self.mean_q) @ whitened + self.k * g0 / self.c
        return shift


def units(inputs: Tensor, squares: Tensor) -> Iterator[Unit]:
    for column in squares.T:
        yield Unit(inputs, column)


def places_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What each unit of a layer sees: d net / d weight of the unit itself [N, U, places, I], by autograd."""
    weight = layer.get_parameter("weight").detach()
    bias = layer._parameters["bias"]
    held = {} if bias is None else {"bias": bias.detach()}

    def net(w: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, {"weight": w, **held}, (x,))
        result = result.movedim(1, -1) if not isinstance(layer, nn.Linear) else result
        return result.reshape(len(x), -1, result.shape[-1])

    jacobian: Tensor = jacrev(net)(weight).flatten(4)
    own = torch.arange(weight.shape[0])
    return jacobian[:, :, own, own].transpose(1, 2)
