"""
Pictures as PNG, each with its data as CSV beside it.

matplotlib is an optional extra, imported where a picture is drawn: `pip install "hf_curriculum[plots]"`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..core.files import write_atomic


if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Row", "new_figure", "save_figure", "write_csv"]

DPI = 150

Row: TypeAlias = Sequence[object]


def new_figure(width: float, height: float) -> Figure:
    """
    Makes an empty figure.

    Args:
        width (`float`):
            In inches.
        height (`float`):
            In inches.

    Returns:
        `matplotlib.figure.Figure`

    Raises:
        `ImportError`: without matplotlib, naming the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: got none, expected the extra `plots`. "
            'Install it with `pip install "hf_curriculum[plots]"`.'
        ) from error
    # The object alone, not pyplot: nothing global is touched and no window is opened.
    return Figure(figsize=(width, height), layout="constrained")


def write_csv(path: str | Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """
    Writes a table.

    Args:
        path (`str` or `Path`):
            The file.
        columns (`Sequence[str]`):
            First line.
        rows (`Sequence[Sequence[object]]`):
            The lines; floats with all their digits.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomic(path, lambda file: file.write(buffer.getvalue().encode()))


def save_figure(figure: Figure, path: Path, columns: Sequence[str], rows: Sequence[Row]) -> Path:
    """
    Writes a figure as PNG and its data as CSV beside it.

    Args:
        figure (`matplotlib.figure.Figure`):
            The figure.
        path (`Path`):
            The PNG; the CSV has its name with another ending.
        columns (`Sequence[str]`):
            First line of the CSV.
        rows (`Sequence[Sequence[object]]`):
            Its other lines.

    Returns:
        `Path`: the PNG.
    """
    write_csv(path.with_suffix(".csv"), columns, rows)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=DPI))
    return path
