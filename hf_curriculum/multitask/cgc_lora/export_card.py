"""The words that go with exported adapters."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..head_files import CONFIG_NAME, WEIGHTS_NAME


__all__ = ["TASK_MAP", "VLLM_MAX_LORA_RANKS", "folder_card", "serve_command"]

TASK_MAP = "tasks.json"

# Values that vLLM's `--max-lora-rank` takes (`MaxLoRARanks` in its configuration, version 0.14).
VLLM_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def serve_command(base_model: str, folder: Path, ranks: Mapping[str, int]) -> str:
    """
    The command that has vLLM serve exported adapters.

    Args:
        base_model (`str`):
            Name or path of the base model.
        folder (`Path`):
            Where the adapters are.
        ranks (`Mapping[str, int]`):
            By adapter, which is also the name of its folder.

    Returns:
        `str`: one line for a POSIX shell. Ranks above 512, which vLLM refuses, are followed by a comment that says so.
    """
    rank = max(ranks.values())
    allowed = next((value for value in VLLM_MAX_LORA_RANKS if value >= rank), None)
    adapters = " ".join(shlex.quote(f"{name}={folder / name}") for name in ranks)
    command = (
        f"vllm serve {shlex.quote(base_model)} --enable-lora --max-lora-rank {allowed or rank} "
        f"--max-loras {len(ranks)} --lora-modules {adapters}"
    )
    if allowed is None:
        command += f"  # vLLM takes ranks up to {VLLM_MAX_LORA_RANKS[-1]}: export with truncate_rank="
    return command


def folder_card(tasks: Iterable[str], command: str, has_modules: bool, has_heads: bool = False) -> str:
    """
    The `README.md` of an export.

    Args:
        tasks (`Iterable[str]`):
            Names of the tasks.
        command (`str`):
            From [`serve_command`].
        has_modules (`bool`):
            Whether the adapters carry modules trained in full.
        has_heads (`bool`, *optional*, defaults to `False`):
            Whether the heads of the tasks lie beside.

    Returns:
        `str`
    """
    refused = (
        "\nThe adapters carry `modules_to_save` or trained tokens, such as a classification head. PEFT loads them; "
        "vLLM refuses such adapters.\n"
        if has_modules
        else ""
    )
    beside = (
        f"\nEach task's folder also has its head, in `{WEIGHTS_NAME}` and `{CONFIG_NAME}`, which vLLM leaves alone: "
        "apply it to the hidden states, or load both with `MultiTaskHeads.from_pretrained` of `hf_curriculum`.\n"
        if has_heads
        else ""
    )
    return f"""# One LoRA adapter per task

Tasks: {", ".join(f"`{task}`" for task in tasks)}. `{TASK_MAP}` maps each task to its adapter; `common`, where it is
there, is for requests of no known task. Each folder is a standard LoRA adapter and needs PEFT alone:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "<task>")
```

To serve all of them:

```bash
{command}
```
{refused}{beside}"""
