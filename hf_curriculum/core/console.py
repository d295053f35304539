"""Tables and lines for people: on the main process only, and safe beside progress bars."""

import io
import shutil
import sys
from collections.abc import Sequence

from rich.box import ASCII, SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from .distributed import is_main_process


__all__ = ["format_cell", "render_table", "say", "show_table"]

MIN_WIDTH = 120


def format_cell(value: object) -> str:
    """
    Writes a value as a table cell.

    Args:
        value (`object`):
            None and NaN become a dash; floats get four significant digits, integers thousands separators.

    Returns:
        `str`
    """
    if value is None or value != value:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def render_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """
    Lays out a table as text.

    Args:
        title (`str`):
            One line above it.
        columns (`Sequence[str]`):
            Headings. A column whose cells are numbers is set flush right.
        rows (`Sequence[Sequence[object]]`):
            Cells, written by [`format_cell`].

    Returns:
        `str`: the table, as wide as the terminal but at least 120 columns.
    """
    table = Table(box=SIMPLE_HEAD if _encodes("─") else ASCII, pad_edge=False)
    for index, column in enumerate(columns):
        is_text = any(isinstance(row[index], str) for row in rows)
        table.add_column(column, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    for row in rows:
        table.add_row(*(Text(format_cell(cell)) for cell in row))
    buffer = io.StringIO()
    width = max(shutil.get_terminal_size().columns, MIN_WIDTH)
    Console(file=buffer, width=width, color_system=None, legacy_windows=False).print(table)
    return "\n".join([title, *(line.rstrip() for line in buffer.getvalue().rstrip().splitlines())])


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _write(text: str) -> None:
    if not _encodes(text):
        text = text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding)
    tqdm.write(text)


def say(text: str) -> None:
    """
    Writes text on the main process, above any progress bar.

    Args:
        text (`str`):
            One or more lines.
    """
    if is_main_process():
        _write(text)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Writes a table on the main process, above any progress bar. See [`render_table`] for the arguments."""
    if is_main_process():
        _write("\n" + render_table(title, columns, rows) + "\n")
