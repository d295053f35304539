"""Files that are there in full or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


__all__ = ["write_atomic"]


def write_atomic(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """
    Writes a file so that it is there in full or not at all.

    Args:
        path (`str` or `Path`):
            The file. Its folder is made when missing.
        write (`Callable`):
            Gets the open temporary file, on the same file system, and writes the contents.

    Raises:
        `OSError`: if the folder cannot be written or the disk is full; nothing is left behind then.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
