"""Optimizers that test the theory."""

from zeromean.optim.natural import UnitNaturalGradient as UnitNaturalGradient
