"""Which teacher there is at each moment of a run, and how it gets into a checkpoint and back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import unwrap_peft_model

from ..core.console import say
from ..core.distributed import is_main_process, on_main_process
from ..core.errors import invalid
from ..core.files import write_atomic
from ..core.head import CausalLMHead, causal_lm_head
from .cache import TopKCache, TopKSpec, link_or_copy
from .config import DEFAULT_EMA_DECAY, DEFAULT_TOP_K, DistillationConfig
from .forward import install
from .models import load_teacher, prepare_teacher
from .teacher import AdapterOffTeacher, LiveTeacher, ModelTeacher, SnapshotTeacher, Teacher


__all__ = ["TEACHER_FILE", "TeacherKeeper"]

TEACHER_FILE = "hf_curriculum_teacher.safetensors"
CACHE_FILE = "hf_curriculum_teacher_top_k.safetensors"

WriteCache = Callable[[Path, TopKSpec, Teacher, int], TopKCache]


class TeacherKeeper:
    """
    Makes the teacher, refreshes it when a stage begins, writes it into checkpoints and reads it back.

    Args:
        distillation ([`~hf_curriculum.DistillationConfig`]):
            The config, with a teacher.
        model (`nn.Module`):
            The student, before it is wrapped.
        head ([`~hf_curriculum.core.head.CausalLMHead`], *optional*):
            Its language-model head, if it has one.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        folder (`Path`):
            Where a cache is kept, seen by all processes.
        write_cache (`Callable`):
            Runs a teacher over the rows of a stage and writes a cache: `(path, spec, teacher, stage)`.
        identity (`Callable`):
            Gives the JSON values, by name, of what a cache depends on beside the config: the run and its data.

    Attributes:
        cache ([`~hf_curriculum.distillation.cache.TopKCache`], *optional*):
            The cache of the current stage.
    """

    def __init__(
        self,
        distillation: DistillationConfig,
        model: nn.Module,
        head: CausalLMHead | None,
        accelerator: Accelerator,
        folder: Path,
        write_cache: WriteCache,
        identity: Callable[[], dict[str, object]],
    ) -> None:
        self._config = distillation
        self._model = model
        self._head = head
        self._accelerator = accelerator
        self._folder = folder
        self._write_cache = write_cache
        self._identity = identity
        self._teacher = self._make()
        self.cache: TopKCache | None = None
        self._identity_values: dict[str, object] = {}
        self._written: dict[str, Any] = {"teacher": None, "cache": None}

    def _make(self) -> Teacher | None:
        """The teacher; None for another model, which is loaded when the run begins."""
        if self._config.names_model:
            return None
        if self._config.teacher == "base" and isinstance(self._model, PeftModel):
            return AdapterOffTeacher(self._model, self._head)
        if self._config.teacher == "previous_stage" and self._cached:
            # The pass that writes the cache runs when a stage begins, on the model as it is then.
            return LiveTeacher()
        # The average moves by less than half precision can hold.
        return SnapshotTeacher(self._model, self._head, torch.float32 if self._config.teacher == "ema" else None)

    @property
    def _cached(self) -> bool:
        return self._config.teacher_cache == "top_k"

    @property
    def teacher(self) -> Teacher | None:
        """What can be asked at this step; None while there is nothing, or only a cache."""
        return self._teacher if self._teacher is not None and self._teacher.ready and not self._cached else None

    def begin(self, first_stage: int, saved: Mapping[str, Any] | None, checkpoint: Path | None) -> None:
        """
        Makes the teacher that a run begins with, or takes over that of a checkpoint. Collective.

        Args:
            first_stage (`int`):
                Index of the stage in which the run begins or goes on.
            saved (`Mapping[str, Any]`, *optional*):
                What [`state`] gave at the checkpoint.
            checkpoint (`Path`, *optional*):
                Its folder.
        """
        if self._config.names_model and self._teacher is None:
            self._teacher = self._load()
        self.cache = None
        if self._cached:
            # Once per run: it reads all of the data.
            self._identity_values = self._identity()
        if isinstance(self._teacher, SnapshotTeacher):
            self._teacher.forget()
        if saved is not None and checkpoint is not None:
            self._restore(saved, checkpoint)
        elif self._config.teacher != "previous_stage":
            if isinstance(self._teacher, SnapshotTeacher):
                self._teacher.capture()
                self._tell_size(self._teacher)
            if self._cached:
                self._renew_cache(first_stage)

    def _load(self) -> ModelTeacher:
        student = unwrap_peft_model(self._model)
        loaded = load_teacher(self._config.teacher, student)
        offload = self._config.offload_teacher
        head = None if self._head is None else causal_lm_head(loaded)
        if head is not None:
            install(loaded)
        prepared = prepare_teacher(loaded, self._accelerator, offload)
        return ModelTeacher(prepared, head, self._accelerator.device if offload else None)

    def refresh(self, stage: int) -> None:
        """
        Makes the student of this moment the teacher of a stage, where it is to be. Collective.

        Args:
            stage (`int`):
                Index of the stage that begins.
        """
        if isinstance(self._teacher, SnapshotTeacher) and self._config.teacher == "previous_stage":
            first = not self._teacher.ready
            self._teacher.capture()
            if first:
                self._tell_size(self._teacher)
        if self._cached:
            self._renew_cache(stage)

    def follow(self) -> None:
        """Moves a running average by one optimizer step."""
        if self._config.teacher == "ema" and isinstance(self._teacher, SnapshotTeacher):
            decay = DEFAULT_EMA_DECAY if self._config.ema_decay is None else self._config.ema_decay
            self._teacher.snapshot.average(decay)

    def _tell_size(self, teacher: SnapshotTeacher) -> None:
        size = teacher.snapshot.full_nbytes / 1e6
        say(f"The teacher `{self._config.teacher}` takes {size:.1f} MB, in memory and in each checkpoint.")

    # The cache

    def _renew_cache(self, stage: int) -> None:
        """Writes the cache of a stage, in place of the one before."""
        if self._teacher is None:
            raise RuntimeError("The teacher is not loaded yet.")
        old, self.cache = self.cache, None
        if self._config.alpha_in(stage) == 0:
            return
        path = self._cache_path(stage)
        self.cache = self._write_cache(path, self._spec(stage), self._teacher, stage)
        if old is not None and old.path != path:
            # Checkpoints have links of their own.
            on_main_process(lambda: old.path.unlink(missing_ok=True))
        positions, size = self.cache.num_positions, self.cache.num_bytes
        say(
            f"Teacher cache of stage {stage}: {positions} labelled tokens of {self.cache.num_rows} rows, "
            f"{size / 1e6:.1f} MB ({size / max(positions, 1):.0f} bytes per token)."
        )

    def _cache_path(self, stage: int) -> Path:
        return self._folder / f"stage_{stage}.safetensors"

    def _spec(self, stage: int) -> TopKSpec:
        k = DEFAULT_TOP_K if self._config.cache_top_k is None else self._config.cache_top_k
        vocabulary = unwrap_peft_model(self._model).config.get_text_config().vocab_size
        return TopKSpec(k, self._config.temperature_in(stage), vocabulary, {"stage": stage, **self._identity_values})

    # Checkpoints

    def write_files(self, folder: Path) -> None:
        """
        Writes the teacher into a checkpoint. Collective.

        Args:
            folder (`Path`):
                The checkpoint.
        """
        self._written = {"teacher": None, "cache": None}
        if isinstance(self._teacher, SnapshotTeacher) and self._teacher.ready:
            values = self._teacher.snapshot.state()
            self._written["teacher"] = on_main_process(lambda: _write(folder / TEACHER_FILE, values))
        if (cache := self.cache) is not None:
            on_main_process(lambda: link_or_copy(cache.path, folder / CACHE_FILE))
            self._written["cache"] = {"digest": cache.digest, "stage": cache.spec.identity["stage"]}

    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint must hold of what [`write_files`] wrote: hashes of the files."""
        return dict(self._written)

    def _restore(self, saved: Mapping[str, Any], checkpoint: Path) -> None:
        if saved["teacher"] is not None and isinstance(self._teacher, SnapshotTeacher):
            path, digest = checkpoint / TEACHER_FILE, saved["teacher"]
            on_main_process(lambda: _check(path, digest))
            self._teacher.load(load_file(path) if is_main_process() else {})
        if saved["cache"] is not None:
            stage = saved["cache"]["stage"]
            path, spec, digest = self._cache_path(stage), self._spec(stage), saved["cache"]["digest"]
            on_main_process(lambda: link_or_copy(checkpoint / CACHE_FILE, path))
            # One process reads and hashes all of it.
            on_main_process(lambda: TopKCache.open(path, spec, digest=digest).digest)
            self.cache = TopKCache.open(path, spec, digest=digest, verify=False)


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**24), b""):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, values: Mapping[str, torch.Tensor]) -> str:
    """Writes the values of a teacher; gives the hash of the file."""
    write_atomic(path, lambda file: save_file(dict(values), file.name))
    return _hash(path)


def _check(path: Path, digest: str) -> None:
    """Refuses a teacher's file that is missing or is not the one that was written."""
    fix = "Resume from another checkpoint."
    if not path.is_file():
        raise invalid("resume_from_checkpoint", f"a checkpoint without {path.name}", "one with the teacher", fix)
    if (found := _hash(path)) != digest:
        raise invalid(str(path), f"contents with hash {found}", f"the recorded hash {digest}", fix)
