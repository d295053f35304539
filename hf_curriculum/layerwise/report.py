"""
What a run let learn, read from its record: a map of steps and blocks, a table, and the history as a static list.

Shapes: L blocks in forward order, W windows of consecutive optimizer steps with the same blocks learning.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..core.console import say, show_table
from ..core.errors import invalid
from ..core.records import RunRecord
from .policies import fill_budget


__all__ = ["LAYER_COLUMNS", "LayerMap", "StaticLayers", "read_layers", "show_layers", "show_static", "static_layers"]

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

# Lines of the run record: one at the beginning of each window, one when training ends.
EVENT, END_EVENT = "layers", "layers_end"
LAYER_COLUMNS = ("block", "share of steps", "times chosen", "last score")
# Equal sizes where a record gives none; large, so that a budget in whole parameters is not rounded to whole blocks.
_EQUAL_SIZE = 1_000_000
_LABELS = {"gradient_norm": "share of the gradient norm", "signal_to_noise": "signal-to-noise ratio"}


@dataclass(frozen=True)
class LayerMap:
    """
    Which blocks learned when.

    Args:
        blocks (`tuple[str, ...]` of length L):
            Names, in forward order.
        bounds (`np.ndarray` of shape `(W + 1,)`, int64):
            First step of each window, from 0, and the step after the last one that the record knows of.
        active (`np.ndarray` of shape `(W, L)`, bool):
            What learned in each window.
        rates (`np.ndarray` of shape `(W, L)`, float64):
            What was measured of each block in each window (the policy's signal), NaN where nothing was.
        scores (`np.ndarray` of shape `(L,)`, float64):
            Last smoothed score of each block, NaN where it was never scored.
        num_warmup (`int`):
            Windows at the beginning that the policy had no part in: every block learned in turn, to be measured.
        policy (`str`):
            Who decided, by name or `repr`.
        sizes (`np.ndarray` of shape `(L,)`, int64):
            Parameters of each block that can learn; equal numbers where the record does not tell them.
        largest_share (`float` in (0, 1]):
            Largest share of the block parameters that learned at once.
        signal (`str`, *optional*):
            What was measured, as the policy names it; None where the record does not tell.
    """

    blocks: tuple[str, ...]
    bounds: IntArray
    active: BoolArray
    rates: FloatArray
    scores: FloatArray
    num_warmup: int
    policy: str
    sizes: IntArray
    largest_share: float
    signal: str | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps that the map covers."""
        return int(self.bounds[-1] - self.bounds[0])

    @property
    def warmup_end(self) -> int:
        """The step after the warm-up."""
        return int(self.bounds[self.num_warmup])

    @property
    def steps_learned(self) -> IntArray:
        """`np.ndarray` of shape `(L,)`, int64: steps in which each block learned."""
        learned: IntArray = np.diff(self.bounds) @ self.active.astype(np.int64)
        return learned

    @property
    def times_chosen(self) -> IntArray:
        """`np.ndarray` of shape `(L,)`, int64: decisions for each block, those of the warm-up left out."""
        chosen: IntArray = self.active[self.num_warmup :].sum(axis=0, dtype=np.int64)
        return chosen

    def picture(self) -> dict[str, Any]:
        """What [`~hf_curriculum.analysis.layer_plots.plot_layer_map`] draws, by the names of its arguments."""
        return {
            "blocks": self.blocks,
            "bounds": self.bounds,
            "active": self.active,
            "rates": self.rates,
            "warmup_end": self.warmup_end,
            "label": _LABELS.get(self.signal or "", "change rate"),
            "title": f"Which blocks learned: policy {self.policy}",
        }

    def rows(self) -> list[list[object]]:
        """
        The map as a table.

        Returns:
            `list[list]` of length L: cells under [`LAYER_COLUMNS`], the block next to the head first.
        """
        shares = self.steps_learned / self.num_steps
        return [
            [name, f"{share:.1%}", int(chosen), float(score)]
            for name, share, chosen, score in zip(self.blocks, shares, self.times_chosen, self.scores)
        ][::-1]


def read_layers(output_dir: str | Path) -> LayerMap:
    """
    Reads which blocks learned when from the record of a run, finished or not.

    Of a run that was cut off, the last window is known as far as the record goes.

    Args:
        output_dir (`str` or `Path`):
            The run's output folder.

    Returns:
        [`LayerMap`]

    Raises:
        `ValueError`: for a folder without such a record, or one of several models.
    """
    record = RunRecord(output_dir)
    everything = record.read()
    lines = [line for line in everything if line["event"] == EVENT]
    if not lines:
        raise invalid(
            "output_dir",
            f"{output_dir}, without a record of layers",
            "the output folder of a run with a `LayerFreezeCallback`",
            f"Looked for lines `{EVENT}` in {record.path}.",
        )
    blocks: list[str] = lines[-1]["blocks"]
    if any(line["blocks"] != blocks for line in lines):
        raise invalid("output_dir", f"{output_dir}, whose record names several sets of blocks", "runs of one model")
    ends = [line for line in everything if line["event"] == END_EVENT and line["step"] >= lines[-1]["step"]]
    active = np.zeros((len(lines), len(blocks)), dtype=np.bool_)
    rates = np.full((len(lines), len(blocks)), np.nan)
    # What was measured in a window is told when the next one begins.
    for number, (line, following) in enumerate(zip(lines, [*lines[1:], *ends[-1:], {}], strict=False)):
        active[number, line["active"]] = True
        rates[number] = _of_blocks(following.get("rates", {}), blocks)
    # What stands before is of an earlier run in the folder.
    last_step = max(line["step"] for line in everything[everything.index(lines[0]) :])
    bounds = np.array([*(line["first_step"] for line in lines), last_step], dtype=np.int64)
    if (np.diff(bounds) < 0).any():
        raise invalid("output_dir", f"{output_dir}, whose record mixes several runs", "the record of one run")
    return LayerMap(
        blocks=tuple(blocks),
        bounds=bounds,
        active=active,
        rates=rates,
        scores=_of_blocks(lines[-1]["scores"], blocks),
        num_warmup=sum(line["turn"] is not None for line in lines),
        policy=lines[-1]["policy"],
        signal=lines[-1].get("signal"),
        sizes=np.array(lines[-1].get("sizes", [_EQUAL_SIZE] * len(blocks)), dtype=np.int64),
        largest_share=max(line["active_fraction"] for line in lines),
    )


def _of_blocks(values: dict[str, Any], blocks: list[str]) -> FloatArray:
    """Values by name as an array of shape `(L,)`; NaN where there is none, which JSON calls null."""
    return np.array([math.nan if (value := values.get(name)) is None else value for name in blocks], dtype=np.float64)


def show_layers(layers: LayerMap) -> None:
    """
    Shows a map as a table, on the main process.

    Args:
        layers ([`LayerMap`]):
            The map.
    """
    decisions = len(layers.active) - layers.num_warmup
    warmup = f", {layers.warmup_end} of them warm-up in {layers.num_warmup} turns" if layers.num_warmup else ""
    show_table(
        f"Which blocks learned: policy {layers.policy}, {decisions} decisions in {layers.num_steps} steps{warmup}; at "
        f"most {layers.largest_share:.0%} of the block parameters at once",
        LAYER_COLUMNS,
        layers.rows(),
    )


@dataclass(frozen=True)
class StaticLayers:
    """
    A choice of blocks for another run, which needs no policy any more.

    Args:
        blocks (`tuple[str, ...]`):
            Names, in forward order.
        active_fraction (`float` in (0, 1]):
            The budget that they were taken for.
        peft (`dict[str, object]`, *optional*):
            `layers_to_transform` and `layers_pattern`, as [`~peft.LoraConfig`] takes them beside a list of
            `target_modules`; None where PEFT cannot name the blocks.
    """

    blocks: tuple[str, ...]
    active_fraction: float
    peft: dict[str, object] | None

    @property
    def callback(self) -> str:
        """`str`: the call that makes these blocks learn, as Python."""
        # Rounded up: a budget below that of the blocks would be refused.
        fraction = math.ceil(1e4 * self.active_fraction - 1e-6) / 1e4
        names = ", ".join(f'"{name}"' for name in self.blocks)
        return f'LayerFreezeCallback(policy="fixed", active_fraction={fraction:g}, blocks=[{names}])'


def static_layers(output_dir: str | Path, *, active_fraction: float | None = None) -> StaticLayers:
    """
    Takes the blocks that learned most in a run, warm-up left out, within a budget.

    Of blocks that learned equally long the one of the higher last score comes first, then the one nearer to the head.
    A policy that does not measure (`random`, `cyclic`) says nothing about its blocks by how long they learned.

    Args:
        output_dir (`str` or `Path`):
            The run's output folder.
        active_fraction (`float`, *optional*):
            Share of the block parameters, in (0, 1]. Defaults to the largest that learned at once in the run.

    Returns:
        [`StaticLayers`]

    Raises:
        `ValueError`: for a folder without a record of layers, a run that ended in its warm-up, or a budget that no
            block fits in.
    """
    layers = read_layers(output_dir)
    if layers.num_warmup == len(layers.active):
        raise invalid("output_dir", f"{output_dir}, a run that ended in its warm-up", "a run with a decision")
    fraction = layers.largest_share if active_fraction is None else active_fraction
    if not 0.0 < fraction <= 1.0:
        raise invalid("active_fraction", fraction, "a float in (0, 1]")
    after = slice(layers.num_warmup, None)
    learned = np.diff(layers.bounds)[after] @ layers.active[after].astype(np.int64)
    scores = np.nan_to_num(layers.scores, nan=-math.inf)
    ranking = sorted(np.flatnonzero(learned).tolist(), key=lambda block: (-learned[block], -scores[block], -block))
    chosen = fill_budget(ranking, layers.sizes, int(fraction * int(layers.sizes.sum()) + 0.5))
    if not chosen:
        smallest = min(int(layers.sizes[block]) for block in ranking) / int(layers.sizes.sum())
        raise invalid("active_fraction", fraction, f"at least {smallest:.3g}, the share of the smallest block")
    names = tuple(layers.blocks[block] for block in chosen)
    return StaticLayers(names, fraction, _for_peft(layers.blocks, chosen))


def show_static(layers: StaticLayers) -> None:
    """
    Shows a static choice as what to write into the next run, on the main process.

    Args:
        layers ([`StaticLayers`]):
            The choice.
    """
    say(f"The same blocks without a policy: {layers.callback}")
    if layers.peft is None:
        say("PEFT cannot name them by `layers_to_transform`: they are not numbered in one list.")
    else:
        say(f"As fields of a `LoraConfig`: {json.dumps(layers.peft)}")


def _for_peft(names: tuple[str, ...], chosen: tuple[int, ...]) -> dict[str, object] | None:
    from .blocks import Block, Blocks

    places = [name.rpartition(".") for name in names]
    blocks = tuple(
        Block(name, tower, int(index) if index.isdecimal() else -1, (), 1, 1)
        for name, (tower, _, index) in zip(names, places, strict=True)
    )
    try:
        return Blocks(blocks=blocks, always=(), frozen=(), adapters=False).layers_to_transform(chosen)
    except NotImplementedError:
        return None
