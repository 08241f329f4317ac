"""What the theory says about a model's units: Fisher blocks, unit natural gradient, bias shift."""

from zeromean.diagnostics.collect import collect as collect
from zeromean.diagnostics.collect import deltas as deltas
from zeromean.diagnostics.collect import squared_deltas as squared_deltas
from zeromean.diagnostics.findings import Finding as Finding
from zeromean.diagnostics.fisher import measure as measure
from zeromean.diagnostics.fisher import untouched as untouched
from zeromean.diagnostics.layers import Skipped as Skipped
from zeromean.diagnostics.meaning import MEANINGS as MEANINGS
from zeromean.diagnostics.meaning import Meaning as Meaning
from zeromean.diagnostics.report import LayerReport as LayerReport
from zeromean.diagnostics.report import Report as Report
from zeromean.diagnostics.units import NaturalGradient as NaturalGradient
from zeromean.diagnostics.units import UnitMoments as UnitMoments
from zeromean.diagnostics.units import UnitQuantities as UnitQuantities
from zeromean.diagnostics.units import unit_fisher as unit_fisher
from zeromean.diagnostics.units import unit_moments as unit_moments
from zeromean.diagnostics.units import unit_natural_gradient as unit_natural_gradient
from zeromean.diagnostics.units import unit_quantities as unit_quantities
from zeromean.diagnostics.units import weighted_variance as weighted_variance
from zeromean.diagnostics.watch import probe as probe
