"""
Writes a top-k cache from several processes: each spills what it has to a part of its own, rank 0 merges the parts.

```
<file>.parts/rank-00000/indices.bin     (P_r, k), in the order written
                        log_probs.bin   (P_r, k)
                        rows.npz        row ids and counts; written last: without it the part does not count
<file>                                  all parts, rows by ascending id
```

All processes must see one folder. While the parts are merged, the disk holds everything twice.
"""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from ..core.distributed import on_main_process, rank_and_world
from ..core.errors import invalid
from ..core.files import write_atomic
from .cache import TopKCache, TopKSpec, disk_bytes_per_position, header_bytes


__all__ = ["TopKPart", "TopKWriter", "merge_parts", "to_half"]

# What of one tensor is gathered at a time when parts are merged. Our choice: far above the size of a disk read.
_MERGE_BYTES = 2**25
_MERGE_POSITIONS = 2**20
_SHARED = "All processes must write to one folder that rank 0 can read."
_LOWEST_HALF = float(torch.finfo(torch.float16).min)
# Rounding of a float32 log-softmax; anything above is not a log-probability.
_MAX_LOG_PROB = 1e-3


def to_half(log_probs: torch.Tensor) -> torch.Tensor:
    """
    Rounds log-probabilities to float16 such that those of a position never sum to more than 1.

    They go to the nearest value (error at most `2^-11 * |log p| + 3e-8`), but downwards at the positions whose
    probabilities would sum to more than 1 otherwise (twice that), since no tail would be left there. What is below
    -65504, the lowest finite value, becomes that.

    Args:
        log_probs (`torch.Tensor` of shape `(T, k)`):
            Log-probabilities in nats.

    Returns:
        `torch.Tensor` of shape `(T, k)`, float16.

    Raises:
        `ValueError`: if one is NaN or above 0.
    """
    if not bool((log_probs <= _MAX_LOG_PROB).all()):
        raise invalid("log_probs", "a value that is NaN or above 0", "log-probabilities of the teacher")
    exact = log_probs.float().clamp(_LOWEST_HALF, 0.0)
    nearest = exact.half()
    over = nearest.float().exp().sum(dim=-1, keepdim=True) > 1
    # The bits of a float16 are sign and magnitude: one more is the next value further from 0, here downwards.
    below = (nearest.view(torch.int16) + 1).view(torch.float16)
    return torch.where(over & (nearest.float() > exact), below, nearest)


class TopKPart:
    """
    The rows that one process has written. Only row ids and counts stay in memory, 16 bytes per row.

    Args:
        folder (`Path`):
            Folder of this part; what is in it is removed.
        spec ([`~hf_curriculum.distillation.cache.TopKSpec`]):
            What is written.
    """

    def __init__(self, folder: Path, spec: TopKSpec) -> None:
        self.folder, self.spec = folder, spec
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._row_ids: list[np.ndarray[Any, Any]] = []
        self._counts: list[np.ndarray[Any, Any]] = []

    def append(
        self, row_ids: torch.Tensor, counts: torch.Tensor, indices: torch.Tensor, log_probs: torch.Tensor
    ) -> None:
        """
        Writes the rows of a batch. See [`TopKWriter.append`].

        Raises:
            `ValueError`: if shapes or values do not fit the spec or one another.
        """
        ids = row_ids.cpu().numpy().astype(np.int64)
        numbers = counts.cpu().numpy().astype(np.int64)
        shape = (int(numbers.sum()), self.spec.columns)
        if ids.shape != numbers.shape or ids.ndim != 1 or (ids < 0).any() or (numbers < 0).any():
            raise invalid("row_ids, counts", f"{ids.tolist()}, {numbers.tolist()}", "two lists as long, none negative")
        if tuple(indices.shape) != shape or tuple(log_probs.shape) != shape:
            got = f"shapes {tuple(indices.shape)} and {tuple(log_probs.shape)}"
            raise invalid("indices, log_probs", got, f"{shape}, (labelled positions, k)")
        if shape[0]:
            lowest, highest = (int(value) for value in torch.aminmax(indices))
            if lowest < 0 or highest >= self.spec.vocabulary:
                got = f"token ids from {lowest} to {highest}"
                raise invalid("indices", got, f"token ids in [0, {self.spec.vocabulary})")
            # Both before the first byte: a batch that is refused leaves nothing behind.
            narrow = indices.cpu().numpy().astype(self.spec.index_dtype)
            half = to_half(log_probs.detach()).cpu().numpy()
            self._spill("indices", narrow)
            self._spill("log_probs", half)
        self._row_ids.append(ids)
        self._counts.append(numbers)

    def _spill(self, name: str, values: "np.ndarray[Any, Any]") -> None:
        with open(self.folder / f"{name}.bin", "ab") as file:
            file.write(np.ascontiguousarray(values).data)

    def close(self) -> None:
        """
        Declares the part complete.

        Raises:
            `OSError`: if the disk is full.
        """
        none = np.empty(0, np.int64)
        row_ids, counts = np.concatenate([none, *self._row_ids]), np.concatenate([none, *self._counts])
        write_atomic(self.folder / "rows.npz", lambda file: np.savez(file, row_ids=row_ids, counts=counts))

    def discard(self) -> None:
        """Removes the part."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _Merged:
    """Rows of all parts: where each one's positions are. `part` and `start` have one entry per row, ids ascend."""

    row_ids: "np.ndarray[Any, Any]"
    counts: "np.ndarray[Any, Any]"
    part: "np.ndarray[Any, Any]"
    start: "np.ndarray[Any, Any]"
    offsets: "np.ndarray[Any, Any]"
    folders: Sequence[Path]
    num_positions: Sequence[int]

    def gather(self, name: str, dtype: "np.dtype[Any]", columns: int) -> "Iterator[np.ndarray[Any, Any]]":
        """Gives one tensor in pieces, positions in the order of the merged rows."""
        sources = []
        for folder, count in zip(self.folders, self.num_positions, strict=True):
            path, size = folder / f"{name}.bin", count * columns * dtype.itemsize
            if size and (not path.is_file() or path.stat().st_size != size):
                raise invalid(str(path), "a file that is missing or cut off", f"{size} bytes of this run", _SHARED)
            sources.append(np.asarray(np.memmap(path, dtype, "r", 0, (count, columns))) if size else None)
        first = 0
        while first < len(self.row_ids):
            limit = self.offsets[first] + min(_MERGE_POSITIONS, _MERGE_BYTES // (columns * dtype.itemsize))
            last = max(first + 1, int(np.searchsorted(self.offsets, limit, "right")) - 1)
            counts = self.counts[first:last]
            before = self.offsets[first:last] - self.offsets[first]
            positions = np.arange(counts.sum()) + np.repeat(self.start[first:last] - before, counts)
            parts = np.repeat(self.part[first:last], counts)
            piece = np.empty((len(positions), columns), dtype)
            for number, source in enumerate(sources):
                if source is not None:
                    here = np.flatnonzero(parts == number)
                    piece[here] = source[positions[here]]
            yield piece
            first = last


def _merge_rows(folders: Sequence[Path]) -> _Merged:
    """Sorts the rows of all parts; of a row that came more than once, the first one of the lowest rank is kept."""
    row_ids, counts = [], []
    for folder in folders:
        try:
            with np.load(folder / "rows.npz", allow_pickle=False) as rows:
                row_ids.append(rows["row_ids"])
                counts.append(rows["counts"])
        except FileNotFoundError:
            raise invalid("top-k cache", f"no complete part {folder}", f"{len(folders)} parts", _SHARED) from None
    all_ids, all_counts = np.concatenate(row_ids), np.concatenate(counts)
    starts = np.concatenate([np.cumsum(part) - part for part in counts])
    parts = np.repeat(np.arange(len(folders)), [len(part) for part in row_ids])
    order = np.argsort(all_ids, kind="stable")
    again = np.zeros(len(order), bool)
    again[1:] = all_ids[order][1:] == all_ids[order][:-1]
    other = np.flatnonzero(again[1:] & (all_counts[order][1:] != all_counts[order][:-1]))
    if len(other):
        at = order[other[0] : other[0] + 2]
        got = f"{all_counts[at[0]]} and {all_counts[at[1]]} labelled positions of row {all_ids[at[0]]}"
        raise invalid("top-k cache", got, "the same number each time that a row is written")
    kept = order[~again]
    return _Merged(
        row_ids=all_ids[kept],
        counts=all_counts[kept],
        part=parts[kept],
        start=starts[kept],
        offsets=np.concatenate([[0], np.cumsum(all_counts[kept])]).astype(np.int64),
        folders=folders,
        num_positions=[int(part.sum()) for part in counts],
    )


def merge_parts(folders: Sequence[Path], path: Path, spec: TopKSpec) -> None:
    """
    Makes one cache file of the parts of all processes, in bounded memory.

    Args:
        folders (`Sequence[Path]`):
            The parts, in the order of the ranks.
        path (`Path`):
            The file to write.
        spec ([`~hf_curriculum.distillation.cache.TopKSpec`]):
            What the parts hold.

    Raises:
        `ValueError`: if a part is missing or not complete, or if the parts contradict one another.
        `OSError`: if the disk is full; no file is left behind then.
    """
    merged = _merge_rows(folders)

    def write(file: BinaryIO) -> None:
        digest = xxhash.xxh3_128()
        size = len(merged.row_ids), int(merged.offsets[-1])

        def put(values: "np.ndarray[Any, Any]") -> None:
            data = np.ascontiguousarray(values).data
            digest.update(data)
            file.write(data)

        put(np.frombuffer(header_bytes(spec, *size), np.uint8))
        put(merged.row_ids)
        put(merged.offsets)
        for name, dtype in (("indices", spec.index_dtype), ("log_probs", np.dtype(np.float16))):
            for piece in merged.gather(name, dtype, spec.columns):
                put(piece)
        # The hash is known last but stands first; it has the same length as the zeros it replaces.
        file.seek(0)
        file.write(header_bytes(spec, *size, digest.hexdigest()))

    write_atomic(path, write)


class TopKWriter:
    """
    Writes a cache file, together with the other processes. Building it, and [`finish`], are collective.

    Rows may come in any order, from any process, and more than once (Accelerate repeats rows at the end of an epoch).
    The file is the same whatever the order and the number of processes, if a row's values are. Until [`finish`] there
    is no file, or the earlier one; what a killed run left is removed when the next writer is built.

    Args:
        path (`str` or `Path`):
            The file to be written. All processes must see its folder.
        spec ([`~hf_curriculum.distillation.cache.TopKSpec`]):
            What will be written.
        num_positions (`int`, *optional*, defaults to `0`):
            Labelled positions to come, of all processes together; too little free space for them is an error now.

    Raises:
        `OSError`: if the folder cannot be written or is too full.

    Example:

    ```python
    >>> with TopKWriter("teacher.safetensors", spec) as writer:  # doctest: +SKIP
    ...     for batch in loader:
    ...         top = log_probs_of_teacher(batch).topk(spec.columns)
    ...         writer.append(batch["row_index"], batch["labels_per_row"], top.indices, top.values)
    ...     cache = writer.finish()
    ```
    """

    def __init__(self, path: str | Path, spec: TopKSpec, num_positions: int = 0) -> None:
        self.path, self.spec = Path(path), spec
        self._folder = self.path.with_name(f"{self.path.name}.parts")
        self._rank, self._world = rank_and_world()
        on_main_process(lambda: self._make_room(num_positions))
        self._part = TopKPart(self._part_folder(self._rank), spec)

    def _make_room(self, num_positions: int) -> None:
        # All parts, before any is begun: of a rank that writes elsewhere now, an old part would be taken for its own.
        shutil.rmtree(self._folder, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        needed = 2 * num_positions * disk_bytes_per_position(self.spec.k, self.spec.vocabulary)
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"Too little space for a top-k cache in {self.path.parent}: {needed / 1e9:.1f} GB are needed while it "
                f"is written, half of that afterwards, {free / 1e9:.1f} GB are free. Lower k, or free some",
            )

    def _part_folder(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}"

    def append(
        self, row_ids: torch.Tensor, counts: torch.Tensor, indices: torch.Tensor, log_probs: torch.Tensor
    ) -> None:
        """
        Writes the rows of a batch to disk. Not collective.

        Args:
            row_ids (`torch.Tensor` of shape `(B,)`, int64):
                Ids of the rows, 0 or more.
            counts (`torch.Tensor` of shape `(B,)`, int64):
                Labelled positions of each, T in all; 0 is allowed.
            indices (`torch.Tensor` of shape `(T, k)`, int64):
                The likeliest token ids at each position, row after row; k is the spec's `columns`.
            log_probs (`torch.Tensor` of shape `(T, k)`):
                Log-probabilities of them, in nats at the spec's temperature, on any device.

        Raises:
            `ValueError`: if shapes or values do not fit the spec or one another.
            `OSError`: if the disk is full.
        """
        self._part.append(row_ids, counts, indices, log_probs)

    def finish(self) -> TopKCache:
        """
        Merges what all processes wrote. Collective.

        Returns:
            [`~hf_curriculum.distillation.cache.TopKCache`]: the file, open for reading, on every rank.

        Raises:
            `ValueError`: if rank 0 does not see the parts of all processes, or if they contradict one another.
            `OSError`: if the disk is full. On the other ranks errors of rank 0 are a `RuntimeError`.
        """
        failure: OSError | None = None
        try:
            self._part.close()
        except OSError as error:  # raised below, once no rank waits for this one any more
            failure = error
        failures = [None if failure is None else f"{failure}"]
        if self._world > 1:
            gathered: list[list[str | None]] = [[None]] * self._world
            dist.all_gather_object(gathered, failures)
            failures = [told for part in gathered for told in part]
        if failure is not None:
            raise failure
        if told := [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text is not None]:
            raise RuntimeError(f"The top-k cache could not be written on {'; '.join(told)}")
        folders = [self._part_folder(rank) for rank in range(self._world)]
        on_main_process(lambda: self._merge(folders))
        return TopKCache.open(self.path, self.spec, verify=False)

    def _merge(self, folders: Sequence[Path]) -> None:
        merge_parts(folders, self.path, self.spec)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "TopKWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._part.discard()
        if self._rank == 0:
            # The other ranks must not: this one may already be making the folder for the next file.
            with suppress(OSError):
                self._folder.rmdir()
