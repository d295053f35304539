"""What commands take: Hub ids and folders."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..core.errors import invalid


__all__ = ["check_names"]


def check_names(options: argparse.Namespace, *arguments: str) -> None:
    """
    Refuses paths that do not exist.

    Args:
        options (`argparse.Namespace`):
            The command's.
        *arguments (`str`):
            Names of those that are a folder or a Hub id.

    Raises:
        `ValueError`: for a path that is no folder.
    """
    for argument in arguments:
        name = getattr(options, argument)
        if name is not None and name.startswith((".", "/", "~")) and not os.path.isdir(name):
            raise invalid(argument, name, "a folder that exists, or a Hub id", f"Looked in {Path.cwd()}.")
