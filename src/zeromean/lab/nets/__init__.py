"""The papers' networks, and many of one kind trained as one."""

from zeromean.lab.nets.mlp import mlp as mlp
from zeromean.lab.nets.stacked import StackedNetwork as StackedNetwork
