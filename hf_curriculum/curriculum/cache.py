"""Scores kept on disk, under a fingerprint of everything they depend on."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import xxhash
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import unwrap_peft_model

from ..core.distributed import on_main_process
from ..core.errors import invalid
from ..core.files import write_atomic
from ..core.fingerprint import update_with_rows


__all__ = ["cached_scores", "default_cache_dir", "fingerprint"]

# To be raised whenever a scorer's result changes for the same settings.
SCORES_VERSION = 1


def default_cache_dir() -> Path:
    """`hf_curriculum/scores` in the Hugging Face cache folder (`HF_HOME`)."""
    return Path(HF_HOME) / "hf_curriculum" / "scores"


def fingerprint(rows: Dataset, trainable: np.ndarray, model: nn.Module | None, settings: dict[str, Any]) -> str:
    """
    Hashes what a score depends on: values of the rows, the model, settings.

    Of the model count every weight and buffer, its class, its config, its adapters' configs, which adapters are active
    and which parameters can learn.

    Args:
        rows ([`~datasets.Dataset`]):
            The rows.
        trainable (`np.ndarray` of shape `(N,)`, bool):
            Which rows may be learned from.
        model (`nn.Module`, *optional*):
            The model.
        settings (`dict[str, Any]`):
            JSON values.

    Returns:
        `str`: 32 hexadecimal digits (xxh3, 128 bits).
    """
    digest = xxhash.xxh3_128()
    digest.update(json.dumps({"version": SCORES_VERSION, **settings}, sort_keys=True, default=str).encode())
    digest.update(np.packbits(trainable).tobytes())
    update_with_rows(digest, rows)
    if model is not None:
        digest.update(_describe(model).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _describe(model: nn.Module) -> str:
    """What a model computes beside its weights."""
    base = unwrap_peft_model(model)
    adapters = getattr(model, "peft_config", {}) if isinstance(model, PeftModel) else {}
    described = {
        "class": f"{type(base).__module__}.{type(base).__qualname__}",
        "config": base.config.to_dict() if isinstance(base, PreTrainedModel) else None,
        "adapters": {name: config.to_dict() for name, config in adapters.items()},
        "active": model.active_adapters if isinstance(model, PeftModel) else None,
        "learns": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
    }
    # Sets (PEFT's target modules) have another order in every process.
    return json.dumps(
        described, sort_keys=True, default=lambda item: sorted(map(str, item)) if isinstance(item, set) else str(item)
    )


def cached_scores(path: Path, num_rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """
    Reads scores from a file, or computes and writes them. Collective.

    A file of the full size is written and removed before anything is computed, so that a folder without permission or
    a full disk is found before the work and not after it.

    Args:
        path (`Path`):
            The file, named by the fingerprint.
        num_rows (`int`):
            N.
        compute (`Callable`):
            Gives the scores, of shape `(N,)`, float64; called on every rank.

    Returns:
        `np.ndarray` of shape `(N,)`, float64, the same on every rank.

    Raises:
        `ValueError`: if the file is corrupt.
        `OSError`: if it cannot be written; nothing is left behind.
    """
    known = on_main_process(lambda: _read(path, num_rows))
    if known is not None:
        return known
    on_main_process(lambda: _try_room(path, num_rows))
    scores = compute()
    on_main_process(lambda: write_atomic(path, lambda file: np.savez(file, scores=scores)))
    return scores


def _read(path: Path, num_rows: int) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:  # a zip file, whose members carry checksums
            scores = archive["scores"]
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise _corrupt(path, f"a file that cannot be read ({error})") from None
    if scores.shape != (num_rows,) or scores.dtype != np.float64:
        raise _corrupt(path, f"{scores.dtype} values of shape {scores.shape}")
    return np.asarray(scores)


def _corrupt(path: Path, got: str) -> ValueError:
    return invalid(
        "score cache",
        f"{got} at {path}",
        "the scores that were written there",
        "Delete that file, or pass `use_cache=False`.",
    )


def _try_room(path: Path, num_rows: int) -> None:
    scratch = path.with_suffix(f".{uuid4().hex}")
    try:
        write_atomic(scratch, lambda file: file.write(b"\0" * (8 * num_rows + 1024)))
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: cannot keep the scores in {path.parent}. Free space or permission is needed there; "
            "or set `cache_dir` to another folder, or `use_cache=False`",
        ) from None
    scratch.unlink()
