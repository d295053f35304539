"""
Pooled outputs of finished task models, computed once, for a fusion that trains on them.

Shapes: N rows, T tasks, H hidden size.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from datasets import Dataset

from ...core.console import say
from ...core.distributed import is_main_process, on_main_process, rank_and_world
from ...core.errors import invalid, unsupported
from ...core.files import write_atomic
from ...core.fingerprint import update_with_rows
from ...core.layouts import layout_of
from ...core.modes import evaluation_mode
from ..collator import plain_value
from .model import AttentionFusionModel
from .task_loras import task_lora_layers


__all__ = ["CachedFeatures", "FeatureCollator", "cache_features", "in_batches", "models_fingerprint"]

FORMAT = 2
COLUMN = "pooled"
VECTORS_NAME = "pooled.npy"
COMPLETE_NAME = "complete.json"
# Of a base's config, what says nothing about its hidden states; a Trainer sets some of these.
NOT_COMPUTED = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "use_return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "num_labels", "problem_type"),
)
# Columns that go into the base.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Columns that a batch may need; others, such as texts, are for people.
NEEDED = (*INPUTS, COLUMN, "labels")
FIX = "Delete the folder: the cache is then made anew."
MIXED = "Call `cache_features` for all data sets with one model and one folder."

Row = dict[str, Any]


class FeatureCollator:
    """
    Makes batches of cached features: names of rows become pooled outputs.

    Rows of several data sets may be mixed, and one collator serves those that a Trainer trains and evaluates on, as
    long as the same models made them in the same folder.

    Args:
        cache_dir (`Path`):
            The folder below which the files lie; they are read where they lie.
        models (`str`):
            Fingerprint of the models that made them.
    """

    def __init__(self, cache_dir: Path, models: str) -> None:
        self.cache_dir = cache_dir
        self.models = models
        self._vectors: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes open the files themselves: copies of the maps would be the whole of them.
        return {**self.__dict__, "_vectors": {}}

    def vectors(self, name: str) -> np.ndarray:
        """
        All pooled outputs of one data set.

        Args:
            name (`str`):
                Its fingerprint.

        Returns:
            `np.ndarray` of shape `(N, T, H)`, float32: mapped from the file.

        Raises:
            `ValueError`: if they are not in this folder, or of other models.
        """
        if name not in self._vectors:
            folder = self.cache_dir / f"pooled-{name}"
            found = _read_marker(folder)
            if found is None or found.get("models") != self.models:
                what = "which is not there or not finished" if found is None else "which other models made"
                raise invalid("cached features", f"{folder}, {what}", "features of the same models", MIXED)
            self._vectors[name] = np.load(folder / VECTORS_NAME, mmap_mode="r")
        return self._vectors[name]

    def __call__(self, features: Sequence[Row]) -> dict[str, torch.Tensor]:
        """
        Collates rows.

        Args:
            features (`Sequence[dict]` of length B):
                Rows of [`CachedFeatures`].

        Returns:
            `dict[str, torch.Tensor]`: `pooled` of shape `(B, T, H)`, float32, and `labels` where the rows have them.
        """
        rows = [{name: plain_value(value) for name, value in row.items()} for row in features]
        if lacking := [row for row in rows if COLUMN not in row]:
            raise invalid(
                "rows", f"columns {', '.join(lacking[0])}", f"`{COLUMN}`, as `cache_features` writes it",
                "A trainer of cached features evaluates on cached features too.",
            )  # fmt: skip
        batch = {
            name: torch.tensor([row[name] for row in rows]) for name in rows[0] if name in NEEDED and name != COLUMN
        }
        places: dict[str, list[tuple[int, int]]] = {}
        for number, row in enumerate(rows):
            name, _, place = row[COLUMN].partition("/")
            places.setdefault(name, []).append((number, int(place)))
        shape = self.vectors(next(iter(places))).shape[1:]
        gathered = np.empty((len(rows), *shape), dtype=np.float32)
        for name, pairs in places.items():
            numbers, chosen = map(list, zip(*pairs, strict=True))
            gathered[numbers] = self.vectors(name)[chosen]
        batch[COLUMN] = torch.from_numpy(gathered)
        return batch

    def check_model(self, model: object) -> None:
        """
        Refuses to feed a model with what others made.

        Args:
            model (`object`):
                The model that is to be trained or evaluated.

        Raises:
            `ValueError`: if its LoRAs, base or pooling are not those that made the features.
            `NotImplementedError`: if its LoRAs learn.
        """
        if not isinstance(model, AttentionFusionModel):
            raise invalid("model", type(model).__name__, "an `AttentionFusionModel`, which made the cached features")
        if model.level != "output" or model.stage != "fusion":
            raise unsupported(
                f"Cached features in stage {model.stage!r} at level {model.level!r}",
                "they are the outputs of finished task models",
                "Call `model.set_stage('fusion')` at level `output`, or train on tokens.",
            )
        if models_fingerprint(model) != self.models:
            raise invalid(
                "train_dataset",
                f"cached features of other models (in {self.cache_dir})",
                "those of this model",
                "Call `cache_features` again: it finds or makes them.",
            )


@dataclass(frozen=True)
class CachedFeatures:
    """
    Rows whose tokens have been replaced by the pooled outputs of all task models.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            With `pooled` (which row of which file) and all columns of the rows but the inputs of the base.
        collator ([`FeatureCollator`]):
            The data collator that goes with them.
        name (`str`):
            Fingerprint of the rows and the models.
        seconds (`float`):
            What making them took; 0 where they were found.
    """

    rows: Dataset
    collator: FeatureCollator
    name: str
    seconds: float = 0.0

    @property
    def vectors(self) -> np.ndarray:
        """All pooled outputs, `(N, T, H)`, float32."""
        return self.collator.vectors(self.name)

    def __len__(self) -> int:
        return len(self.rows)


def cache_features(
    model: AttentionFusionModel,
    rows: Dataset,
    cache_dir: str | os.PathLike[str],
    *,
    collator: Callable[[list[Row]], Any],
    batch_size: int = 32,
) -> CachedFeatures:
    """
    Runs rows through the models of all tasks once, or finds what was made of them before.

    The file lies under a fingerprint of the rows and how they are padded, of base and LoRAs, and of the pooling, so it
    is never mistaken for another; one that was not finished is made anew. Several processes share the work and the
    file, on a file system that all of them see. Collective.

    Args:
        model ([`AttentionFusionModel`]):
            At level `"output"`.
        rows ([`~datasets.Dataset`] of N rows):
            Tokenised, with `input_ids`; further columns that the base takes (`attention_mask`, `token_type_ids`) count
            as inputs, all others are kept.
        cache_dir (`str` or `os.PathLike`):
            The file takes 4 N T H bytes in a folder below it.
        collator (`Callable`):
            Pads rows of inputs, such as [`~transformers.DataCollatorWithPadding`].
        batch_size (`int`, *optional*, defaults to `32`):
            Rows that go together; each becomes T. At least 1.

    Returns:
        [`CachedFeatures`]

    Raises:
        `ValueError`: for rows without tokens, or a cache whose file has been changed.
        `NotImplementedError`: at level `"layer"`.
    """
    if model.level != "output":
        raise unsupported(
            "Cached features at level `layer`",
            "its tasks consult one another inside the base",
            "Train on tokens, or use level `output`.",
        )
    if "input_ids" not in rows.column_names or not len(rows):
        raise invalid("rows", f"{len(rows)} rows of {', '.join(rows.column_names)}", "tokenised rows with `input_ids`")
    if COLUMN in rows.column_names:
        raise invalid("rows", f"a column `{COLUMN}`", "rows without it", "It is where the features come to stand.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise invalid("batch_size", batch_size, "an integer >= 1")
    inputs = [name for name in rows.column_names if name in INPUTS]
    models = models_fingerprint(model)
    digest = xxhash.xxh3_128(f"{FORMAT} {models}".encode())
    update_with_rows(digest, rows.select_columns(inputs))
    _update_with_collator(digest, rows.select_columns(inputs), collator)
    name = digest.hexdigest()
    folder = Path(cache_dir) / f"pooled-{name}"
    shape = (len(rows), len(model.heads), model.hidden_size)
    started = time.perf_counter()
    is_there = on_main_process(lambda: _is_complete(folder, shape, models))
    if not is_there:
        _make(model, rows.select_columns(inputs), folder, _marker(shape, models), collator, batch_size)
    seconds = 0.0 if is_there else time.perf_counter() - started
    size = 4 * float(np.prod(shape)) / 1e6
    how = "found" if is_there else f"made in {seconds:.1f} s"
    if is_main_process():
        say(f"Pooled outputs of {shape[1]} task models for {shape[0]} rows ({size:.1f} MB) {how}: {folder}")
    kept = rows.remove_columns(inputs).add_column(COLUMN, [f"{name}/{row}" for row in range(len(rows))])
    return CachedFeatures(kept, FeatureCollator(Path(cache_dir), models), name, seconds)


def _update_with_collator(digest: xxhash.xxh3_128, rows: Dataset, collator: Callable[[list[Row]], Any]) -> None:
    """Adds what a collator makes of the shortest and the longest row: where it pads, and what it cuts."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    batch = collator([rows[int(np.argmin(lengths))], rows[int(np.argmax(lengths))]])
    for name in sorted(batch):
        digest.update(f"{name} {tuple(batch[name].shape)}".encode())
        digest.update(batch[name].numpy().tobytes())


def _marker(shape: tuple[int, ...], models: str) -> dict[str, Any]:
    """What the marker of a finished file says."""
    return {"format": FORMAT, "shape": list(shape), "models": models}


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """What is there; None for a file that was not finished."""
    try:
        found = json.loads((folder / COMPLETE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise invalid("cache", f"{folder}, which cannot be read ({error})", "a cache as it was made", FIX) from error
    return dict(found)


def _is_complete(folder: Path, shape: tuple[int, ...], models: str) -> bool:
    found, wanted = _read_marker(folder), _marker(shape, models)
    if found is None:
        return False
    try:
        there = list(np.load(folder / VECTORS_NAME, mmap_mode="r").shape)
    except (OSError, ValueError) as error:
        raise invalid("cache", f"{folder}, which cannot be read ({error})", "a cache as it was made", FIX) from error
    if found != wanted or there != list(shape):
        raise invalid("cache", f"{folder}, which holds {there} as {found}", f"{wanted}", FIX)
    return True


def _make(
    model: AttentionFusionModel,
    rows: Dataset,
    folder: Path,
    marker: dict[str, Any],
    collator: Callable[[list[Row]], Any],
    batch_size: int,
) -> None:
    """Each process fills its rows of one file; the marker is written when all have."""

    def create() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shape = tuple(marker["shape"])
        np.lib.format.open_memmap(folder / VECTORS_NAME, mode="w+", dtype=np.float32, shape=shape).flush()

    on_main_process(create)
    vectors = np.lib.format.open_memmap(folder / VECTORS_NAME, mode="r+")
    with evaluation_mode(model), torch.no_grad():
        for places, batch in in_batches(rows, collator, batch_size, model.classifier.weight.device):
            vectors[places] = model.pooled_outputs(**batch).float().cpu().numpy()
    vectors.flush()
    if rank_and_world()[1] > 1:
        dist.barrier()
    text = json.dumps(marker).encode()
    on_main_process(lambda: write_atomic(folder / COMPLETE_NAME, lambda file: file.write(text)))


def in_batches(
    rows: Dataset,
    collator: Callable[[list[Row]], Any],
    batch_size: int,
    device: torch.device,
    more: Sequence[str] = (),
) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """
    This process's share of rows in padded batches, rows of like length together.

    Every process gets equally many batches, since partitioned weights (ZeRO-3) are gathered by all of them in each.

    Args:
        rows ([`~datasets.Dataset`] of N rows):
            With `input_ids` or `pooled`.
        collator (`Callable`):
            Makes batches.
        batch_size (`int`):
            Rows that go together.
        device (`torch.device`):
            Where the batches go.
        more (`Sequence[str]`, *optional*):
            Columns that the collator gets beside inputs and labels.

    Returns:
        Iterator over `tuple[np.ndarray, dict[str, torch.Tensor]]`: numbers of the rows, and their batch.
    """
    rank, world = rank_and_world()
    order = np.arange(len(rows))
    if "input_ids" in rows.column_names:
        order = np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")
    order = np.concatenate([order, order[-1:].repeat(-len(order) % world)])[rank::world]
    needed = rows.select_columns([name for name in rows.column_names if name in (*NEEDED, *more)])
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        batch = collator([needed[int(place)] for place in places])
        yield places, {name: value.to(device) for name, value in batch.items()}


def models_fingerprint(model: AttentionFusionModel) -> str:
    """
    Hashes what pooled outputs depend on: base, LoRAs, pooling, and the order of the tasks. Collective under ZeRO-3.

    Args:
        model ([`AttentionFusionModel`]):
            The model.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    scales = {name: layer.scalings for name, layer in task_lora_layers(model.backbone)}
    # What the base computes depends on its config too: positions, windows, epsilons.
    config = {name: value for name, value in model.config.to_dict().items() if name not in NOT_COMPUTED}
    described = [model.pooling, list(model.heads), scales, config]
    digest = xxhash.xxh3_128(json.dumps(described, sort_keys=True, default=str).encode())
    for name, parameter in model.backbone.named_parameters():
        digest.update(f"{name} {parameter.dtype}".encode())
        layout = layout_of(name, parameter)
        full = layout.full(parameter, layout.local(parameter)).detach().cpu().contiguous()
        digest.update(full.view(torch.uint8).numpy().tobytes() if full.dim() else bytes(str(full.item()), "ascii"))
    return digest.hexdigest()
