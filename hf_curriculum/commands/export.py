"""`hf-curriculum export`: the tasks of a CGC-LoRA adapter as plain LoRAs."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from ..core.errors import invalid
from .names import check_names


if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["add"]

# By the task type of an adapter, the class of transformers that its base model is loaded with.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def add(subparsers: Any) -> None:
    """Adds the parser of `export`."""
    parser = subparsers.add_parser(
        "export",
        help="A CGC-LoRA adapter as one plain LoRA per task.",
        description="Writes each task of a CGC-LoRA adapter as a standard LoRA adapter, which PEFT and vLLM load "
        "without this package, and prints the command that serves them. Heads of the tasks, where there are any, are "
        "written beside. Logits are compared before anything is written.",
    )
    parser.add_argument("adapter", help="CGC-LoRA adapter: a Hub id or a folder.")
    parser.add_argument("output", help="Folder to write; it must not exist.")
    parser.add_argument("--tasks", nargs="+", default=None, help="Names of the tasks to write. Default: all.")
    parser.add_argument("--no_common", action="store_true", help="Leave out the common experts alone.")
    parser.add_argument(
        "--truncate_rank", type=int, default=None, help="Keep the best update of this rank. Default: exact."
    )
    parser.add_argument(
        "--rank_multiple", type=int, default=8, help="Fill ranks with zeros up to a multiple of this. Default: 8."
    )
    parser.add_argument("--base_model", default=None, help="Hub id or folder. Default: the one the adapter names.")
    parser.add_argument("--dtype", default="auto", help="Dtype to load the base model in. Default: as it is stored.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the base model.")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from peft import PeftConfig, PeftModel, PeftType

    from ..core.console import show_table
    from ..multitask.cgc_lora import CGCLoraConfig, export_task_adapters
    from ..multitask.head_files import find_head_files
    from ..multitask.heads import MultiTaskHeads

    check_names(options, "adapter", "base_model")
    if os.path.lexists(options.output):
        raise invalid("output", options.output, "a folder that does not exist", "Choose another name.")
    config = PeftConfig.from_pretrained(options.adapter)
    if not isinstance(config, CGCLoraConfig):
        raise invalid(
            "adapter", f"{options.adapter}, of type {PeftType(config.peft_type).value}", "a CGC-LoRA adapter"
        )
    base = _load_adapted_base(options, config)
    try:
        # RuntimeError: tensors of another shape, or logits that differ.
        model = PeftModel.from_pretrained(base, options.adapter)
        heads = find_head_files(options.adapter)
        report = export_task_adapters(
            model if heads is None else MultiTaskHeads.from_pretrained(heads, model),
            options.output,
            tasks=options.tasks,
            include_common=not options.no_common,
            rank_multiple=options.rank_multiple,
            truncate_rank=options.truncate_rank,
        )
    except RuntimeError as error:
        raise ValueError(" ".join(str(error).split())) from error
    lost = {task: max(errors.values()) for task, errors in report.truncation_errors.items()}
    rows = [[task, rank, report.logit_differences[task], lost.get(task)] for task, rank in report.ranks.items()]
    show_table(str(report.folder), ("adapter", "rank", "largest logit difference", "largest truncation error"), rows)


def _load_adapted_base(options: argparse.Namespace, config: Any) -> PreTrainedModel:
    """The model that an adapter was made for, with the head that its task type asks for."""
    import transformers

    from ..multitask.lora_files import saved_classes

    name = options.base_model or config.base_model_name_or_path
    if not name:
        raise invalid("base_model", None, "a Hub id or a folder, since the adapter names none", "Pass --base_model.")
    if config.task_type is not None and config.task_type not in AUTO_CLASSES:
        raise invalid("task_type of the adapter", config.task_type, f"one of {', '.join(AUTO_CLASSES)}, or none")
    mapped = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    kind = getattr(transformers, AUTO_CLASSES.get(config.task_type, mapped), transformers.AutoModel)
    kept = {"revision": config.revision, "dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    if (classes := saved_classes(options.adapter)) is not None:
        kept["num_labels"] = classes
    model: PreTrainedModel = kind.from_pretrained(name, **kept)
    return model
