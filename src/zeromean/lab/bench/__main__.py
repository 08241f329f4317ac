"""``zeromean bench`` for a machine with torch, numpy and rich alone: python -m zeromean.lab.bench."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from zeromean.lab.bench import ROUNDS, Record, run, settings, summarise


def main() -> None:
    """Read the options of ``zeromean bench`` and run it."""
    parser = argparse.ArgumentParser(prog="python -m zeromean.lab.bench", description=__doc__)
    parser.add_argument("activations", nargs="*")
    for name in ("elements", "dtypes", "layouts", "passes", "contenders"):
        parser.add_argument(f"--{name}", nargs="+", default=())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--redraw", action="store_true")
    asked = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        if asked.redraw:
            return summarise(Record(asked.output), console)
        chosen = settings(
            asked.activations,
            elements=asked.elements,
            dtypes=asked.dtypes,
            layouts=asked.layouts,
            passes=asked.passes,
            competitors=asked.contenders,
            rounds=asked.rounds,
            device=asked.device,
        )
        run(chosen, asked.output, fresh=asked.fresh, console=console)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
