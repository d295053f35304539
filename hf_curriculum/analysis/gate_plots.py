"""
A picture of the gates of a mixture of experts by layer and task, drawn from the run record.

Shapes: T tasks, N_c common experts, N_s experts of each task, E = N_c + T N_s experts in all, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np

from ..core.errors import invalid
from ..core.records import RunRecord
from .pictures import new_figure, save_figure


__all__ = ["draw_gates", "plot_gates"]

# Panels side by side; more tasks than these go below.
MOST_COLUMNS = 6
# Layers with a name at the axis; of more, every second, third, ...
MOST_NAMES = 48
TITLE_CHARACTERS = 24


def draw_gates(output_dir: str | Path) -> Path | None:
    """
    Draws the gates at the end of a run into its record folder, as `gates.png` with `gates.csv`.

    Args:
        output_dir (`str` or `Path`):
            The run's output folder.

    Returns:
        `Path`, *optional*: the PNG; None for a run that recorded no gates.

    Raises:
        `ImportError`: without matplotlib.
    """
    record = RunRecord(output_dir)
    events = record.read("gates")
    if not events:
        return None
    last = events[-1]
    path = record.folder / "gates.png"
    title = f"Gates after {last['step']} steps"
    return plot_gates(last["layers"], last["names"], last["common_experts"], path, title)


def plot_gates(
    layers: Mapping[str, Sequence[Sequence[float]]],
    tasks: Sequence[str],
    common_experts: int,
    path: str | Path,
    title: str = "Gates",
) -> Path:
    """
    Draws one heat-map per task: layers down, the experts that the task sees across, a line before its own.

    Args:
        layers (`Mapping[str, Sequence[Sequence[float]]]`):
            By the name of the layer, from the input to the output of the model, gates of shape `(T, E)`: those of the
            common experts, then of the experts of task 0, 1 and so on.
        tasks (`Sequence[str]` of length T):
            Names.
        common_experts (`int`):
            N_c.
        path (`str` or `Path`):
            PNG file; the data goes beside it.
        title (`str`, *optional*, defaults to `"Gates"`):
            Above the picture.

    Returns:
        `Path`: the PNG.

    Raises:
        `ValueError`: without a layer, or for gates that do not fit the tasks and the common experts.
        `ImportError`: without matplotlib.
    """
    table = _visible_gates(layers, len(tasks), common_experts)  # (T, L, V)
    names = _short_names(list(layers))
    experts = [f"common {number}" for number in range(common_experts)]
    experts += [f"own {number}" for number in range(table.shape[2] - common_experts)]
    across = min(len(tasks), MOST_COLUMNS)
    down = math.ceil(len(tasks) / across)
    titles = [fill(task, TITLE_CHARACTERS) for task in tasks]
    longest = max(len(line) for title in titles for line in title.splitlines())
    width = 0.5 + 0.075 * max(map(len, names)) + across * max(1.3, 0.32 * len(experts), 0.095 * longest)
    figure = new_figure(width + 1.0, 1.3 + down * (0.9 + max(1.2, 0.17 * len(names))))
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
    step = math.ceil(len(names) / MOST_NAMES)
    for number, axis in enumerate(axes):
        if number >= len(tasks):
            axis.set_axis_off()
            continue
        image = axis.imshow(table[number], cmap="viridis", vmin=0, vmax=float(table.max()) or 1.0, aspect="auto")
        axis.set_title(titles[number], fontsize=10, parse_math=False)
        axis.set_xticks(range(len(experts)), experts, rotation=90, fontsize=8)
        axis.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
        # Tasks of a row below hide the names of the experts only where there is one.
        axis.tick_params(labelbottom=number + across >= len(tasks))
        if 0 < common_experts < len(experts):
            axis.axvline(common_experts - 0.5, color="white", lw=1.5)
    figure.colorbar(image, ax=list(axes), label="gate")
    figure.suptitle(title, fontsize=11)
    rows = [
        (layer, task, expert, table[place, depth, column])
        for depth, layer in enumerate(layers)
        for place, task in enumerate(tasks)
        for column, expert in enumerate(experts)
    ]
    return save_figure(figure, Path(path), ("layer", "task", "expert", "gate"), rows)


def _visible_gates(layers: Mapping[str, Sequence[Sequence[float]]], num_tasks: int, common_experts: int) -> np.ndarray:
    """(T, L, V): of each task the common experts, then its own."""
    shapes = {np.shape(gates) for gates in layers.values()}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 2 or shape[0] != num_tasks or (shape[1] - common_experts) % num_tasks:
        raise invalid(
            "layers",
            f"gates of the shapes {sorted(shapes)}",
            f"one shape ({num_tasks}, {common_experts} + a multiple of {num_tasks}) for all layers",
        )
    stacked = np.array([np.asarray(gates, dtype=np.float64) for gates in layers.values()])  # (L, T, E)
    own = (shape[1] - common_experts) // num_tasks
    columns = [
        [*range(common_experts), *range(start, start + own)]
        for start in range(common_experts, common_experts + num_tasks * own, own or 1)
    ] or [list(range(common_experts))] * num_tasks
    return np.stack([stacked[:, task, places] for task, places in enumerate(columns)])


def _short_names(names: list[str]) -> list[str]:
    """The names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    common = 0
    while all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return [".".join(part[common:]) for part in parts]
