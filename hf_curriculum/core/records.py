"""The run record: what happened, line by line, for reports to read."""

import json
import math
from pathlib import Path
from typing import Any

from .files import write_atomic


__all__ = ["RECORD_FOLDER", "RunRecord"]

RECORD_FOLDER = "hf_curriculum"


class RunRecord:
    """
    An append-only JSONL file, `<output_dir>/hf_curriculum/record.jsonl`, one event per line.

    Every line has `event` (`str`) and `step` (`int`, optimizer steps done). The first line is the event `run` with
    the run's id. Resuming drops the lines after the checkpoint's step, so that a killed and resumed run leaves the
    record of an uninterrupted one.

    Args:
        output_dir (`str` or `Path`):
            The run's folder.
        enabled (`bool`, *optional*, defaults to `True`):
            Whether this process writes; False on every rank but the first, where all methods but `run_id` do nothing.
    """

    def __init__(self, output_dir: str | Path, enabled: bool = True) -> None:
        self.folder = Path(output_dir) / RECORD_FOLDER
        self.path = self.folder / "record.jsonl"
        self.enabled = enabled

    def start(self, run_id: str, **values: Any) -> None:
        """
        Begins the record of a new run, in place of any earlier one.

        Args:
            run_id (`str`):
                Name of the run, unique.
            values:
                JSON values to keep in the first line.
        """
        if self.enabled:
            self._write([{"event": "run", "step": 0, "run_id": run_id, **values}])

    def resume(self, run_id: str, step: int) -> None:
        """
        Drops the events after a step; begins anew if the record there is of another run.

        Args:
            run_id (`str`):
                The run that is resumed.
            step (`int`):
                Optimizer steps done at the checkpoint.
        """
        if self.enabled and self.run_id != run_id:
            self.start(run_id)
        elif self.enabled:
            self._write([line for line in self.read() if line["step"] <= step])

    def rewind(self, event: str, step: int) -> None:
        """
        Drops what a new or resumed run does again, of a plain Trainer; our trainers have done so for all events.

        Args:
            event (`str`):
                Only lines of this kind.
            step (`int`):
                Optimizer steps done: later lines go, and all of them in a new run.
        """
        if self.enabled and self.path.is_file():
            self._write([line for line in self.read() if line["event"] != event or 0 < step >= line["step"]])

    def append(self, event: str, step: int, **values: Any) -> None:
        """
        Adds an event.

        Args:
            event (`str`):
                Its kind.
            step (`int`):
                Optimizer steps done.
            values:
                JSON values.
        """
        if self.enabled:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_as_json({"event": event, "step": step, **values}))

    def read(self, event: str | None = None) -> list[dict[str, Any]]:
        """
        Reads the record.

        Args:
            event (`str`, *optional*):
                Only lines of this kind.

        Returns:
            `list[dict]`: the lines in order; a last line that was cut off by a kill is left out.
        """
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if event is None or line["event"] == event:
                lines.append(line)
        return lines

    @property
    def run_id(self) -> str | None:
        """Id of the run that the record is of; None without a record."""
        runs = self.read("run")
        return runs[0]["run_id"] if runs else None

    def _write(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(map(_as_json, lines))
        write_atomic(self.path, lambda file: file.write(text.encode()))


def _as_json(line: dict[str, Any]) -> str:
    """One line of strict JSON: values that are not finite become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(line), allow_nan=False) + "\n"
