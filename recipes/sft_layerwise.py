"""
Supervised fine-tuning of a part of the layers at a time, chosen anew again and again.

    accelerate launch recipes/sft_layerwise.py            # the embedded demo: no download, two minutes on CPU
    accelerate launch recipes/sft_layerwise.py --config recipes/configs/sft_layerwise/gsm8k_full.yaml
    accelerate launch recipes/sft_layerwise.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name my.jsonl \
        --prompt_column question --completion_column answer --layerwise_active_fraction 0.25 --output_dir out

Arguments are TRL's (`ScriptArguments`, `SFTConfig`, `ModelConfig`), those of `DataArguments`, and every field of
`LayerwiseConfig` with `layerwise_` before it. With `--use_peft true` the adapters of a layer are what learns or is
frozen. A YAML file sets defaults, the command line wins, an unknown name is an error. A new run refuses a folder with
checkpoints of an earlier one; without checkpoints the folder is used again.
"""

import copy
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from hf_curriculum import LayerFreezeCallback, LayerwiseConfig
from hf_curriculum.analysis.layer_plots import plot_layer_map
from hf_curriculum.core.console import say, show_table
from hf_curriculum.core.distributed import check_launch, end_processes
from hf_curriculum.core.errors import invalid
from hf_curriculum.core.records import RECORD_FOLDER
from hf_curriculum.demo.base import arithmetic_beginner
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.layerwise.report import read_layers, show_layers, show_static, static_layers
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


DEMO_CONFIG = Path(__file__).parent / "configs" / "sft_layerwise" / "demo.yaml"


@dataclass
class RunArguments:
    """What this script does beside training."""

    layerwise_compare: bool | None = field(
        default=None,
        metadata={
            "help": "Train with nothing frozen first, in `<output_dir>/nothing_frozen`, and show both in one table. "
            "None: in the demo, where that can be done."
        },
    )
    demo_base_steps: int = field(
        default=100,
        metadata={"help": "Steps that the embedded model is trained on easy problems, before the run begins."},
    )

    def __post_init__(self) -> None:
        if self.demo_base_steps < 0:
            raise invalid("demo_base_steps", self.demo_base_steps, "an integer >= 0")


def make_parser() -> TrlParser:
    """Builds the parser."""
    layerwise = prefixed_arguments(LayerwiseConfig, "layerwise_")
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DataArguments, RunArguments, layerwise))
    set_cpu_defaults(parser)
    parser.set_defaults(output_dir="outputs/sft_layerwise")
    return parser


def load_data(script: ScriptArguments, data: DataArguments, training: SFTConfig) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows as they are stored; the embedded corpus without a name."""
    if script.dataset_name is None:
        train, test = generate_corpus(data.demo_rows, seed=training.seed), None
    else:
        train, test = load_splits(script)
    return hold_out(train, data.eval_fraction, training.seed) if test is None else (train, test)


def is_compared(script: ScriptArguments, training: SFTConfig, run: RunArguments) -> bool:
    """Whether a run with nothing frozen comes first; refuses one that is asked for and cannot be made."""
    problem = None
    if training.eval_strategy == "no" or not training.eval_on_start:
        fix = "Set `--eval_strategy epoch --eval_on_start true`."
        problem = "without evaluations before and after training", fix
    elif training.deepspeed_plugin is not None:
        problem = "under DeepSpeed, where a process trains once", "Train a second time with `SFTTrainer` alone."
    elif resume_argument(training):
        problem = "in a resumed run", "The other run is that of the interrupted one, in `nothing_frozen`."
    if run.layerwise_compare and problem is not None:
        when, fix = problem
        raise invalid("layerwise_compare", True, f"False {when}", fix)
    if run.layerwise_compare is None:
        return script.dataset_name is None and problem is None
    return run.layerwise_compare


def evaluation_losses(trainer: SFTTrainer) -> list[float]:
    """The losses of all evaluations of a run, in order."""
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def show_losses(losses: dict[str, list[float]]) -> None:
    """Holds the evaluation losses of runs against one another."""
    rows: list[list[object]] = [[name, values[0], values[-1]] for name, values in losses.items() if values]
    if rows:
        title = "Evaluation loss, first and last, at the same steps and learning rate (each may have a better one)"
        show_table(title, ("", "first", "last"), rows)


def report(training: SFTConfig) -> None:
    """Shows which layers learned when, as a table, a picture and a static choice."""
    layers = read_layers(str(training.output_dir))
    show_layers(layers)
    if layers.num_warmup < len(layers.active):
        show_static(static_layers(str(training.output_dir)))
    if find_spec("matplotlib") is None:
        say('No picture of the layers: it needs `pip install "hf_curriculum[plots]"`.')
    else:
        path = Path(str(training.output_dir)) / RECORD_FOLDER / "layers.png"
        say(f"Heat-map of steps and layers in {plot_layer_map(path=path, **layers.picture())}.")


def main(
    script: ScriptArguments,
    training: SFTConfig,
    model_args: ModelConfig,
    data: DataArguments,
    run: RunArguments,
    layerwise: LayerwiseConfig,
) -> None:
    """Trains, reports, saves."""
    compared = is_compared(script, training, run)
    set_cpu_threads(training, data.cpu_threads)
    check_output_dir(training)
    model, tokenizer = named_model(model_args, script, training) or arithmetic_beginner(
        run.demo_base_steps, training.seed
    )
    train, test = (
        None if rows is None else to_prompt_completion(rows, data, tokenizer)
        for rows in load_data(script, data, training)
    )

    def build_trainer(output_dir: str) -> SFTTrainer:
        args = copy.copy(training)
        args.output_dir = output_dir
        trainer = SFTTrainer(
            model=model if isinstance(model, str) else copy.deepcopy(model),
            args=args,
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        check_launch(trainer.accelerator)
        return trainer

    losses = {}
    if compared:
        say("First with nothing frozen:")
        without = build_trainer(f"{training.output_dir}/nothing_frozen")
        without.train()
        losses["nothing frozen"] = evaluation_losses(without)
        del without
        say("Now layer by layer:")
    trainer = build_trainer(str(training.output_dir))
    callback = LayerFreezeCallback(config=layerwise)
    # Adds the callback as `callbacks=` would and, under DeepSpeed, gives the optimizer a group for each block.
    callback.attach(trainer)
    trainer.train(resume_from_checkpoint=resume_argument(training))
    losses[f"policy {layerwise.policy}, {layerwise.active_fraction:.0%} of the layers"] = evaluation_losses(trainer)
    if trainer.is_world_process_zero():
        report(training)
        show_losses(losses)
    trainer.save_model(training.output_dir)
    say(f"Model saved to {training.output_dir}, run record to {Path(str(training.output_dir)) / RECORD_FOLDER}.")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
        say(f"Pushed to https://huggingface.co/{trainer.hub_model_id}.")


if __name__ == "__main__":
    *parsed, layerwise_arguments = make_parser().parse_args_and_config(command_line(sys.argv[1:], DEMO_CONFIG))
    main(*parsed, config_from_arguments(LayerwiseConfig, "layerwise_", layerwise_arguments))
    end_processes()
