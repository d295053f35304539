"""
The k likeliest tokens of a teacher at every labelled position, in one file that is read through a memory map.

Shapes: R rows cached, P labelled positions in them, B rows in a batch, T labelled positions in the batch, k tokens per
position, V vocabulary.

The file is in the safetensors format:

```
row_ids    (R,)    I64         ascending
offsets    (R + 1,) I64        positions of row i: offsets[i] to offsets[i + 1]
indices    (P, k)  U16 or I32  token ids; U16 up to a vocabulary of 65,536
log_probs  (P, k)  F16         log softmax(logits / temperature) at those ids, in nats
```

Its metadata hold the [`TopKSpec`] and an xxh3 hash of all of it, so that a file that was cut off, damaged or made by
another teacher is refused.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import xxhash

from ..core.errors import invalid
from ..core.files import write_atomic


__all__ = ["TopKCache", "TopKSpec", "disk_bytes_per_position", "header_bytes", "link_or_copy"]

# To be raised whenever the layout of the file changes.
FORMAT = "hf_curriculum top-k cache 1"
_SAFETENSORS_NAMES = {"int64": "I64", "uint16": "U16", "int32": "I32", "float16": "F16"}
_NO_DIGEST = "0" * 32
_IDENTITY = "identity."
# Room for the metadata of any identity; the safetensors library itself refuses headers above 100 MB.
_MAX_HEADER_BYTES = 100_000_000
_DIGEST_BLOCK_BYTES = 2**24
_FIX = "Delete that file; it is written again from the teacher."


@dataclass(frozen=True)
class TopKSpec:
    """
    What a top-k cache holds, and of what.

    Args:
        k (`int`):
            Tokens kept per position, 1 or more; all of them where the vocabulary has fewer.
        temperature (`float`):
            Divisor of the teacher's logits, above 0.
        vocabulary (`int`):
            V, the number of logits.
        identity (`Mapping[str, object]`, *optional*, defaults to `{}`):
            JSON values, by the names that errors shall use, of all else that the contents depend on: fingerprint of
            the data set, hash of the plan, stage, fingerprint of the teacher.

    Raises:
        `ValueError`: for a value out of its range, or an identity that is not JSON.
    """

    k: int
    temperature: float
    vocabulary: int
    identity: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise invalid("k", self.k, "an integer of 1 or more")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise invalid("temperature", self.temperature, "a finite float above 0")
        if not 1 <= self.vocabulary <= np.iinfo(np.int32).max:
            raise invalid("vocabulary", self.vocabulary, "an integer in [1, 2^31 - 1]")
        try:
            json.dumps(dict(self.identity), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise invalid("identity", f"values that are not JSON ({error})", "JSON values by name") from None

    @property
    def columns(self) -> int:
        """Tokens kept per position: k, or V where that is less."""
        return min(self.k, self.vocabulary)

    @property
    def index_dtype(self) -> "np.dtype[Any]":
        """Type of a token id on disk: uint16 up to a vocabulary of 65,536, int32 above."""
        return np.dtype(np.uint16 if self.vocabulary <= 2**16 else np.int32)

    def described(self) -> dict[str, object]:
        """Every field by name, as JSON gives it back; the identity's names beside the others."""
        values = {
            "k": self.k,
            "temperature": float(self.temperature),
            "vocabulary": self.vocabulary,
            **{f"{_IDENTITY}{name}": value for name, value in self.identity.items()},
        }
        described: dict[str, object] = json.loads(json.dumps(values))
        return described


def disk_bytes_per_position(k: int, vocabulary: int) -> int:
    """
    Size of one labelled position in the file, beside which a row takes 16 bytes.

    Args:
        k (`int`):
            Tokens kept per position.
        vocabulary (`int`):
            V.

    Returns:
        `int`: bytes.

    Example:

    ```python
    >>> from hf_curriculum.distillation.cache import disk_bytes_per_position

    >>> disk_bytes_per_position(32, 50_000), disk_bytes_per_position(32, 152_000)
    (128, 192)
    ```
    """
    spec = TopKSpec(k, 1.0, vocabulary)
    return spec.columns * (spec.index_dtype.itemsize + np.dtype(np.float16).itemsize)


def _refuse(path: Path, got: str, expected: str = "the file as it was written") -> ValueError:
    return invalid("top-k cache", f"{got}, at {path}", expected, _FIX)


def header_bytes(spec: TopKSpec, num_rows: int, num_positions: int, digest: str = _NO_DIGEST) -> bytes:
    """
    The head of a cache file, which its contents determine to the byte.

    Args:
        spec ([`TopKSpec`]):
            What the file holds.
        num_rows (`int`):
            R.
        num_positions (`int`):
            P.
        digest (`str`, *optional*, defaults to 32 zeros):
            Hash of the file, itself made with zeros in this place.

    Returns:
        `bytes`: length in 8 bytes, then JSON, padded so that the tensors behind it are aligned.
    """
    metadata = {"format": FORMAT, "spec": json.dumps(spec.described(), sort_keys=True), "digest": digest}
    header: dict[str, object] = {"__metadata__": metadata}
    begin = 0
    for name, (dtype, shape) in _layout(spec, num_rows, num_positions).items():
        end = begin + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype.name], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _layout(spec: TopKSpec, num_rows: int, num_positions: int) -> dict[str, tuple["np.dtype[Any]", tuple[int, ...]]]:
    return {
        "row_ids": (np.dtype(np.int64), (num_rows,)),
        "offsets": (np.dtype(np.int64), (num_rows + 1,)),
        "indices": (spec.index_dtype, (num_positions, spec.columns)),
        "log_probs": (np.dtype(np.float16), (num_positions, spec.columns)),
    }


def _read_header(path: Path) -> tuple[TopKSpec, int, int, str, int]:
    """Spec, R, P, hash and length of the head, of a file that has the size it should."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            text = file.read(length) if length <= min(size, _MAX_HEADER_BYTES) else b""
    except FileNotFoundError:
        raise invalid("top-k cache", f"no file {path}", "a file written by `TopKWriter`") from None
    try:
        header = json.loads(text)
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise _refuse(path, f"the format {metadata['format']!r}", repr(FORMAT))
        described = json.loads(metadata["spec"])
        identity = {name.removeprefix(_IDENTITY): described[name] for name in described if name.startswith(_IDENTITY)}
        spec = TopKSpec(described["k"], described["temperature"], described["vocabulary"], identity)
        num_rows, num_positions = header["row_ids"]["shape"][0], header["indices"]["shape"][0]
        whole = prefix + text == header_bytes(spec, num_rows, num_positions, metadata["digest"])
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, IndexError, KeyError, TypeError):
        raise _refuse(path, "a file whose header cannot be read", "a top-k cache") from None
    if not whole:
        raise _refuse(path, "a header that contradicts itself")
    expected = 8 + length
    expected += sum(
        dtype.itemsize * math.prod(shape) for dtype, shape in _layout(spec, num_rows, num_positions).values()
    )
    if size != expected:
        raise _refuse(path, f"{size} bytes", f"the {expected} bytes of the whole file")
    return spec, num_rows, num_positions, metadata["digest"], 8 + length


class TopKCache:
    """
    A cache file, open for reading. Nothing but the rows asked for is read into memory.

    Args:
        path (`Path`):
            The file. Use [`TopKCache.open`], which checks what is in it.

    Attributes:
        spec ([`TopKSpec`]):
            What it holds.
        digest (`str`):
            xxh3 hash (128 bits, 32 hexadecimal digits) of all of the file's contents; equal for equal contents,
            whatever the number of processes that wrote it.
        num_rows (`int`):
            R.
        num_positions (`int`):
            P.
        num_bytes (`int`):
            Size of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec, self.num_rows, self.num_positions, self.digest, begin = _read_header(path)
        self.num_bytes = path.stat().st_size
        tensors = []
        for dtype, shape in _layout(self.spec, self.num_rows, self.num_positions).values():
            tensors.append(self._map(dtype, shape, begin))
            begin += dtype.itemsize * math.prod(shape)
        self._row_ids, self._offsets, self._indices, self._log_probs = tensors

    def _map(self, dtype: "np.dtype[Any]", shape: tuple[int, ...], begin: int) -> "np.ndarray[Any, Any]":
        if 0 in shape:
            return np.empty(shape, dtype)
        # As a plain array: `np.memmap` makes every slice an object of its own kind, which costs more than the slice.
        return np.asarray(np.memmap(self.path, dtype, "r", begin, shape))

    @classmethod
    def open(
        cls, path: str | Path, expected: TopKSpec, *, digest: str | None = None, verify: bool = True
    ) -> "TopKCache":
        """
        Opens a cache file if it is whole and holds what is expected.

        Args:
            path (`str` or `Path`):
                The file.
            expected ([`TopKSpec`]):
                What it must hold.
            digest (`str`, *optional*):
                The hash that the file must have, as a checkpoint recorded it.
            verify (`bool`, *optional*, defaults to `True`):
                Whether to read the whole file once and compare its hash. Its size and header are always checked.

        Returns:
            [`TopKCache`]

        Raises:
            `ValueError`: if the file is missing, cut off or damaged, or if its contents are of another data set, plan,
                teacher, temperature, k or vocabulary; the error names each difference.

        Example:

        ```python
        >>> from hf_curriculum.distillation.cache import TopKCache, TopKSpec

        >>> spec = TopKSpec(k=32, temperature=2.0, vocabulary=50_000, identity={"teacher": "a1b2", "stage": 1})
        >>> cache = TopKCache.open("teacher.safetensors", spec)  # doctest: +SKIP
        >>> indices, log_probs = cache.rows(batch["row_index"], batch["labels_per_row"])  # doctest: +SKIP
        ```
        """
        cache = cls(Path(path))
        found, wanted = cache.spec.described(), expected.described()
        if different := [
            f"{name.removeprefix(_IDENTITY)}: {found.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} here"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]:
            raise _refuse(cache.path, f"a cache of something else ({'; '.join(different)})", "one of this training")
        if digest is not None and digest != cache.digest:
            raise _refuse(cache.path, f"contents with hash {cache.digest}", f"the recorded hash {digest}")
        if verify:
            cache.verify()
        return cache

    def verify(self) -> None:
        """
        Reads the whole file once and compares its hash with the one in it.

        Raises:
            `ValueError`: if they differ.
        """
        digest = xxhash.xxh3_128()
        head = header_bytes(self.spec, self.num_rows, self.num_positions)
        digest.update(head)
        with open(self.path, "rb") as file:
            file.seek(len(head))
            for block in iter(lambda: file.read(_DIGEST_BLOCK_BYTES), b""):
                digest.update(block)
        if digest.hexdigest() != self.digest:
            raise _refuse(
                self.path, f"contents with hash {digest.hexdigest()}", f"the hash {self.digest} written there"
            )

    def rows(
        self,
        row_ids: "np.ndarray[Any, Any] | torch.Tensor",
        counts: "np.ndarray[Any, Any] | torch.Tensor",
        device: torch.device | str = "cpu",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Reads the teacher's tokens for the rows of a batch.

        Args:
            row_ids (`np.ndarray` or `torch.Tensor` of shape `(B,)`, int64):
                The rows; one may come more than once.
            counts (`np.ndarray` or `torch.Tensor` of shape `(B,)`, int64):
                Labelled positions of each, T in all.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
                Where the result shall be. It travels there in its narrow types.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: token ids of shape `(T, k)`, int64, and their log-probabilities of
            shape `(T, k)`, float32, in nats at the cache's temperature; row after row as in the batch, positions of a
            row from left to right. Each log-probability is within `2^-10 * |log p| + 6e-8` of the exact one, and the
            probabilities of a position sum to at most 1 but for float32 rounding.

        Raises:
            `ValueError`: if a row is not in the cache, or has another number of labelled positions there.
        """
        wanted = torch.as_tensor(row_ids).cpu().numpy()
        given = torch.as_tensor(counts).cpu().numpy()
        if wanted.shape != given.shape:
            raise invalid("counts", f"{given.shape} values", f"{wanted.shape}, one per row")
        slots = np.searchsorted(self._row_ids, wanted)
        known = slots < self.num_rows
        known[known] = self._row_ids[slots[known]] == wanted[known]
        if not known.all():
            raise _refuse(
                self.path,
                f"no entry for the rows {wanted[~known][:5].tolist()}",
                f"all of the batch's {len(wanted)} rows",
            )
        starts = self._offsets[slots]
        cached = self._offsets[slots + 1] - starts
        if not np.array_equal(cached, given):
            at = int(np.flatnonzero(cached != given)[0])
            raise _refuse(
                self.path,
                f"{cached[at]} labelled positions of row {wanted[at]}",
                f"{given[at]}, as many as the batch has",
            )
        ends = np.cumsum(given)
        at_positions = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - given), given)
        indices = torch.from_numpy(self._indices[at_positions]).to(device)
        log_probs = torch.from_numpy(self._log_probs[at_positions]).to(device)
        return indices.long(), log_probs.float()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """
    Puts a file in a second place, as a hard link where the file system can, else as a copy.

    It is there in full or not at all, in place of what was there. A cache file is never changed once it is written, so
    that both places may share its bytes.

    Args:
        source (`str` or `Path`):
            The file.
        target (`str` or `Path`):
            Its second path. The folder is made when missing.

    Raises:
        `OSError`: if the source is missing or the target cannot be written.
    """
    source, target = Path(source), Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        # Renaming one link of a file onto another does nothing, and would leave the temporary one behind.
        return
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without links; what else is wrong stops the copy too
        with open(source, "rb") as file:
            write_atomic(target, lambda copy: shutil.copyfileobj(file, copy, _DIGEST_BLOCK_BYTES))
    else:
        os.replace(temporary, target)
