"""What a probe found, as plain numbers: to read, to write as JSON, to load again, to lay out as rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zeromean.diagnostics.findings import Finding, find
from zeromean.diagnostics.layers import Role, Skipped

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

FORMAT = 1
NOTHING = "Every number lies in its healthy range."
Values = tuple[float | None, ...]


@dataclass(frozen=True)
class LayerReport:
    """The numbers of one layer; None where one is not finite or was not measured.

    Attributes:
        name: in the model; ``name#2`` is its second call in a pass.
        kind: name of its class.
        role: ``unit``, ``activation`` or ``other``.
        units: how many it has.
        weights: numbers in its weight.
        samples: values of each unit in the last pass.
        notes: what the reader must know, such as frozen weights.
        series: quantity to its values, one a measured step; `zeromean.diagnostics.MEANINGS` explains each.
        of_units: quantity to the values of the units at the last measured step: ``mean``, ``spread``, and the shares of
            samples ``saturated`` and ``off``; with the preset ``full`` also ``k``, ``cosine``, ``norm_ratio``,
            ``bias_shift``, ``natural_bias_shift``, ``bias_gradient`` and ``natural_bias``.
    """

    name: str
    kind: str
    role: Role
    units: int
    weights: int
    samples: int
    notes: tuple[str, ...]
    series: Mapping[str, Values]
    of_units: Mapping[str, Values]

    def value(self, quantity: str) -> float | None:
        """That of the last measured step."""
        values = self.series.get(quantity)
        return values[-1] if values else None


@dataclass(frozen=True)
class Report:
    """What a probe found.

    Attributes:
        preset: ``light`` or ``full``.
        steps: that were measured: 0 is the first pass within the probe.
        layers: that were read, in the order in which they ran.
        skipped: modules that were not, with the reason.
        unseen: activations called as functions, which no hook sees.
        notes: what else was not measured, and why.
    """

    preset: str
    steps: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    unseen: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What lies outside of its healthy range at the last step, the gravest first."""
        return find(self)

    def __getitem__(self, name: str) -> LayerReport:
        """The layer of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def rows(self) -> list[dict[str, Any]]:
        """A row a layer and measured step."""
        return [
            {"step": step, "layer": layer.name, "kind": layer.kind, "role": layer.role, "units": layer.units}
            | {quantity: values[place] for quantity, values in layer.series.items()}
            for layer in self.layers
            for place, step in enumerate(self.steps)
        ]

    def frame(self) -> Any:
        """`rows` as a pandas DataFrame if pandas is installed, else as they are."""
        try:
            import pandas  # type: ignore[import-untyped, unused-ignore]
        except ModuleNotFoundError:
            return self.rows()
        return pandas.DataFrame(self.rows())

    def to_json(self) -> str:
        """Everything as JSON, the findings included; `from_json` reads it."""
        content = {"format": FORMAT, **asdict(self), "findings": [asdict(one) for one in self.findings]}
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If the text is no JSON, or not of this format.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"a probe's report must have format {FORMAT}: probe the model again with this version")
        return cls(
            preset=content["preset"],
            steps=tuple(content["steps"]),
            layers=tuple(_layer(one) for one in content["layers"]),
            skipped=tuple(Skipped(**one) for one in content["skipped"]),
            unseen=tuple(content["unseen"]),
            notes=tuple(content["notes"]),
        )

    def heat_map(self, quantity: str = "shift") -> str:
        """A quantity over layers and steps, as SVG; see `zeromean.diagnostics.pictures`."""
        from zeromean.diagnostics import pictures

        return pictures.heat_map(self, quantity)

    def histograms(self, quantity: str = "mean") -> str:
        """How a quantity spreads over the units of each layer at the last step, as SVG."""
        from zeromean.diagnostics import pictures

        return pictures.histograms(self, quantity)

    def arrows(self) -> str:
        """The gradient of each unit against its unit natural gradient, as SVG; needs the preset ``full``."""
        from zeromean.diagnostics import pictures

        return pictures.arrows(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Findings and table, for rich's print."""
        from zeromean.diagnostics.tables import page

        yield page(self)

    def __str__(self) -> str:
        """The findings, a line each."""
        return "\n".join(f"{place}. {one}" for place, one in enumerate(self.findings, 1)) or NOTHING


def _layer(content: Mapping[str, Any]) -> LayerReport:
    fixed = {**content, "notes": tuple(content["notes"])}
    return LayerReport(**{**fixed, "series": _tuples(content["series"]), "of_units": _tuples(content["of_units"])})


def _tuples(content: Mapping[str, Sequence[float | None]]) -> dict[str, Values]:
    return {name: tuple(values) for name, values in content.items()}
