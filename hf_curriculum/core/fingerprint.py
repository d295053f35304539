"""Hashes of data by value."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset


__all__ = ["fingerprint_rows", "update_with_rows"]


def update_with_rows(digest: "xxhash.xxh3_128", rows: Dataset) -> None:
    """
    Adds the values of rows to a hash, whatever the memory layout of their table.

    Args:
        digest (`xxhash.xxh3_128`):
            The hash.
        rows ([`~datasets.Dataset`]):
            The rows, with all their columns.
    """
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        for name in sorted(table.column_names):
            digest.update(name.encode())
            _update(digest, pa.concat_arrays(table.column(name).chunks))


def fingerprint_rows(rows: Dataset) -> str:
    """
    Hashes the values of rows.

    Args:
        rows ([`~datasets.Dataset`]):
            The rows, with all their columns.

    Returns:
        `str`: 32 hexadecimal digits (xxh3, 128 bits).
    """
    digest = xxhash.xxh3_128(np.int64(len(rows)).tobytes())
    update_with_rows(digest, rows)
    return digest.hexdigest()


def _update(digest: "xxhash.xxh3_128", array: pa.Array) -> None:
    """Adds an Arrow array by value: its buffers differ between a slice and a copy of the same values."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(pc.list_value_length(array).to_numpy(zero_copy_only=False).tobytes())
        _update(digest, array.flatten())
    elif pa.types.is_primitive(array.type) and array.null_count == 0:
        digest.update(array.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())
