"""
Supervised fine-tuning in order of difficulty, without forgetting what came first.

    accelerate launch recipes/sft_curriculum.py            # the embedded demo: no download, minutes on CPU
    accelerate launch recipes/sft_curriculum.py --config recipes/configs/sft_curriculum/gsm8k_lora.yaml
    accelerate launch recipes/sft_curriculum.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my.jsonl \
        --prompt_column question --completion_column answer --output_dir out

Arguments are TRL's (`ScriptArguments`, `SFTConfig`, `ModelConfig`), those of `DataArguments`, and every field of
`CurriculumConfig` with `curriculum_` and of `DistillationConfig` with `distillation_` before it. A YAML file sets
defaults, the command line wins, an unknown name is an error. A new run refuses a folder with checkpoints of an earlier
one; without checkpoints the folder is used again.
"""

import copy
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config, get_quantization_config

from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer, DistillationConfig, score_dataset
from hf_curriculum.core.console import say, show_table
from hf_curriculum.core.distributed import end_processes, on_main_process
from hf_curriculum.core.errors import invalid, unsupported
from hf_curriculum.core.ranks import spearman
from hf_curriculum.curriculum.dataset import check_dataset
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer
from hf_curriculum.recipe import (
    DataArguments,
    check_output_dir,
    command_line,
    config_from_arguments,
    named_model,
    prefixed_arguments,
    resume_argument,
    set_cpu_defaults,
    set_cpu_threads,
)
from hf_curriculum.recipe_data import hold_out, load_splits, to_prompt_completion


DEMO_CONFIG = Path(__file__).parent / "configs" / "sft_curriculum" / "demo.yaml"


@dataclass
class RunArguments:
    """What this script does beside training."""

    curriculum_score_only: bool = field(
        default=False,
        metadata={
            "help": "Score the data set into `<output_dir>/scored` and stop. `--dataset_name <output_dir>/scored "
            "--curriculum_scorer column` then trains on it, under ZeRO-3 too."
        },
    )
    distillation_compare: bool | None = field(
        default=None,
        metadata={
            "help": "Train without the teacher first, in `<output_dir>/_without_teacher`, and show both in one table. "
            "None: in the demo, where that can be done."
        },
    )


def make_parser() -> TrlParser:
    """Builds the parser."""
    curriculum = prefixed_arguments(CurriculumConfig, "curriculum_")
    distillation = prefixed_arguments(DistillationConfig, "distillation_")
    parser = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig, DataArguments, RunArguments, curriculum, distillation)
    )
    set_cpu_defaults(parser)
    parser.set_defaults(output_dir="outputs/sft_curriculum", distillation_teacher="none")
    return parser


def embedded_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of the demo."""
    tokenizer = build_tokenizer()
    return build_model(tokenizer, seed=seed), tokenizer


def load_data(script: ScriptArguments, data: DataArguments, training: SFTConfig) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows as they are stored; the embedded corpus without a name."""
    if script.dataset_name is None:
        train, test = generate_corpus(data.demo_rows, seed=training.seed), None
    else:
        train, test = load_splits(script)
    check_dataset(train, "dataset_name")
    return hold_out(train, data.eval_fraction, training.seed) if test is None else (train, test)


def score_only(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    test: Dataset | None,
    data: DataArguments,
    training: SFTConfig,
    curriculum: CurriculumConfig,
) -> None:
    """Scores training and evaluation rows with one probe and saves them as they are stored, with their scores."""
    stored = train if test is None else concatenate_datasets([train, test.select_columns(train.column_names)])
    scored = score_dataset(
        model,
        to_prompt_completion(stored, data, tokenizer),
        processing_class=tokenizer,
        args=training,
        config=curriculum,
        held_out=np.arange(len(stored)) >= len(train),
    )
    for column in ("sample_id", "difficulty"):
        stored = stored.remove_columns(column) if column in stored.column_names else stored
        stored = stored.add_column(column, scored[column][:])
    splits = DatasetDict({"train": stored.select(range(len(train)))})
    if test is not None:
        splits["test"] = stored.select(range(len(train), len(stored)))
    folder = Path(training.output_dir) / "scored"

    def save() -> None:
        unfinished = folder.with_name("scored.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        splits.save_to_disk(unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)

    on_main_process(save)
    say(f"Scored data set saved to {folder}. Train on it: --dataset_name {folder} --curriculum_scorer column")


def show_grades(trainer: CurriculumSFTTrainer) -> None:
    """Holds the measured difficulty against the grade that the embedded corpus was generated with."""
    grades = np.asarray(trainer.train_dataset["grade"][:])
    lengths = np.asarray([len(ids) for ids in trainer.train_dataset["input_ids"]])
    rows = [
        [level, int(mask.sum()), float(trainer.difficulty[mask].mean()), float(grades[mask].mean())]
        for level in range(trainer.curriculum.num_levels)
        if (mask := trainer.levels == level).any()
    ]
    show_table(
        f"Levels against the known grade: Spearman {spearman(trainer.difficulty, grades):.2f} "
        f"(length alone: {spearman(lengths, grades):.2f})",
        ("level", "rows", "mean difficulty", "mean grade"),
        rows,
    )


def show_teacher_effect(without: CurriculumSFTTrainer, trainer: CurriculumSFTTrainer) -> None:
    """Holds the losses of every level at the end of the run against those without the teacher."""
    levels = range(trainer.curriculum.num_levels)
    rows: list[list[object]] = []
    for name, measured in (("without teacher", without.level_matrix), ("with teacher", trainer.level_matrix)):
        summary = measured.forgetting()
        rows.append(
            [name, *measured.matrix("loss")[-1].tolist(), summary["eval_loss_acc"], summary.get("eval_loss_bwt")]
        )
    show_table(
        "Loss by level at the end: what the teacher changed",
        ("", *(f"level {level}" for level in levels), "ACC (mean)", "BWT (< 0: forgotten)"),
        rows,
    )


def is_compared(
    script: ScriptArguments, training: SFTConfig, run: RunArguments, distillation: DistillationConfig
) -> bool:
    """Whether a run without the teacher comes first; refuses one that is asked for and cannot be made."""
    problem = None
    if not distillation.enabled:
        problem = "without a teacher", "Set `--distillation_teacher`."
    elif training.deepspeed_plugin is not None:
        problem = "under DeepSpeed, where a process trains once", "Train a second time without the teacher."
    elif resume_argument(training):
        fix = "The run without the teacher is that of the interrupted one: see its record in `_without_teacher`."
        problem = "in a resumed run", fix
    if run.distillation_compare and problem is not None:
        when, fix = problem
        raise invalid("distillation_compare", True, f"False {when}", fix)
    if run.distillation_compare is None:
        return script.dataset_name is None and problem is None
    return run.distillation_compare


def main(
    script: ScriptArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    data: DataArguments,
    run: RunArguments,
    curriculum: CurriculumConfig,
    distillation: DistillationConfig,
) -> None:
    """Scores, trains, reports, saves."""
    if run.curriculum_score_only and get_quantization_config(model_args) is not None:
        raise unsupported(
            "`curriculum_score_only` with a quantized model",
            "scores are measured on the model as `--dtype` loads it",
            "Leave the quantization out of the scoring run.",
        )
    compared = is_compared(script, training, run, distillation)
    set_cpu_threads(training, data.cpu_threads)
    check_output_dir(training)
    model, tokenizer = named_model(model_args, script, training) or embedded_model(training.seed)
    train, test = load_data(script, data, training)
    if run.curriculum_score_only:
        score_only(model, tokenizer, train, test, data, training, curriculum)
        return
    train, test = (None if rows is None else to_prompt_completion(rows, data, tokenizer) for rows in (train, test))

    def build_trainer(teacher: DistillationConfig, output_dir: str, push_to_hub: bool) -> CurriculumSFTTrainer:
        args = copy.copy(training)
        args.output_dir, args.push_to_hub = output_dir, push_to_hub
        return CurriculumSFTTrainer(
            model=model if isinstance(model, str) else copy.deepcopy(model),
            args=args,
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            curriculum=curriculum,
            distillation=teacher,
        )

    without = None
    if compared:
        # With an underscore, so that the other trainer does not push it to the Hub with the rest of the folder.
        without = build_trainer(DistillationConfig(teacher="none"), f"{training.output_dir}/_without_teacher", False)
        say("First without the teacher:")
        without.train()
        say("Now with the teacher:")
    trainer = build_trainer(distillation, training.output_dir, training.push_to_hub)
    trainer.train(resume_from_checkpoint=resume_argument(training))
    if without is not None:
        show_teacher_effect(without, trainer)
    if script.dataset_name is None:
        show_grades(trainer)
    trainer.save_model(training.output_dir)
    say(f"Model saved to {training.output_dir}, run record and plan to {trainer.record.folder}.")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
        say(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")


if __name__ == "__main__":
    *parsed, curriculum_arguments, distillation_arguments = make_parser().parse_args_and_config(
        command_line(sys.argv[1:], DEMO_CONFIG)
    )
    main(
        *parsed,
        config_from_arguments(CurriculumConfig, "curriculum_", curriculum_arguments),
        config_from_arguments(DistillationConfig, "distillation_", distillation_arguments),
    )
    end_processes()
