"""
CGC-LoRA (arXiv 2402.01684): task-common and task-specific LoRA experts under a gate that is customised per task.

Importing this package makes the method known to PEFT, under the type `CGC_LORA`.
"""

from .config import CGCLoraConfig
from .export import export_task_adapters
from .model import CGCLoraModel
from .registration import register_cgc_lora


__all__ = ["CGCLoraConfig", "CGCLoraModel", "export_task_adapters", "register_cgc_lora"]

register_cgc_lora()
