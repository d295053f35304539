"""
Pictures of whom the tasks of a fused model listen to, drawn from the run record.

Shapes: T tasks, C classes of one of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from hashlib import sha256
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import invalid
from ..core.records import RunRecord
from .pictures import new_figure, save_figure


__all__ = ["draw_fusion", "plot_attention"]

# Cells have their number in them up to so many columns.
MOST_NUMBERED = 12
# Rows or columns with a name at the axis; of more, every second, third, ...
MOST_NAMES = 200
# Width of a name that is shown whole, in cells of a fixed font.
NAME_CELLS = 28
FILE_NAME_CHARACTERS = 40
# Inches.
CELL_WIDTH, CELL_HEIGHT = 0.5, 0.28
SMALL_CELL = 0.16
CELL_OF_NAME = 0.075
CELL_OF_TITLE = 0.085
BESIDES = 1.9
# The same font as everywhere else, then whatever has the characters that it lacks.
FONT = "DejaVu Sans"


def draw_fusion(output_dir: str | Path) -> Path | None:
    """
    Draws whom the tasks listened to when it was last measured, into the record folder of a run.

    `fusion_attention.png` is a heat-map of task by task, `fusion_attention_<task>.png` one of the classes of each task
    by task, for tasks that were measured by class; each with its data as CSV beside it. Earlier pictures go.

    Args:
        output_dir (`str` or `Path`):
            The run's output folder.

    Returns:
        `Path`, *optional*: the PNG of task by task; None for a run that recorded no attention.

    Raises:
        `ImportError`: without matplotlib.
    """
    record = RunRecord(output_dir)
    events = record.read("fusion_attention")
    if not events:
        return None
    last = events[-1]
    names, rows = list(last["names"]), dict(zip(last["names"], last["rows"], strict=True))
    for old in record.folder.glob("fusion_attention*.*"):
        if old.suffix in (".png", ".csv"):
            old.unlink()
    title = f"Whom the tasks listen to after {last['step']} steps, mean over rows"
    unknown = _fonts(names)[1]
    shown = {name: _known(_cut(name), place, unknown) for place, name in enumerate(names)}
    labels = [f"{shown[name]} ({rows[name]:,} rows)" for name in names]
    path = record.folder / "fusion_attention.png"
    main = plot_attention(last["mean"], names, path, title=title, labels=labels, what="task")
    for task, found in last["by_class"].items():
        title = f"Whom the classes of “{shown[task]}” listen to, mean over rows"
        path = record.folder / f"fusion_attention_{_file_name(task)}.png"
        plot_attention(found["attention"], [str(name) for name in found["classes"]], path, tasks=names, title=title)
    return main


def plot_attention(
    attention: Sequence[Sequence[float | None]] | np.ndarray,
    names: Sequence[str],
    path: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    what: str = "class",
    title: str = "Whom the tasks listen to",
) -> Path:
    """
    Draws one heat-map: who asks goes down, who is listened to across.

    Names that no font of this machine can write are numbered from 0 in the picture; the data has them in that order.

    Args:
        attention (`Sequence[Sequence[float]]` of shape `(R, T)`):
            Share of the attention, in [0, 1]; None or NaN for a row without a measurement, which is drawn grey.
        names (`Sequence[str]` of length R):
            Who asks: tasks or classes.
        path (`str` or `Path`):
            PNG file; the data goes beside it, one line for each cell.
        tasks (`Sequence[str]` of length T, *optional*):
            Who is listened to. Defaults to `names`.
        labels (`Sequence[str]` of length R, *optional*):
            What stands at the axis in place of the names of who asks.
        what (`str`, *optional*, defaults to `"class"`):
            What the names are of; the first column of the CSV.
        title (`str`, *optional*):
            Above the picture.

    Returns:
        `Path`: the PNG.

    Raises:
        `ValueError`: for attention that does not fit the names.
        `ImportError`: without matplotlib.
    """
    across = list(names if tasks is None else tasks)
    table = np.array([[np.nan if value is None else value for value in row] for row in attention], dtype=np.float64)
    if table.shape != (len(names), len(across)) or table.size == 0:
        raise invalid("attention", f"shape {table.shape}", f"({len(names)}, {len(across)}), at least one of each")
    down, top = labels or [_cut(name) for name in names], [_cut(name) for name in across]
    fonts, unknown = _fonts([*down, *top, title])
    down, top = ([_known(name, place, unknown) for place, name in enumerate(found)] for found in (down, top))
    numbered = len(across) <= MOST_NUMBERED and len(down) <= MOST_NAMES
    figure = new_figure(*_size(down, top, title, numbered))
    axis = figure.subplots()
    highest = float(np.nanmax(table)) if np.isfinite(table).any() else 1.0
    image = axis.imshow(table, cmap=_color_map(), vmin=0.0, vmax=highest or 1.0, aspect="auto")
    text: dict[str, Any] = {"fontsize": 8 if len(down) <= MOST_NUMBERED else 7, "family": fonts, "parse_math": False}
    step = ceil(len(down) / MOST_NAMES)
    axis.set_yticks(range(0, len(down), step), down[::step], **text)
    step = ceil(len(top) / MOST_NAMES)
    axis.set_xticks(range(0, len(top), step), top[::step], rotation=90 if len(top) > 1 else 0, **text)
    axis.set_ylabel(f"{what} that asks", fontsize=9)
    axis.set_xlabel("task that is listened to", fontsize=9)
    figure.suptitle(title, fontsize=10, family=fonts, parse_math=False)
    if numbered:
        _write_numbers(axis, table, highest)
    # As wide for few rows as for many.
    figure.colorbar(image, ax=axis, label="share of the attention", aspect=8 * figure.get_size_inches()[1], shrink=0.9)
    cells = [
        (asks, listened, None if np.isnan(table[row, column]) else float(table[row, column]))
        for row, asks in enumerate(names)
        for column, listened in enumerate(across)
    ]
    return save_figure(figure, Path(path), (what if what != "task" else "asks", "listens to", "attention"), cells)


def _color_map() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].with_extremes(bad="lightgray")


def _write_numbers(axis: Any, table: np.ndarray, highest: float) -> None:
    for (row, column), value in np.ndenumerate(table):
        text = "-" if np.isnan(value) else f"{value:.2f}"
        # Viridis is bright from about the middle on.
        color = "black" if np.isnan(value) or value > 0.6 * highest else "white"
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)


def _size(down: list[str], across: list[str], title: str, numbered: bool) -> tuple[float, float]:
    """Width and height in inches: cells, the names beside and below them, and the colour bar."""
    wide, high = (CELL_WIDTH if numbered else SMALL_CELL), (CELL_HEIGHT if len(down) <= MOST_NUMBERED else SMALL_CELL)
    beside, below = (CELL_OF_NAME * max(map(_cells_of, found)) for found in (down, across))
    width = beside + max(2.2, wide * min(len(across), MOST_NAMES)) + BESIDES
    height = (below if len(across) > 1 else 0.2) + max(1.4, high * min(len(down), MOST_NAMES)) + 0.9
    return max(width, CELL_OF_TITLE * _cells_of(title) + 0.4), height


def _fonts(texts: Sequence[str]) -> tuple[list[str], set[str]]:
    """Fonts of this machine that have the characters of some texts, and the characters that none has."""
    # Without matplotlib this names the extra.
    new_figure(1.0, 1.0)
    from matplotlib.font_manager import FontProperties, fontManager, get_font

    missing = {ord(character) for text in texts for character in text if not character.isspace()}
    missing -= set(get_font(fontManager.findfont(FontProperties(family=FONT))).get_charmap())
    fonts = [FONT]
    for entry in sorted(fontManager.ttflist, key=lambda entry: entry.name) if missing else []:
        # The last resort has a box for every character.
        if entry.name.startswith("Last Resort") or entry.name in fonts:
            continue
        if found := missing & set(get_font(entry.fname).get_charmap()):
            fonts.append(entry.name)
            missing -= found
    return fonts, {chr(code) for code in missing}


def _known(name: str, place: int, unknown: set[str]) -> str:
    """The name, or where no font can write it what is left of it after its number, by which the CSV has it."""
    if not unknown & set(name):
        return name
    rest = " ".join("".join(" " if character in unknown else character for character in name).split())
    return f"#{place} {rest}".strip(" …")


def _cells_of(text: str) -> int:
    """Width of a text in cells of a fixed font: ideographs take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)


def _cut(name: str) -> str:
    """A name in one line, cut at both ends alike, where neighbours in a list often differ."""
    line = " ".join(name.split())
    if _cells_of(line) <= NAME_CELLS:
        return line
    half = (NAME_CELLS - 1) // 2
    while _cells_of(line[:half]) + _cells_of(line[-half:]) > NAME_CELLS - 1 and half > 1:
        half -= 1
    return f"{line[:half]}…{line[-half:]}"


def _file_name(task: str) -> str:
    """A file name of plain characters that differs where the names of tasks do."""
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", task)[:FILE_NAME_CHARACTERS]
    return plain if plain == task else f"{plain}_{sha256(task.encode()).hexdigest()[:8]}"
