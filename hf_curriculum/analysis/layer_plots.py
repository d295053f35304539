"""
A picture of which blocks learned when, and how much they changed.

Shapes: L blocks in forward order, W windows of consecutive optimizer steps with the same blocks learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..core.errors import invalid
from .pictures import new_figure, save_figure


__all__ = ["plot_layer_map"]

LEARNED_COLOR = "#b0b0b0"
LINE_COLOR = "#444444"
GRID_COLOR = "#dcdcdc"
# Blocks with a name at the axis; of more, every second, third, ...
MOST_NAMES = 40
# Largest quotient of two rates that is still drawn on a linear scale.
LINEAR_RANGE = 10.0


def plot_layer_map(
    blocks: Sequence[str],
    bounds: npt.NDArray[np.int64],
    active: npt.NDArray[np.bool_],
    rates: npt.NDArray[np.float64],
    path: str | Path,
    *,
    warmup_end: int = 0,
    label: str = "change rate",
    title: str = "Which blocks learned",
) -> Path:
    """
    Draws steps across and blocks up: coloured by what was measured where a block learned, blank where it was frozen.

    Blocks that learned in a window in which nothing was measured are grey.

    Args:
        blocks (`Sequence[str]` of length L):
            Names, in forward order; the last one is drawn on top.
        bounds (`np.ndarray` of shape `(W + 1,)`, int64):
            First step of each window, and the step after the last one.
        active (`np.ndarray` of shape `(W, L)`, bool):
            What learned in each window.
        rates (`np.ndarray` of shape `(W, L)`, float64):
            What was measured of each block in each window, at least 0; NaN where nothing was.
        path (`str` or `Path`):
            PNG file; the data goes beside it.
        warmup_end (`int`, *optional*, defaults to `0`):
            The step after the warm-up, marked by a line; 0 for none.
        label (`str`, *optional*, defaults to `"change rate"`):
            What was measured.
        title (`str`, *optional*, defaults to `"Which blocks learned"`):
            Above the picture.

    Returns:
        `Path`: the PNG.

    Raises:
        `ValueError`: for arrays of other shapes, or no window.
        `ImportError`: without matplotlib.
    """
    shape = (len(bounds) - 1, len(blocks))
    for name, values in (("active", active), ("rates", rates)):
        if values.shape != shape or 0 in shape:
            raise invalid(name, f"shape {values.shape}", f"({shape[0]}, {shape[1]}), at least one window and block")
    figure = new_figure(9.0, 1.4 + min(8.5, max(1.2, 0.2 * len(blocks))))
    from matplotlib.colors import ListedColormap

    axis = figure.subplots()
    edges = np.arange(len(blocks) + 1) - 0.5
    measured = active & np.isfinite(rates)
    unmeasured = np.ma.masked_where(~(active & ~measured), np.ones(shape))
    axis.pcolormesh(bounds, edges, unmeasured.T, cmap=ListedColormap([LEARNED_COLOR]), rasterized=True)
    if measured.any():
        shown = np.ma.masked_where(~measured, np.where(measured, rates, 0.0))
        image = axis.pcolormesh(bounds, edges, shown.T, cmap="viridis", norm=_norm(rates[measured]), rasterized=True)
        _set_ticks(figure.colorbar(image, ax=axis, pad=0.01, label=label))
    if 0 < warmup_end < bounds[-1]:
        axis.axvline(warmup_end, color=LINE_COLOR, lw=1.0, ls=":")
        axis.annotate(
            "warm-up ends", (warmup_end, 1.0), xycoords=("data", "axes fraction"), xytext=(3, 3),
            textcoords="offset points", fontsize=8, color=LINE_COLOR,
        )  # fmt: skip
    prefix, names = _short_names(blocks)
    step = math.ceil(len(blocks) / MOST_NAMES)
    axis.set_yticks(range(0, len(blocks), step), names[::step], fontsize=8)
    axis.set_yticks(edges, minor=True)
    axis.tick_params(axis="y", which="minor", length=0)
    axis.grid(visible=True, which="minor", axis="y", color=GRID_COLOR, lw=0.4)
    axis.set_ylabel(f"block of {prefix}" if prefix else "block", parse_math=False)
    axis.set_xlabel("optimizer step" + (" (grey: learned, not measured)" if unmeasured.count() else ""))
    axis.set_xlim(bounds[0], bounds[-1])
    axis.set_ylim(edges[0], edges[-1])
    figure.suptitle(title, fontsize=11)
    return save_figure(figure, Path(path), ("first_step", "end_step", "block", "learned", "measured"), [
        (int(bounds[window]), int(bounds[window + 1]), name, int(active[window, block]), rates[window, block])
        for window in range(shape[0])
        for block, name in enumerate(blocks)
    ])  # fmt: skip


def _set_ticks(bar: Any) -> None:
    """Plain numbers, on a logarithmic scale too."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullFormatter

    bar.ax.tick_params(labelsize=8)
    if isinstance(bar.norm, LogNorm):
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        bar.ax.yaxis.set_minor_formatter(NullFormatter())


def _norm(values: npt.NDArray[np.float64]) -> Any:
    """Linear where rates are alike, so that neighbours can be told apart; logarithmic where they are not."""
    from matplotlib.colors import LogNorm, Normalize

    lowest, highest = float(values.min()), float(values.max())
    if lowest > 0.0 and highest > LINEAR_RANGE * lowest:
        return LogNorm(lowest, highest)
    return Normalize(lowest, highest if highest > lowest else lowest + (abs(lowest) or 1.0))


def _short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """What all names begin with, and what is left of each."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return ".".join(parts[0][:common]), [".".join(part[common:]) for part in parts]
