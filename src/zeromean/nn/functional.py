"""The activations as functions, each the twin of the module of the same name."""

from zeromean.nn.eelu import eelu as eelu
from zeromean.nn.elu import celu as celu
from zeromean.nn.elu import elu as elu
from zeromean.nn.elu import selu as selu
from zeromean.nn.fused import bias_elu as bias_elu
from zeromean.nn.fused import elu_add as elu_add
from zeromean.nn.linear import linear_act as linear_act
from zeromean.nn.mpelu import mpelu as mpelu
from zeromean.nn.pelu import pelu as pelu
from zeromean.nn.prelu import eprelu as eprelu
from zeromean.nn.prelu import prelu as prelu
from zeromean.nn.relu import leaky_relu as leaky_relu
from zeromean.nn.relu import relu as relu
from zeromean.nn.relu import shifted_relu as shifted_relu
from zeromean.nn.rrelu import erelu as erelu
from zeromean.nn.rrelu import rrelu as rrelu
from zeromean.nn.swish import gelu as gelu
from zeromean.nn.swish import mish as mish
from zeromean.nn.swish import silu as silu
from zeromean.nn.swish import swish as swish
