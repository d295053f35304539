"""
Our own state in each checkpoint, and which checkpoints are whole.

The Trainer writes a checkpoint file by file: model first, `trainer_state.json` last. A run killed in between leaves a
folder that looks like a checkpoint. So a manifest with the size of every file is written just before
`trainer_state.json`, when all ranks are done; a checkpoint is complete when the manifest's files are there in full,
our state has its hash, and `trainer_state.json` can be read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .errors import invalid
from .files import write_atomic


__all__ = [
    "MANIFEST_NAME",
    "STATE_NAME",
    "check_same",
    "incompleteness",
    "invalidate_checkpoint",
    "list_checkpoints",
    "read_checkpoint_state",
    "write_checkpoint_state",
    "write_manifest",
]

STATE_NAME = "hf_curriculum_state.json"
MANIFEST_NAME = "hf_curriculum_manifest.json"


def _write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, sort_keys=True)
    write_atomic(path, lambda file: file.write(text.encode()))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """
    Checkpoint folders of a run, complete or not.

    Args:
        output_dir (`str` or `Path`):
            The run's folder; it may be missing.

    Returns:
        `list[Path]`: the folders `checkpoint-<step>`, highest step first.
    """
    folders = [
        path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def invalidate_checkpoint(folder: str | Path) -> None:
    """
    Marks a checkpoint folder as incomplete before it is written again, so that a kill cannot leave a mix that passes.

    Args:
        folder (`str` or `Path`):
            The checkpoint folder; it may be missing.
    """
    for name in (MANIFEST_NAME, TRAINER_STATE_NAME):
        (Path(folder) / name).unlink(missing_ok=True)


def write_checkpoint_state(folder: str | Path, state: dict[str, Any]) -> None:
    """
    Writes our state into a checkpoint folder.

    Args:
        folder (`str` or `Path`):
            The checkpoint folder.
        state (`dict[str, Any]`):
            JSON values, one key per method.
    """
    _write_json(Path(folder) / STATE_NAME, {"sha256": _digest(state), "state": state})


def write_manifest(folder: str | Path) -> None:
    """
    Closes a checkpoint: records the size of every file in it. Call when every rank has written its files.

    Args:
        folder (`str` or `Path`):
            The checkpoint folder.
    """
    folder = Path(folder)
    ours = {MANIFEST_NAME, TRAINER_STATE_NAME}
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in ours
    }
    _write_json(folder / MANIFEST_NAME, {"files": files})


def incompleteness(folder: str | Path) -> str | None:
    """
    Says what is missing from a checkpoint.

    Args:
        folder (`str` or `Path`):
            The checkpoint folder.

    Returns:
        `str`, *optional*: the first thing missing or broken, in a few words; None when the checkpoint is complete.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing: not written to the end, or with `save_only_model`, or by something else"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_NAME} cannot be read"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut off"
    try:
        read_checkpoint_state(folder)
    except ValueError as error:
        return str(error)
    return None


def read_checkpoint_state(folder: str | Path) -> dict[str, Any]:
    """
    Reads back what [`write_checkpoint_state`] wrote.

    Args:
        folder (`str` or `Path`):
            The checkpoint folder.

    Returns:
        `dict[str, Any]`: the state.

    Raises:
        `ValueError`: if the file is missing, cannot be parsed or does not have its recorded hash.
    """
    path = Path(folder) / STATE_NAME
    fix = "Resume from another checkpoint of this package."
    try:
        sealed = json.loads(path.read_text())
        state, expected = sealed["state"], sealed["sha256"]
    except FileNotFoundError:
        raise invalid("resume_from_checkpoint", str(folder), f"a folder with {STATE_NAME}", fix) from None
    except (ValueError, KeyError, TypeError):
        raise invalid(str(path), "a file that cannot be parsed", "our state as JSON", fix) from None
    if _digest(state) != expected:
        raise invalid(str(path), f"contents with hash {_digest(state)}", f"the recorded hash {expected}", fix)
    return dict(state)


def check_same(
    what: str, saved: Mapping[str, object], ours: Mapping[str, object], expected: str, fix: str = ""
) -> None:
    """
    Refuses to resume from a checkpoint of another run than this trainer would make.

    Args:
        what (`str`):
            What the values describe, in a word.
        saved (`Mapping[str, object]`):
            JSON values by name, as the checkpoint has them.
        ours (`Mapping[str, object]`):
            The same of this trainer.
        expected (`str`):
            What a resumed run needs.
        fix (`str`, *optional*):
            What to do, as a sentence.

    Raises:
        `ValueError`: naming each difference.
    """
    if different := [
        f"{name}: {saved.get(name)} there, {ours.get(name)} here"
        for name in dict.fromkeys([*ours, *saved])
        if saved.get(name) != ours.get(name)
    ]:
        raise invalid(
            "resume_from_checkpoint", f"a checkpoint of another {what} ({'; '.join(different)})", expected, fix
        )
