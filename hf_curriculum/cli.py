"""
The command line: `hf-curriculum attention`, `hf-curriculum export` and `hf-curriculum layers`.

Each subcommand is a function that adds its parser and a function that runs it; `COMMANDS` lists them. Libraries that
take seconds to import are imported by the command that runs.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.errors import invalid


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .analysis.attention_measurement import AttentionMeasurement

__all__ = ["main"]

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        arguments (`Sequence[str]`, *optional*):
            Words of the command line. Defaults to those of the process.

    Returns:
        `int`: 0 if it worked, 1 for bad input, which is told in one line on the error stream.
    """
    parser = argparse.ArgumentParser(
        prog="hf-curriculum", description="Order, memory, place and sharing for the Hugging Face Trainer."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hf_curriculum')}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(subparsers)
    options = parser.parse_args(arguments)
    run: Command = options.run
    try:
        run(options)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        # What a user got wrong, in the words of the place that found it; anything else is a fault of ours.
        sys.stderr.write(f"hf-curriculum {options.command}: {error}\n")
        return 1
    return 0


def _add_attention(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "attention",
        help="What a fine-tune did to what a model looks at.",
        description="Compares the attention of two models over the same texts: a table with bootstrap intervals, "
        "pictures (PNG) and their data (CSV). Attention is not explanation.",
    )
    parser.add_argument("base", help="Base model: a Hub id or a folder.")
    parser.add_argument("tuned", help="Tuned model: a Hub id or a folder, of a model or of a PEFT adapter of BASE.")
    parser.add_argument(
        "--dataset", required=True, help="Probe texts: a Hub id, a .jsonl/.json/.csv/.parquet file or a folder."
    )
    parser.add_argument("--dataset_config", default=None, help="Configuration of a Hub data set.")
    parser.add_argument("--dataset_split", default="train", help="Split to read. Default: train.")
    parser.add_argument(
        "--template",
        default="{text}",
        help="How a row becomes a text: columns in braces, \\n for a line break. Default: '{text}'.",
    )
    parser.add_argument("--max_texts", type=int, default=100, help="Texts to read, from the first. Default: 100.")
    parser.add_argument("--max_length", type=int, default=None, help="Tokens to read of each text. Default: all.")
    parser.add_argument("--function_words", default=None, help="File with function words, one a line; else English.")
    parser.add_argument("--output_dir", default="outputs/attention", help="Folder for tables and pictures.")
    parser.add_argument("--sentence", type=int, default=0, help="Which text to draw word by word. Default: 0.")
    parser.add_argument("--no_plots", action="store_true", help="Write no pictures (they need matplotlib).")
    parser.add_argument("--no_head_distance", action="store_true", help="Leave out what compares heads: faster.")
    parser.add_argument("--causal_check", action="store_true", help="Also hide the most attended words: loss change.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the models.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the bootstrap. Default: 0.")
    parser.set_defaults(run=_run_attention)


def _run_attention(options: argparse.Namespace) -> None:
    from .analysis.attention_words import WordRules
    from .core.console import say

    _check_names(options, "base", "tuned")
    texts = _texts(options)
    rules = WordRules()
    if options.function_words is not None:
        rules = WordRules(frozenset(Path(options.function_words).read_text(encoding="utf-8").lower().split()))
    if not options.no_plots:
        _check_plots()
    measured = _measure(options, texts, rules)
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    before = measured.pop("base")
    for name, after in measured.items():
        _report(options, texts, before, after, name, folder / name if name != "tuned" else folder)
    say(f"Tables and pictures are in {folder}. Attention is not explanation: see docs/attention.md.")


def _check_names(options: argparse.Namespace, *arguments: str) -> None:
    for argument in arguments:
        name = getattr(options, argument)
        if name is not None and name.startswith((".", "/", "~")) and not os.path.isdir(name):
            raise invalid(argument, name, "a folder that exists, or a Hub id", f"Looked in {Path.cwd()}.")


def _texts(options: argparse.Namespace) -> list[str]:
    from trl import ScriptArguments

    from .recipe import load_splits

    if options.max_texts < 1:
        raise invalid("max_texts", options.max_texts, "an integer >= 1")
    if os.path.isfile(options.dataset) and os.path.getsize(options.dataset) == 0:
        raise invalid("dataset", f"{options.dataset}, a file without rows", "at least one text")
    template = options.template.replace("\\n", "\n")
    rows: Dataset = load_splits(
        ScriptArguments(
            dataset_name=options.dataset,
            dataset_config=options.dataset_config,
            dataset_train_split=options.dataset_split,
        )
    )[0]
    wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not wanted or set(wanted) - set(rows.column_names):
        raise invalid(
            "template",
            options.template,
            f"columns of the data set in braces, which has {', '.join(rows.column_names)}",
            "For example --template 'Question: {question}\\nAnswer: {answer}'.",
        )
    texts = [template.format(**row) for row in rows.select(range(min(options.max_texts, len(rows))))]
    if not 0 <= options.sentence < max(1, len(texts)):
        raise invalid("sentence", options.sentence, f"a number in [0, {len(texts) - 1}]")
    return texts


def _check_plots() -> None:
    try:
        import matplotlib  # noqa: F401 - only whether it is there, before the models run for minutes
    except ImportError as error:
        raise ImportError(
            'Pictures need matplotlib: install it with `pip install "hf_curriculum[plots]"`, or use --no_plots.'
        ) from error


def _measure(options: argparse.Namespace, texts: list[str], rules: Any) -> dict[str, AttentionMeasurement]:
    """Measures one model after the other, so that only one is in memory."""
    from .analysis.attention_causal import causal_check
    from .analysis.attention_measurement import measure_attention
    from .core.console import say
    from .core.head import causal_lm_head

    found = {}
    for name, load in (("base", _load_base), ("tuned", _load_tuned)):
        model, tokenizer = load(options)
        if options.causal_check:
            causal_lm_head(model)  # refuses a model without a head before minutes are spent on it
        arguments = {"processing_class": tokenizer, "rules": rules, "max_length": options.max_length}
        head_distance = not options.no_head_distance
        found[name] = measure_attention(model, texts, head_distance=head_distance, **arguments)
        if name == "tuned" and _is_adapter(options.tuned):
            off = measure_attention(model, texts, adapter=False, head_distance=head_distance, **arguments)
            found["adapter_off"] = off
        if options.causal_check:
            numbers = causal_check(model, texts, found[name], seed=options.seed, **arguments).summary()
            say(
                f"{name}: hiding the most attended tenth of the words changes the loss by {numbers['top']:+.4f} nats "
                f"per token, hiding neighbours by {numbers['control']:+.4f}; difference {numbers['difference']:+.4f} "
                f"[{numbers['low']:+.4f}, {numbers['high']:+.4f}]."
            )
        del model
    return found


def _is_adapter(name: str) -> bool:
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(name) is not None


def _load(name: str, options: argparse.Namespace) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    causal = any("CausalLM" in kind or "LMHead" in kind for kind in getattr(config, "architectures", None) or ())
    kind = AutoModelForCausalLM if causal and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else AutoModel
    model: PreTrainedModel = kind.from_pretrained(
        name, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=options.trust_remote_code
    )
    if torch.accelerator.is_available():
        torch.nn.Module.to(model, torch.accelerator.current_accelerator())
    return model


def _tokenizer(name: str, options: argparse.Namespace) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)


def _load_base(options: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    return _load(options.base, options), _tokenizer(options.base, options)


def _load_tuned(options: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    # The same tokens for both: the base model's tokenizer, unless the models have other vocabularies.
    if not _is_adapter(options.tuned):
        return _load(options.tuned, options), _tokenizer(options.base, options)
    from peft import PeftModel

    model = PeftModel.from_pretrained(_load(options.base, options), options.tuned)
    return model, _tokenizer(options.base, options)


def _report(
    options: argparse.Namespace,
    texts: list[str],
    before: AttentionMeasurement,
    after: AttentionMeasurement,
    name: str,
    folder: Path,
) -> None:
    from .analysis.attention_comparison import compare_attention
    from .analysis.attention_plots import draw_all
    from .analysis.pictures import write_csv
    from .core.console import say
    from .core.files import write_atomic

    comparison = compare_attention(before, after, seed=options.seed)
    models = [Path(path).name for path in (options.base, options.tuned)]
    title = f"{models[0]} -> {models[1]}" + (", adapter off" if name == "adapter_off" else "")
    comparison.show(title)
    if name == "tuned":
        say(comparison.claim())
    columns = ("measure", "before", "after", "change", "low", "high")
    rows = [[key, *vars(item).values()] for key, item in comparison.changes.items()]
    write_csv(folder / "changes.csv", columns, rows)
    # JSON has no NaN: a measure without a value is null.
    numbers = {
        key: {field: value if value == value else None for field, value in vars(item).items()}
        for key, item in comparison.changes.items()
    }
    text = json.dumps(
        {"base": options.base, "tuned": options.tuned, "texts": len(texts), "changes": numbers}, indent=2
    )
    write_atomic(folder / "changes.json", lambda file: file.write(text.encode()))
    if not options.no_plots and name == "tuned":
        draw_all(texts, before, after, comparison, folder, title=title, sentence=options.sentence)


def _add_export(subparsers: Any) -> None:
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
    parser.set_defaults(run=_run_export)


def _run_export(options: argparse.Namespace) -> None:
    from peft import PeftConfig, PeftModel, PeftType

    from .core.console import show_table
    from .multitask.cgc_lora import CGCLoraConfig, export_task_adapters
    from .multitask.head_files import find_head_files
    from .multitask.heads import MultiTaskHeads

    _check_names(options, "adapter", "base_model")
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

    name = options.base_model or config.base_model_name_or_path
    if not name:
        raise invalid("base_model", None, "a Hub id or a folder, since the adapter names none", "Pass --base_model.")
    if config.task_type is not None and config.task_type not in AUTO_CLASSES:
        raise invalid("task_type of the adapter", config.task_type, f"one of {', '.join(AUTO_CLASSES)}, or none")
    mapped = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    kind = getattr(transformers, AUTO_CLASSES.get(config.task_type, mapped), transformers.AutoModel)
    model: PreTrainedModel = kind.from_pretrained(
        name, revision=config.revision, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    return model


def _add_layers(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "layers",
        help="Which layers learned when, in a run with a `LayerFreezeCallback`.",
        description="Shows how long each block learned, how often it was chosen and its last score, from the record "
        "of a run, finished or not.",
    )
    parser.add_argument("output_dir", help="Output folder of the run.")
    parser.add_argument("--plot", default=None, metavar="FILE.png", help="Draw steps and blocks as a heat-map.")
    parser.add_argument("--static", action="store_true", help="Show the blocks that learned most as a fixed choice.")
    parser.add_argument(
        "--active_fraction", type=float, default=None, help="Budget of --static. Default: the largest of the run."
    )
    parser.set_defaults(run=_run_layers)


def _run_layers(options: argparse.Namespace) -> None:
    from .core.console import say
    from .layerwise.report import read_layers, show_layers, show_static, static_layers

    if options.plot is not None and Path(options.plot).suffix != ".png":
        raise invalid("plot", options.plot, "a file name that ends in .png")
    if options.active_fraction is not None and not options.static:
        raise invalid("active_fraction", options.active_fraction, "nothing without --static", "Add --static.")
    layers = read_layers(options.output_dir)
    show_layers(layers)
    if options.static:
        show_static(static_layers(options.output_dir, active_fraction=options.active_fraction))
    if options.plot is not None:
        from .analysis.layer_plots import plot_layer_map

        say(f"Heat-map in {plot_layer_map(path=options.plot, **layers.picture())}, its data beside it as CSV.")


# By the task type of an adapter, the class of transformers that its base model is loaded with.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

COMMANDS: tuple[Callable[[Any], None], ...] = (_add_attention, _add_export, _add_layers)


if __name__ == "__main__":
    raise SystemExit(main())
