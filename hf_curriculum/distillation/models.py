"""Teachers that are models of their own: found, compared with the student, loaded, prepared for the backend."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from ..core.console import say
from ..core.errors import invalid, unsupported


__all__ = ["check_teacher", "dense_kind", "load_teacher", "prepare_teacher"]

# Heads with small logits, whose loss is that of their items one by one.
DENSE_KINDS: dict[str, tuple[dict[str, str], type]] = {
    "sequence classification": (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, AutoModelForSequenceClassification),
    "token classification": (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, AutoModelForTokenClassification),
    "sequence-to-sequence": (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
}


def dense_kind(model: PreTrainedModel) -> str:
    """
    The kind of a model that is no causal language model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model, without its adapter.

    Returns:
        `str`: `"sequence classification"`, `"token classification"` or `"sequence-to-sequence"`.

    Raises:
        `NotImplementedError`: for other kinds, and for regression.
    """
    kinds = [kind for kind, (names, _) in DENSE_KINDS.items() if type(model).__name__ in names.values()]
    if not kinds:
        raise unsupported(
            f"Distillation of {type(model).__name__}",
            "its loss is not known to be a cross-entropy over its logits",
            "Causal language models, classifiers of sequences and tokens, and sequence-to-sequence models work.",
        )
    config = model.config
    if kinds[0] == "sequence classification" and (config.num_labels == 1 or config.problem_type == "regression"):
        raise unsupported(
            "Distillation of a regression", "its output is a number, not a distribution", "Train without a teacher."
        )
    return kinds[0]


def check_teacher(
    teacher: str | PreTrainedModel, student: PreTrainedModel, processing_class: Any, classifies: bool
) -> None:
    """
    Compares the outputs of teacher and student, before anything is loaded.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, path or model.
        student ([`~transformers.PreTrainedModel`]):
            The student, without its adapter.
        processing_class:
            The student's tokenizer. It is compared with the teacher's if the teacher is named and has one.
        classifies (`bool`):
            Whether the outputs are classes instead of tokens.

    Raises:
        `ValueError`: if they have other numbers of tokens or classes, or other tokenizers, or share parameters.
    """
    if not isinstance(teacher, str):
        config, name = teacher.config, type(teacher).__name__
        own = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in own for parameter in teacher.parameters()):
            raise invalid(
                "teacher",
                f"{name} that shares parameters with the student",
                "a model of its own",
                "The model before training is `teacher='base'`.",
            )
    else:
        if Path(teacher, "adapter_config.json").is_file() and not Path(teacher, "config.json").is_file():
            raise invalid(
                "teacher",
                f"{teacher}, which holds an adapter",
                "a whole model",
                "Save `AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()`, and name its folder.",
            )
        config, name = AutoConfig.from_pretrained(teacher), teacher
    if classifies:
        got, expected, what = config.num_labels, student.config.num_labels, "classes"
    else:
        got, expected = config.get_text_config().vocab_size, student.config.get_text_config().vocab_size
        what = "tokens in the vocabulary"
    if got != expected:
        raise invalid(
            "teacher",
            f"{name} with {got} {what}",
            f"{expected}, as the student has",
            "Distillation compares the probabilities of the same outcomes.",
        )
    if isinstance(teacher, str) and isinstance(processing_class, PreTrainedTokenizerBase):
        _check_tokenizer(teacher, processing_class)


def _check_tokenizer(teacher: str, tokenizer: PreTrainedTokenizerBase) -> None:
    try:
        theirs = AutoTokenizer.from_pretrained(teacher).get_vocab()
    except (OSError, ValueError):  # what transformers raises where there are no files of a tokenizer
        say(f"{teacher} has no tokenizer: only the size of its vocabulary was compared with the student's.")
        return
    ours = tokenizer.get_vocab()
    if different := [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]:
        token = min(different)
        raise invalid(
            "teacher",
            f"{teacher}, whose tokenizer has another id for {len(different)} tokens ({token!r}: {theirs.get(token)})",
            f"the student's tokenizer ({token!r}: {ours.get(token)})",
            "Name a teacher of the same family.",
        )


def load_teacher(teacher: str | PreTrainedModel, student: PreTrainedModel) -> PreTrainedModel:
    """
    Loads a teacher with the head, the precision and the attention kernel of the student.

    Args:
        teacher (`str` or [`~transformers.PreTrainedModel`]):
            Hub id, path, or a model, which is taken as it is.
        student ([`~transformers.PreTrainedModel`]):
            The student, without its adapter.

    Returns:
        [`~transformers.PreTrainedModel`]
    """
    if not isinstance(teacher, str):
        return teacher
    classes = [auto for names, auto in DENSE_KINDS.values() if type(student).__name__ in names.values()]
    auto = classes[0] if classes else AutoModelForCausalLM
    return auto.from_pretrained(  # type: ignore[attr-defined, no-any-return]
        teacher, dtype=student.dtype, attn_implementation=student.config._attn_implementation
    )


def prepare_teacher(teacher: PreTrainedModel, accelerator: Accelerator, offload: bool) -> nn.Module:
    """
    Prepares a teacher for the backend of the run.

    Args:
        teacher ([`~transformers.PreTrainedModel`]):
            The teacher.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's.
        offload (`bool`):
            Whether it waits in CPU memory, where it is; the caller moves it.

    Returns:
        `nn.Module`: the teacher, maybe wrapped.

    Raises:
        `NotImplementedError`: for offloading a teacher that the backend partitions.
    """
    teacher = teacher.eval().requires_grad_(False)
    partitioned = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if offload:
        if partitioned:
            raise unsupported(
                f"`offload_teacher` with {accelerator.distributed_type.value}",
                "the backend itself places the teacher's parameters",
                "Use its own offloading, or `teacher_cache='top_k'`.",
            )
        if accelerator.device == torch.device("cpu"):
            raise invalid("offload_teacher", True, "False on a CPU, where there is nothing to move away from")
        return teacher
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        prepared: nn.Module = prepare_deepspeed(teacher, accelerator)
    elif accelerator.distributed_type == DistributedType.FSDP:
        prepared = cast(nn.Module, prepare_fsdp(teacher, accelerator))
    else:
        prepared = accelerator.prepare_model(teacher, evaluation_mode=True)
    return prepared
