"""
Four generated tasks, two of them related: the data of the multi-task demo.

| task | prompt | completion | what it shares |
|---|---|---|---|
| `reverse` | `Reverse: Ada Ben Cleo` | `Cleo Ben Ada` | the order of a list of names, with `last` |
| `last` | `Last: Ada Ben Cleo` | `Cleo` | the order of a list of names, with `reverse` |
| `kind` | `Kind: coins pens` | `things` | the names, but not their order |
| `parity` | `Parity: 47` | `1` | nothing: it reads a digit |

`reverse` is text to text; the others have labels as well, so they are text to text and classification. `copy` rows,
the same lists repeated, are what a base model is given before it meets the tasks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from ..core.errors import invalid
from .corpus import NAMES, NOUNS, check_draw


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["LABEL_TASKS", "TASKS", "generate_copies", "generate_tasks", "guess_losses"]

TASKS = ("reverse", "last", "kind", "parity")
LABEL_TASKS = ("last", "kind", "parity")

# Items of a list, both ends included.
LIST_LENGTH = (2, 4)


def generate_tasks(num_rows: int, seed: int = 0, tasks: tuple[str, ...] = TASKS) -> Dataset:
    """
    Generates rows of several tasks, in turns.

    The rows of a shorter set are the first rows of a longer one of the same seed.

    Args:
        num_rows (`int`):
            Number of rows, at least 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator, at least 0.
        tasks (`tuple[str, ...]`, *optional*):
            Which of `TASKS`. Defaults to all four.

    Returns:
        `datasets.Dataset`: columns `prompt` and `completion` (`str`), `task` (`str`) and `label` (`str`; None for
        `reverse`): the completion where it is one of a few.

    Raises:
        `ValueError`: for a `num_rows` below 1, a negative `seed`, or an unknown task.

    Example:

    ```python
    >>> from hf_curriculum.demo.tasks import generate_tasks

    >>> generate_tasks(4)["task"][:]
    ['reverse', 'last', 'kind', 'parity']
    ```
    """
    check_draw(num_rows, seed)
    if not tasks or (unknown := [task for task in tasks if task not in TASKS]):
        raise invalid("tasks", unknown if tasks else tasks, f"some of {', '.join(TASKS)}")
    # A string seeds the generator by its digest, the same on every platform and version.
    generator = random.Random(f"tasks {seed}")
    rows = [_row(tasks[index % len(tasks)], generator) for index in range(num_rows)]
    return _as_dataset(rows, ("prompt", "completion", "task", "label"))


def generate_copies(num_rows: int, seed: int = 0) -> Dataset:
    """
    Generates lists of names, nouns and numbers to be repeated: a base model for the tasks, without any of them.

    Args:
        num_rows (`int`):
            Number of rows, at least 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator, at least 0.

    Returns:
        `datasets.Dataset`: columns `prompt` and `completion` (`str`).

    Raises:
        `ValueError`: for a `num_rows` below 1 or a negative `seed`.
    """
    check_draw(num_rows, seed)
    generator = random.Random(f"copies {seed}")
    rows = []
    for _ in range(num_rows):
        length = generator.randint(2, 6)
        items = [generator.choice((*NAMES, *NOUNS, str(generator.randint(10, 99)))) for _ in range(length)]
        rows.append(("Copy: " + " ".join(items), " ".join(items)))
    return _as_dataset(rows, ("prompt", "completion"))


def guess_losses(labels: Iterable[Sequence[int]], tasks: Iterable[str]) -> dict[str, float]:
    """
    Loss of a guess among the answers of each task: what a model has that knows them all, but cannot tell which.

    Args:
        labels (`Iterable[Sequence[int]]` of length N):
            Labels of each row by token, -100 where there is none.
        tasks (`Iterable[str]` of length N):
            Task of each row.

    Returns:
        `dict[str, float]`: by task, the logarithm of the number of different answers divided by the mean number of
        their tokens, in nats per labelled token.

    Example:

    ```python
    >>> from hf_curriculum.demo.tasks import guess_losses

    >>> round(guess_losses([[-100, 7, 1], [-100, 8, 1]], ["parity"] * 2)["parity"], 4)
    0.3466
    ```
    """
    answers: dict[str, list[tuple[int, ...]]] = {}
    for row, task in zip(labels, tasks, strict=True):
        answers.setdefault(task, []).append(tuple(label for label in row if label != -100))
    return {task: math.log(len(set(rows))) * len(rows) / sum(map(len, rows)) for task, rows in answers.items()}


def _as_dataset(rows: Sequence[tuple[str | None, ...]], columns: tuple[str, ...]) -> Dataset:
    from datasets import Dataset, Features, Value

    values = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
    return Dataset.from_dict(values, features=Features(dict.fromkeys(columns, Value("string"))))


def _row(task: str, generator: random.Random) -> tuple[str | None, ...]:
    prompt, completion = _MAKERS[task](generator)
    return prompt, completion, task, completion if task in LABEL_TASKS else None


def _names(generator: random.Random) -> list[str]:
    return generator.sample(NAMES, generator.randint(*LIST_LENGTH))


def _reverse(generator: random.Random) -> tuple[str, str]:
    names = _names(generator)
    return "Reverse: " + " ".join(names), " ".join(names[::-1])


def _last(generator: random.Random) -> tuple[str, str]:
    names = _names(generator)
    return "Last: " + " ".join(names), names[-1]


def _kind(generator: random.Random) -> tuple[str, str]:
    kind, words = generator.choice((("names", NAMES), ("things", NOUNS)))
    return "Kind: " + " ".join(generator.sample(words, generator.randint(*LIST_LENGTH))), kind


def _parity(generator: random.Random) -> tuple[str, str]:
    number = generator.randint(10, 99)
    return f"Parity: {number}", str(number % 2)


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": _reverse,
    "last": _last,
    "kind": _kind,
    "parity": _parity,
}
