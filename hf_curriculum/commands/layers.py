"""`hf-curriculum layers`: which layers learned when, in a run with a `LayerFreezeCallback`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..core.errors import invalid


__all__ = ["add"]


def add(subparsers: Any) -> None:
    """Adds the parser of `layers`."""
    parser = subparsers.add_parser(
        "layers",
        help="Which layers learned when, in a run with a `LayerFreezeCallback`.",
        description="Shows how long each block learned, how often it was chosen and its last score, from the record "
        "of a run, finished or not.",
    )
    parser.add_argument("output_dir", help="Output folder of the run.")
    parser.add_argument("--plot", default=None, metavar="FILE.png", help="Draw steps and blocks as a heat-map.")
    parser.add_argument("--static", action="store_true", help="Show the blocks that learned most as a fixed choice.")
    parser.add_argument(
        "--active_fraction", type=float, default=None, help="Budget of --static. Default: the largest of the run."
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from ..core.console import say
    from ..layerwise.report import read_layers, show_layers, show_static, static_layers

    if options.plot is not None and Path(options.plot).suffix != ".png":
        raise invalid("plot", options.plot, "a file name that ends in .png")
    if options.active_fraction is not None and not options.static:
        raise invalid("active_fraction", options.active_fraction, "nothing without --static", "Add --static.")
    layers = read_layers(options.output_dir)
    show_layers(layers)
    if options.static:
        show_static(static_layers(options.output_dir, active_fraction=options.active_fraction))
    if options.plot is not None:
        from ..analysis.layer_plots import plot_layer_map

        say(f"Heat-map in {plot_layer_map(path=options.plot, **layers.picture())}, its data beside it as CSV.")
