"""The command ``zeromean bench``: the activations timed against torch and others, as a fraction of a copy."""

from zeromean.lab.bench.record import Record as Record
from zeromean.lab.bench.run import run as run
from zeromean.lab.bench.run import summarise as summarise
from zeromean.lab.bench.settings import ROUNDS as ROUNDS
from zeromean.lab.bench.settings import settings as settings
