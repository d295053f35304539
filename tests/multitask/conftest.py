import importlib.util
from functools import partial
from pathlib import Path

import pytest

from hf_curriculum.demo.model import build_tokenizer


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("task_runs", Path(__file__).with_name("task_runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def build(tokenizer):
    """`make_trainer` of `task_runs.py` with the tokenizer."""
    return partial(runs.make_trainer, tokenizer)
