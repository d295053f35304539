"""Two processes train the experts as one does: DDP, ZeRO-2, ZeRO-3, with checkpointing and ranks of unlike tasks."""

import json
from pathlib import Path

import numpy as np
import pytest


WORKER = """
import argparse, importlib.util, json, os
import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator
from hf_curriculum.core.distributed import end_processes
from hf_curriculum.multitask.cgc_lora import CGCLoraConfig
from hf_curriculum.multitask.absent import freeze_absent_tasks

parser = argparse.ArgumentParser()
parser.add_argument("--twin")
parser.add_argument("--folder")
parser.add_argument("--expect")
parser.add_argument("--guard", action="store_true")
parser.add_argument("--reentrant", action="store_true")
options = parser.parse_args()
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("cgc_twin", options.twin)
twin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(twin)

world = int(os.environ.get("WORLD_SIZE", 1))
args = TrainingArguments(
    output_dir=options.folder, use_cpu=True, per_device_train_batch_size=4 // world, max_steps=4, learning_rate=1e-2,
    weight_decay=0.1, logging_steps=1, save_strategy="no", report_to="none", remove_unused_columns=False,
    gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": options.reentrant},
    train_sampling_strategy="sequential", disable_tqdm=True, max_grad_norm=0.0, lr_scheduler_type="constant",
)
torch.manual_seed(3)
model = get_peft_model(twin.base_model("llama"), twin.make_config(gate="task_embedding"))
model.enable_input_require_grads()
generator = torch.Generator().manual_seed(0)
rows = []
# The first ranks of two get task 0 alone, the others task 1; task 2 comes in the first global batch only.
for number in range(16):
    ids = torch.randint(1, twin.VOCABULARY, (6,), generator=generator)
    task = 2 if number == 1 else (number // 2) % 2
    rows.append({"input_ids": ids, "labels": ids, "tasks": task})
trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=default_data_collator)
stage = getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None)
kind = "ZERO-" + str(stage) if stage is not None else ("DDP" if trainer.accelerator.num_processes > 1 else "ONE")
assert f"{kind} {trainer.accelerator.num_processes}" == options.expect, kind
own = {}
if options.guard:
    freeze_absent_tasks(trainer.create_optimizer(), model)

class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if options.guard:
            experts = next(iter(model.experts().values()))
            own[state.global_step] = experts.A[experts.layout.own_slice(2)].detach().clone()

trainer.add_callback(Watch())
trainer.train()
if options.guard:
    assert torch.equal(own[1], own[4])
state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
if trainer.is_world_process_zero():
    weights = {name: value for name, value in state.items() if "cgc_lora_" in name and "_extra_state" not in name}
    found = {name: value.double().norm().item() for name, value in weights.items()}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("FOUND", json.dumps({"losses": losses, "norms": found}), flush=True)
end_processes()
"""


def outcome(text: str) -> dict[str, object]:
    (line,) = [line for line in text.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "expect", "options"),
    [
        (None, "DDP 2", ["--guard"]),
        ("zero2.yaml", "ZERO-2 2", []),
        ("zero3.yaml", "ZERO-3 2", ["--reentrant"]),
    ],
    ids=["ddp", "zero2", "zero3"],
)
def test_two_processes_train_as_one(
    launch, tmp_path: Path, config: str | None, expect: str, options: list[str]
) -> None:
    common = ["--twin", str(Path(__file__).with_name("cgc_twin.py")), *options]
    one = launch(WORKER, 1, args=[*common, "--folder", str(tmp_path / "one"), "--expect", "ONE 1"]).stdout
    two = launch(
        WORKER, 2, config=config, args=[*common, "--folder", str(tmp_path / "two"), "--expect", expect]
    ).stdout
    first, second = outcome(one), outcome(two)
    assert len(first["losses"]) == 4
    np.testing.assert_allclose(second["losses"], first["losses"], rtol=1e-4)
    assert set(first["norms"]) == set(second["norms"])
    assert len(first["norms"]) == 6 * 4  # A, B, vectors and projection of six linears
    for name, norm in first["norms"].items():
        assert second["norms"][name] == pytest.approx(norm, rel=1e-3), name
