"""The activations as modules, their names, and the initial weights that go with them."""

from zeromean.nn.eelu import EELU as EELU
from zeromean.nn.elu import CELU as CELU
from zeromean.nn.elu import ELU as ELU
from zeromean.nn.elu import SELU as SELU
from zeromean.nn.init import Moments as Moments
from zeromean.nn.init import gain as gain
from zeromean.nn.init import init_ as init_
from zeromean.nn.init import moments as moments
from zeromean.nn.init import taylor_gain as taylor_gain
from zeromean.nn.mpelu import MPELU as MPELU
from zeromean.nn.pelu import PELU as PELU
from zeromean.nn.prelu import EPReLU as EPReLU
from zeromean.nn.prelu import PReLU as PReLU
from zeromean.nn.registry import ACTIVATIONS as ACTIVATIONS
from zeromean.nn.registry import by_name as by_name
from zeromean.nn.registry import decay_groups as decay_groups
from zeromean.nn.registry import slope_parameters as slope_parameters
from zeromean.nn.relu import LeakyReLU as LeakyReLU
from zeromean.nn.relu import ReLU as ReLU
from zeromean.nn.relu import ShiftedReLU as ShiftedReLU
from zeromean.nn.rrelu import EReLU as EReLU
from zeromean.nn.rrelu import RReLU as RReLU
from zeromean.nn.swish import GELU as GELU
from zeromean.nn.swish import Mish as Mish
from zeromean.nn.swish import SiLU as SiLU
from zeromean.nn.swish import Swish as Swish
