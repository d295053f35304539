"""
The command line: `hf-curriculum attention`, `hf-curriculum export` and `hf-curriculum layers`.

Each subcommand is a module of `commands/`, which imports libraries that take seconds to import when it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from .commands import attention, export, layers


__all__ = ["main"]

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Words of the command line. Defaults to those of the process.

    Returns:
        `int`: 0 if it worked, 1 for bad input, which is told in one line on the error stream.
    """
    parser = argparse.ArgumentParser(
        prog="hf-curriculum", description="Order, memory, place and sharing for the Hugging Face Trainer."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hf_curriculum')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (attention, export, layers):
        command.add(subparsers)
    options = parser.parse_args(arguments)
    run: Command = options.run
    try:
        run(options)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        # What a user got wrong, in the words of the place that found it; anything else is a fault of ours.
        sys.stderr.write(f"hf-curriculum {options.command}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
