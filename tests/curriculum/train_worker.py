"""Trains the embedded model on a small plan; can kill itself, resume, and print what came out."""

import argparse
import hashlib
import json
import os
import signal

import torch
from transformers import TrainerCallback
from trl import SFTConfig

from hf_curriculum import CurriculumConfig, CurriculumSFTTrainer, DistillationConfig
from hf_curriculum.core.distributed import end_processes
from hf_curriculum.demo.corpus import generate_corpus
from hf_curriculum.demo.model import build_model, build_tokenizer


class KillAt(TrainerCallback):
    """Ends the process as `kill -9` does, once a number of optimizer steps is done."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class TeacherDigest(TrainerCallback):
    """Prints a hash of what the teacher says about a fixed batch, after every optimizer step."""

    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        teacher = self.trainer._keeper.teacher
        if teacher is None:
            return
        rows = [self.trainer.train_dataset[row] for row in range(3)]
        batch = self.trainer.data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])
        hidden = teacher.hidden(self.trainer.model_wrapped, dict(batch)).float()
        digest = hashlib.sha256(hidden.numpy().tobytes()).hexdigest()
        if self.trainer.is_world_process_zero():
            print("TEACHER", state.global_step, digest, flush=True)


class Trainer(CurriculumSFTTrainer):
    """Can end in the middle of writing a checkpoint: model and optimizer are there, the rest is not."""

    kill_in_save = -1

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill_at", type=int, default=-1)
    parser.add_argument("--kill_in_save", type=int, default=-1)
    parser.add_argument("--per_device", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--print_losses", action="store_true")
    parser.add_argument("--scorer", default="length")
    parser.add_argument("--model_path")
    parser.add_argument("--expect")
    parser.add_argument("--distillation", type=json.loads, help="fields of DistillationConfig")
    parser.add_argument("--teacher_digest", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = options.model_path or build_model(tokenizer)
    if not options.model_path:
        model.config.attention_dropout = options.dropout
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = options.dropout
    peft_config = None
    if options.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, lora_dropout=options.dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=model,
        args=SFTConfig(
            output_dir=options.output_dir,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=options.per_device,
            gradient_accumulation_steps=options.accumulation,
            num_train_epochs=1,
            learning_rate=1e-2,
            save_steps=4,
            logging_steps=1,
            save_total_limit=1,
            dataloader_num_workers=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=generate_corpus(96, seed=0),
        eval_dataset=generate_corpus(12, seed=1),
        processing_class=tokenizer,
        peft_config=peft_config,
        curriculum=CurriculumConfig(scorer=options.scorer, num_levels=3, replay_fraction=0.25, use_cache=False),
        distillation=DistillationConfig(**options.distillation) if options.distillation else None,
        callbacks=[KillAt(options.kill_at)],
    )
    if options.teacher_digest:
        TeacherDigest.trainer = trainer
        trainer.add_callback(TeacherDigest)
    if options.expect:
        state = trainer.accelerator.state
        stage = f"-{state.deepspeed_plugin.zero_stage}" if state.deepspeed_plugin else ""
        assert f"{state.distributed_type.value}{stage} {state.num_processes}" == options.expect
    trainer.kill_in_save = options.kill_in_save
    trainer.train(resume_from_checkpoint=options.resume or None)
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    if trainer.is_world_process_zero():
        print("STEPS", trainer.state.global_step, flush=True)
        print("WEIGHTS", digest.hexdigest(), flush=True)
        print("MATRIX", trainer.level_matrix.matrix("loss").tolist(), flush=True)
        if options.print_losses:
            logged = [entry for entry in trainer.state.log_history if "loss" in entry]
            print("LOSSES", [entry["loss"] for entry in logged], flush=True)
            print("GRADIENTS", [entry["grad_norm"] for entry in logged], flush=True)
            print("DIVERGENCES", [entry.get("kd_loss") for entry in logged], flush=True)
    end_processes()


if __name__ == "__main__":
    main()
