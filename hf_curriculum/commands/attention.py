"""`hf-curriculum attention`: what a fine-tune did to what a model looks at."""

from __future__ import annotations

import argparse
import json
import os
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import invalid
from .names import check_names


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..analysis.attention_measurement import AttentionMeasurement

__all__ = ["add"]


def add(subparsers: Any) -> None:
    """Adds the parser of `attention`."""
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
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from ..analysis.attention_words import WordRules
    from ..core.console import say

    check_names(options, "base", "tuned")
    if options.max_length is not None and options.max_length < 1:
        raise invalid("max_length", options.max_length, "an integer >= 1")
    _check_tuned(options)
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


def _texts(options: argparse.Namespace) -> list[str]:
    from trl import ScriptArguments

    from ..recipe_data import load_splits

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
    chosen = rows.select(range(min(options.max_texts, len(rows))))
    if missing := [row for row, values in enumerate(chosen) if any(values[name] is None for name in wanted)]:
        raise invalid("dataset", f"row {missing[0]} without a text", f"{', '.join(wanted)} in every row")
    texts = [template.format(**row) for row in chosen]
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
    from ..analysis.attention_causal import causal_check
    from ..analysis.attention_measurement import measure_attention
    from ..core.console import say
    from ..core.head import causal_lm_head

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


def _check_tuned(options: argparse.Namespace) -> None:
    """Refuses a tuned model that cannot be compared, before the base model is measured for minutes."""
    from transformers import AutoConfig

    if _is_adapter(options.tuned):
        return
    AutoConfig.from_pretrained(options.tuned, trust_remote_code=options.trust_remote_code)
    ours = _tokenizer(options.base, options).get_vocab()
    try:
        theirs = _tokenizer(options.tuned, options).get_vocab()
    except (OSError, ValueError):  # what transformers raises where there are no files of a tokenizer
        return
    if different := [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]:
        got = f"{options.tuned}, whose tokenizer has another id for {len(different)} tokens ({min(different)!r})"
        raise invalid("tuned", got, "a model with the tokenizer of BASE", "Attention is compared token by token.")


def _load_base(options: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    return _load(options.base, options), _tokenizer(options.base, options)


def _load_tuned(options: argparse.Namespace) -> tuple[Any, PreTrainedTokenizerBase]:
    if not _is_adapter(options.tuned):
        return _load(options.tuned, options), _tokenizer(options.base, options)
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(_load(options.base, options), options.tuned)
    except RuntimeError as error:  # tensors of another shape
        raise invalid("tuned", options.tuned, f"an adapter of {options.base}", " ".join(str(error).split())) from error
    return model, _tokenizer(options.base, options)


def _report(
    options: argparse.Namespace,
    texts: list[str],
    before: AttentionMeasurement,
    after: AttentionMeasurement,
    name: str,
    folder: Path,
) -> None:
    from ..analysis.attention_comparison import compare_attention
    from ..analysis.attention_plots import draw_all
    from ..analysis.pictures import write_csv
    from ..core.console import say
    from ..core.files import write_atomic

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
