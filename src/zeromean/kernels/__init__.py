"""Fused programs for the activations on a GPU, and their registration as operators.

`zeromean.nn` hands over its plain formulas (`Operator`); what comes back runs them as one pass over memory where Triton
and a CUDA device are at hand, and as they are everywhere else.
"""

from zeromean.kernels.memory import packs as packs
from zeromean.kernels.operator import Keep as Keep
from zeromean.kernels.operator import Operator as Operator
from zeromean.kernels.operator import fused as fused
from zeromean.kernels.operator import small as small
from zeromean.kernels.seed import draw_seed as draw_seed
