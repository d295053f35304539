import importlib
import inspect
from pathlib import Path

import pytest

from hf_curriculum.core.seams import PRIVATE_SEAMS


def installed_signature(name):
    module, class_name, method = name.rsplit(".", 2)
    parameters = inspect.signature(getattr(getattr(importlib.import_module(module), class_name), method)).parameters
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters.values()]
    return str(inspect.Signature(bare)).replace(" = ", "=")


@pytest.mark.parametrize("name", PRIVATE_SEAMS)
def test_private_seam_is_where_it_was(name):
    assert installed_signature(name) == PRIVATE_SEAMS[name]


def test_every_private_name_of_the_trainers_that_is_used_is_listed(repository: Path):
    import ast

    from transformers import Trainer
    from trl import SFTTrainer

    private = {name for cls in (Trainer, SFTTrainer) for name in vars(cls) if name.startswith("_") and name[1] != "_"}
    used = set()
    for path in (repository / "hf_curriculum").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in private:
                used.add(node.attr)
            if isinstance(node, ast.ClassDef):
                used |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)} & private
    of_trainers = (name for name in PRIVATE_SEAMS if name.startswith(("transformers.", "trl.")))
    assert used == {name.rsplit(".", 1)[1] for name in of_trainers}
