"""A run with frozen layers that is killed and resumed makes the decisions and has the weights of a whole one."""

import json
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("resume_worker.py")
EXPECT = {None: "MULTI_CPU 2", **{f"zero{stage}.yaml": f"DEEPSPEED-{stage} 2" for stage in (1, 2, 3)}}
COMBINATIONS = [
    ("plain", False, "adaptive"),
    ("plain", True, "adaptive"),
    ("plain", False, "random"),
    ("plain", False, "gradient"),
    ("curriculum", False, "adaptive"),
    ("curriculum", True, "gradient"),
]

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def outcome(text, key):
    (line,) = [line for line in text.splitlines() if line.startswith(key + " ")]
    return line.removeprefix(key + " ")


def check_resumed(launch, tmp_path, num_processes, config, kills, *options):
    """A run that was killed at a step and resumed ends with what a whole one ends with, bit by bit."""
    if num_processes > 1:
        options = (*options, "--expect", EXPECT[config])
    args = ["--output_dir", str(tmp_path / "whole"), *options]
    whole = launch(WORKER, num_processes, args=args, config=config).stdout
    assert json.loads(outcome(whole, "STEPS")) == 21
    for step in kills:
        args = ["--output_dir", str(tmp_path / f"killed-{step}"), *options]
        killed = launch(WORKER, num_processes, args=[*args, "--kill_at", str(step)], config=config, check=False)
        assert killed.returncode != 0
        assert "STEPS" not in killed.stdout
        resumed = launch(WORKER, num_processes, args=[*args, "--resume"], config=config).stdout
        for key in ("DECISIONS", "SCORES", "LOSSES", "WEIGHTS"):
            assert outcome(resumed, key) == outcome(whole, key), (step, key)


# Beside a curriculum and a teacher: tests/test_together.py.
# A window ends at steps 6, 10, 14 and 18, and a checkpoint is written every 5 steps: after 13 the last one was written
# at a decision, after 17 between two.
@pytest.mark.parametrize(
    ("num_processes", "config", "kills", "options"),
    [
        pytest.param(1, None, (13, 17), (), id="one-process"),
        pytest.param(1, None, (17,), ("--lora",), id="one-process-lora"),
        pytest.param(2, "zero2.yaml", (17,), ("--attach",), id="zero-2"),
        pytest.param(2, "zero2.yaml", (17,), ("--attach", "--lora"), id="zero-2-lora"),
        pytest.param(2, "zero3.yaml", (17,), ("--attach",), id="zero-3"),
        pytest.param(2, "zero3.yaml", (17,), ("--attach", "--lora", "--policy", "random"), id="zero-3-lora"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(launch, tmp_path, num_processes, config, kills, options):
    check_resumed(launch, tmp_path, num_processes, config, kills, *options)


@pytest.mark.matrix
@pytest.mark.parametrize(("trainer", "lora", "policy"), COMBINATIONS)
@pytest.mark.parametrize(
    ("num_processes", "config"),
    [(1, None), (2, None), (2, "zero1.yaml"), (2, "zero2.yaml"), (2, "zero3.yaml")],
    ids=["one-process", "ddp", "zero-1", "zero-2", "zero-3"],
)
def test_every_combination_killed_and_resumed(launch, tmp_path, num_processes, config, trainer, lora, policy):
    options = ["--trainer", trainer, "--policy", policy, *(["--lora"] if lora else [])]
    options += ["--attach"] if config else []
    check_resumed(launch, tmp_path, num_processes, config, (13, 17), *options)


@pytest.mark.matrix
@pytest.mark.parametrize("config", ["zero1.yaml", "zero2.yaml", "zero3.yaml"])
def test_the_best_adapters_are_loaded_whole_under_zero(launch, tmp_path, config):
    args = ["--output_dir", str(tmp_path / "best"), "--attach", "--lora", "--best", "--expect", EXPECT[config]]
    text = launch(WORKER, 2, args=args, config=config).stdout
    assert outcome(text, "BEST") == "5"
    assert json.loads(outcome(text, "SAVED")) == [5, 10, 15, 20, 21]


@pytest.mark.matrix
@pytest.mark.parametrize("config", ["zero1.yaml", "zero2.yaml", "zero3.yaml"])
def test_a_checkpoint_from_within_a_step_goes_on_with_the_adapters_that_were_frozen(launch, tmp_path, config):
    check_resumed(launch, tmp_path, 2, config, (17,), "--attach", "--lora", "--save_within", "15")
