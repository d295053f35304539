"""
How often each task is drawn and how tasks share batches: the order of a run as a sampler of row indices.

Shapes: N rows of the data set, P draws of the run, T tasks that have rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..core.errors import invalid
from ..core.order import draw_order, mix_streams
from ..core.sampler import RunSampler


__all__ = ["BATCH_KINDS", "SAMPLINGS", "MultiTaskSampler", "apportion", "sampling_shares", "task_order"]

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]

SAMPLINGS = ("proportional", "temperature", "uniform", "round_robin")
BATCH_KINDS = ("mixed", "homogeneous", "homogeneous_step")

# What a seeded order is for, second in its key, apart from the numbers that the curriculum's plan uses.
_ROWS, _MIX = 32, 33


def sampling_shares(counts: Sequence[int] | IntArray, sampling: str, temperature: float = 2.0) -> FloatArray:
    r"""
    Share of the draws that each task gets.

    With `n_t` rows in task t: `n_t / N` for `"proportional"`; `n_t^(1/tau) / sum_k n_k^(1/tau)` for `"temperature"`
    (Arivazhagan et al. 2019, arXiv 1907.05019, section 4.1; T5, arXiv 1910.10683, section 3.5.2), which is
    proportional at `tau = 1` and uniform as `tau` grows; `1/T` for `"uniform"` and `"round_robin"`.

    Args:
        counts (`Sequence[int]` of length T):
            Rows of each task, at least 1.
        sampling (`str`):
            One of `SAMPLINGS`.
        temperature (`float`, *optional*, defaults to `2.0`):
            tau, at least 1; read by `"temperature"` alone. The default is the one that served T5 best among those it
            tried.

    Returns:
        `np.ndarray` of shape `(T,)`, float64: positive, with sum 1.

    Raises:
        `ValueError`: for a task without rows, an unknown sampling or a temperature below 1.

    Example:

    ```python
    >>> from hf_curriculum.multitask.sampler import sampling_shares

    >>> sampling_shares([900, 100], "temperature").tolist()
    [0.75, 0.25]
    ```
    """
    sizes = np.asarray(counts, dtype=np.float64)
    if sizes.ndim != 1 or len(sizes) == 0 or sizes.min() < 1:
        raise invalid("counts", list(counts), "at least one task, and at least one row in each")
    if sampling not in SAMPLINGS:
        raise invalid("sampling", sampling, f"one of {', '.join(SAMPLINGS)}")
    if not 1 <= temperature < float("inf"):
        raise invalid("temperature", temperature, "a float >= 1")
    exponent = {"proportional": 1.0, "temperature": 1.0 / temperature}.get(sampling, 0.0)
    # Relative to the largest task, or a power of a small share could round to nothing.
    weights = (sizes / sizes.max()) ** exponent
    shares: FloatArray = weights / weights.sum()
    return shares


def apportion(total: int, shares: Sequence[float] | FloatArray) -> IntArray:
    """
    Splits a number into whole parts by largest remainder, leaving none without one.

    Args:
        total (`int`):
            What is split, at least T.
        shares (`Sequence[float]` of length T):
            Positive, with sum 1.

    Returns:
        `np.ndarray` of shape `(T,)`, int64: at least 1 each, with sum `total`. Where no part had to be raised to 1,
        each is within 1 of its exact share. Equal remainders favour the earlier part.

    Raises:
        `ValueError`: if there is less than one for each.

    Example:

    ```python
    >>> from hf_curriculum.multitask.sampler import apportion

    >>> apportion(10, [0.55, 0.44, 0.01]).tolist()
    [5, 4, 1]
    ```
    """
    quota = total * np.asarray(shares, dtype=np.float64)
    if total < len(quota):
        raise invalid("total", total, f"at least {len(quota)}, one for each task")
    parts = np.maximum(1, np.floor(quota)).astype(np.int64)
    while parts.sum() < total:
        parts[np.argmax(quota - parts)] += 1
    while parts.sum() > total:
        parts[np.argmax(np.where(parts > 1, parts - quota, -np.inf))] -= 1
    return parts


def task_order(
    task_ids: Sequence[int] | IntArray,
    num_draws: int,
    *,
    sampling: str = "proportional",
    temperature: float = 2.0,
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[IntArray, IntArray]:
    """
    Orders all draws of a run.

    Each task's rows come without replacement inside each pass over the task. Tasks take their turns in units of
    `batch_size` draws: at random (every interleaving of the units being equally likely), or one after another in the
    order of their ids (`"round_robin"`).

    Args:
        task_ids (`Sequence[int]` of length N):
            Task of each row, any integers.
        num_draws (`int`):
            P, a multiple of `batch_size`.
        sampling (`str`, *optional*, defaults to `"proportional"`):
            One of `SAMPLINGS`.
        temperature (`float`, *optional*, defaults to `2.0`):
            As in [`sampling_shares`].
        batch_size (`int`, *optional*, defaults to `1`):
            Consecutive draws that are of one task, at least 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all orders.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: rows in training order, `(P,)`, int64; draws of each task in the order of the
        sorted ids, `(T,)`, int64.

    Raises:
        `ValueError`: for no rows, or fewer units than tasks.

    Example:

    ```python
    >>> from hf_curriculum.multitask.sampler import task_order

    >>> rows, counts = task_order([0, 0, 0, 1], 4, sampling="round_robin")
    >>> [int(row == 3) for row in rows], counts.tolist()
    ([0, 1, 0, 1], [2, 2])
    ```
    """
    ids = _checked_ids(task_ids)
    present, inverse, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    if batch_size < 1 or num_draws % batch_size:
        raise invalid("num_draws", num_draws, f"a multiple of the batch size {batch_size}")
    num_units = num_draws // batch_size
    if num_units < len(present):
        raise invalid(
            "num_draws",
            f"{num_units} batches of {batch_size} rows for {len(present)} tasks",
            "at least one batch for each task",
            "Train for more steps, or use "
            + ("larger batches." if batch_size == 1 else "smaller batches, or `batches='mixed'`."),
        )
    units = apportion(num_units, sampling_shares(sizes, sampling, temperature))
    if sampling == "round_robin":
        turns = np.resize(np.arange(len(present)), num_units).astype(np.int16)
        units = np.bincount(turns, minlength=len(present))
    else:
        streams = [np.zeros(count, dtype=np.int64) for count in units]
        turns = mix_streams(streams, seed, _MIX)[1]
    rows = np.empty((num_units, batch_size), dtype=np.int64)
    for position, count in enumerate(units):
        members = np.flatnonzero(inverse == position)
        drawn = draw_order(len(members), int(count) * batch_size, seed, _ROWS, int(present[position]))
        rows[turns == position] = members[drawn].reshape(-1, batch_size)
    return rows.reshape(-1), units * batch_size


class MultiTaskSampler(RunSampler):
    """
    Yields the rows of several tasks in an order fixed for the whole run, for any `DataLoader`.

    An index sampler without state: every pass, on every rank, yields the whole run from the start, and no global
    random state is read or moved. Processes share it by batches (as Accelerate's `BatchSamplerShard` does), so a
    resumed run skips the rows already seen. One epoch of the Trainer is the whole run: `num_train_epochs` is its
    length as a multiple of the data set, and under `"proportional"` sampling in mixed batches how often each row is
    seen (the last global batch is completed with a few rows more).

    - `"mixed"`: every row of a batch may be of another task. The order is the same for every split of the global
      batch over processes and accumulation.
    - `"homogeneous"`: all rows of a *micro-batch* (one forward on one process) are of one task; an optimizer step
      holds as many micro-batches as processes x accumulation, of any tasks.
    - `"homogeneous_step"`: all rows of a *global batch* (one optimizer step, over all processes) are of one task.

    Homogeneous batches meet the tasks' shares to within one batch, and a task with fewer rows than a batch repeats
    rows inside it.

    Args:
        task_ids (`Sequence[int]` or `np.ndarray` of shape `(N,)`):
            Task of each row, any integers.
        global_batch_size (`int`):
            Rows in one optimizer step: per-device batch x processes x accumulation.
        num_train_epochs (`float`, *optional*, defaults to `1.0`):
            Draws of the run as a multiple of N, completed to a full global batch.
        max_steps (`int`, *optional*, defaults to `-1`):
            If positive, the number of optimizer steps, whatever `num_train_epochs` says.
        sampling (`str`, *optional*, defaults to `"proportional"`):
            Share of each task: `"proportional"` to its rows, to a root of them (`"temperature"`), `"uniform"`, or
            `"round_robin"` (uniform, in turns). See [`sampling_shares`].
        temperature (`float`, *optional*, defaults to `2.0`):
            For `"temperature"`, at least 1.
        batches (`str`, *optional*, defaults to `"mixed"`):
            One of `BATCH_KINDS`.
        micro_batch_size (`int`, *optional*):
            Rows in one forward on one process, for `"homogeneous"`: a divisor of `global_batch_size`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all orders.

    Attributes:
        indices (`np.ndarray` of shape `(P,)`, int64):
            Rows in training order.
        num_steps (`int`):
            Optimizer steps of the run, `P / global_batch_size`.
        draws (`dict[int, int]`):
            Draws of each task.

    Raises:
        `ValueError`: for arguments out of range or not matching, or a run too short for its tasks.

    Example:

    ```python
    >>> from torch.utils.data import DataLoader
    >>> from hf_curriculum.multitask.sampler import MultiTaskSampler

    >>> rows = ["a1", "a2", "a3", "a4", "b1", "b2"]
    >>> sampler = MultiTaskSampler([0, 0, 0, 0, 1, 1], global_batch_size=2, batches="homogeneous_step")
    >>> sorted("".join(sorted(row[0] for row in batch)) for batch in DataLoader(rows, batch_size=2, sampler=sampler))
    ['aa', 'aa', 'bb']
    ```
    """

    def __init__(
        self,
        task_ids: Sequence[int] | IntArray,
        *,
        global_batch_size: int,
        num_train_epochs: float = 1.0,
        max_steps: int = -1,
        sampling: str = "proportional",
        temperature: float = 2.0,
        batches: str = "mixed",
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        ids = _checked_ids(task_ids)
        unit = _checked_unit(batches, global_batch_size, micro_batch_size)
        for name, value, valid, expected in (
            ("num_train_epochs", num_train_epochs, 0 < num_train_epochs < float("inf"), "a float > 0"),
            ("max_steps", max_steps, max_steps > 0 or max_steps == -1, "an integer >= 1, or -1 for whole epochs"),
        ):
            if not valid:
                raise invalid(name, value, expected)
        self.global_batch_size = global_batch_size
        self.num_rows = len(ids)
        self.num_train_epochs = num_train_epochs
        epoch_steps = max(1, -(-round(num_train_epochs * len(ids)) // global_batch_size))
        self.num_steps = max_steps if max_steps > 0 else epoch_steps
        indices, counts = task_order(
            ids,
            self.num_steps * global_batch_size,
            sampling=sampling,
            temperature=temperature,
            batch_size=unit,
            seed=seed,
        )
        indices.setflags(write=False)
        super().__init__(indices)
        self.draws = {int(task): int(count) for task, count in zip(np.unique(ids), counts, strict=True)}

    @property
    def hash(self) -> str:
        """SHA-256 over the order, the global batch size and the number of rows, in hexadecimal."""
        digest = hashlib.sha256(f"{self.global_batch_size},{self.num_rows},".encode())
        digest.update(np.ascontiguousarray(self.indices, dtype="<i8").data)
        return digest.hexdigest()


def _checked_ids(task_ids: Sequence[int] | IntArray) -> IntArray:
    ids = np.asarray(task_ids)
    if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
        got = "no rows" if ids.size == 0 else f"an array of shape {ids.shape} and dtype {ids.dtype}"
        raise invalid("task_ids", got, "one integer for each row, and at least one row")
    return ids.astype(np.int64, copy=False)


def _checked_unit(batches: str, global_batch_size: int, micro_batch_size: int | None) -> int:
    """Consecutive draws of one task."""
    if batches not in BATCH_KINDS:
        raise invalid("batches", batches, f"one of {', '.join(BATCH_KINDS)}")
    if global_batch_size < 1:
        raise invalid("global_batch_size", global_batch_size, "an integer >= 1")
    if batches == "homogeneous":
        if micro_batch_size is None or micro_batch_size < 1 or global_batch_size % micro_batch_size:
            raise invalid(
                "micro_batch_size", micro_batch_size, f"a divisor of the global batch size {global_batch_size}"
            )
        return micro_batch_size
    if micro_batch_size is not None:
        raise invalid("micro_batch_size", micro_batch_size, "None unless `batches='homogeneous'`, which reads it")
    return 1 if batches == "mixed" else global_batch_size
