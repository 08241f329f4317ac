"""The papers' networks, and many of one kind trained as one."""

from collections.abc import Callable

from zeromean.lab.nets.convolutional import ConvolutionalNetwork as ConvolutionalNetwork
from zeromean.lab.nets.convolutional import elu11 as elu11
from zeromean.lab.nets.convolutional import elu18 as elu18
from zeromean.lab.nets.imagenet import elu15 as elu15
from zeromean.lab.nets.mlp import mlp as mlp
from zeromean.lab.nets.stacked import StackedNetwork as StackedNetwork
from zeromean.lab.recipes.cifar import ELU11_DROPOUT, ELU18_DROPOUT
from zeromean.lab.recipes.imagenet import ELU15_DROPOUT

NETWORKS: dict[str, Callable[..., ConvolutionalNetwork]] = {"elu11": elu11, "elu15": elu15, "elu18": elu18}
STACKS = {"elu11": len(ELU11_DROPOUT), "elu15": len(ELU15_DROPOUT), "elu18": len(ELU18_DROPOUT)}
