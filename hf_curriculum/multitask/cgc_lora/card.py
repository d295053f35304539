"""What an adapter's card says about loading it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ...core.files import write_atomic


__all__ = ["add_loading_section"]

HEADING = "## Loading this adapter"


def add_loading_section(folder: str | os.PathLike[str], task_names: Sequence[str]) -> None:
    """
    Writes into `README.md` the import that loading needs; does nothing where it already stands.

    Args:
        folder (`str` or `os.PathLike`):
            The adapter's folder. The card is made when there is none.
        task_names (`Sequence[str]`):
            Names of the tasks.
    """
    path = Path(folder) / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else "---\nlibrary_name: peft\n---\n"
    if HEADING in card:
        return
    section = f"""
{HEADING}

This is a CGC-LoRA adapter, a PEFT method of the package `hf_curriculum`. PEFT alone does not know its type `CGC_LORA`
and refuses to load it: import the package's name first.

```python
from hf_curriculum import CGCLoraModel  # makes the type known to PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/adapter")
model.generate(**inputs, tasks={task_names[0]!r})
```

Tasks: {", ".join(f"`{name}`" for name in task_names)}.
`hf_curriculum.export_task_adapters(model, folder)` writes one standard LoRA adapter per task, which need PEFT alone.
"""
    text = card.rstrip("\n") + "\n" + section
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))
