"""Activations of other libraries, where they are installed: one adapter each, from their public calls.

Liger has no element-wise activation without a gate but relu squared, which nothing here compares with.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from zeromean.lab.bench.subjects import Call, Subject

_ATTORCH = {"relu": "ReLU", "elu": "ELU", "selu": "SELU", "celu": "CELU", "leaky_relu": "LeakyReLU"} | {
    "silu": "SiLU",
    "gelu": "GELU",
    "mish": "Mish",
}
_FLAG_GEMS = {
    "relu": ("relu",),
    "elu": ("elu", "elu_backward"),
    "selu": ("selu", "elu_backward"),
    "celu": ("celu", "elu_backward"),
    "leaky_relu": ("leaky_relu", "leaky_relu_backward"),
    "silu": ("silu", "silu_backward"),
    "gelu": ("gelu", "gelu_backward"),
    "mish": ("mish", "mish_backward"),
    "prelu": ("_prelu_kernel", "_prelu_kernel_backward"),
}
_ABN = {"elu": 1.0, "leaky_relu": 0.01}

MODULES = {"attorch": "attorch", "liger": "liger_kernel", "flag_gems": "flag_gems", "inplace_abn": "inplace_abn"}


def missing(name: str) -> str | None:
    """Why a library cannot take part, or None if it can."""
    if name == "liger":
        return "has no element-wise activation to compare with"
    try:
        importlib.import_module(MODULES[name])
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:
        return f"import fails ({type(error).__name__}: {error})"
    return None


def attorch(subject: Subject) -> Call | None:
    """Its module of that name."""
    if subject.name not in _ATTORCH:
        return None
    module: Call = getattr(importlib.import_module("attorch"), _ATTORCH[subject.name])()
    return module


def flag_gems(subject: Subject) -> tuple[Call, Callable[[], AbstractContextManager[Any]]] | None:
    """The function of torch, and the context in which its operators are those of FlagGems."""
    if subject.name not in _FLAG_GEMS or subject.eager is None:
        return None
    include = list(_FLAG_GEMS[subject.name])
    return subject.eager, lambda: importlib.import_module("flag_gems").use_gems(include=include)


def inplace_abn(subject: Subject) -> Call | None:
    """Its batch normalization with given statistics of mean 0 and variance 1, which leaves the activation alone."""
    if subject.name not in _ABN:
        return None

    def call(x: Tensor) -> Tensor:
        if x.ndim < 2:
            raise ValueError("inplace_abn takes inputs with channels alone: measure it with --layouts nchw")
        mean = torch.zeros(x.shape[1], device=x.device)
        function = importlib.import_module("inplace_abn.functions").inplace_abn
        settings = {"training": False, "eps": 0.0, "activation": subject.name, "activation_param": _ABN[subject.name]}
        normalized: Tensor = function(x, None, None, mean, torch.ones_like(mean), **settings)
        return normalized

    return call
