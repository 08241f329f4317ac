"""Deep networks whose units keep zero mean through their activation function instead of a normalization layer."""

from zeromean import nn as nn
from zeromean import optim as optim
from zeromean.diagnostics import probe as probe
from zeromean.nn import functional as functional
from zeromean.nn.init import gain as gain
from zeromean.nn.init import init_ as init_

__version__ = "0.1.0"
