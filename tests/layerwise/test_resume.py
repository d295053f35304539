"""A run with frozen layers that is killed and resumed makes the decisions and has the weights of a whole one."""

import json
from pathlib import Path

import numpy as np
import pytest


WORKER = Path(__file__).with_name("resume_worker.py")
EXPECT = {None: "MULTI_CPU 2", **{f"zero{stage}.yaml": f"DEEPSPEED-{stage} 2" for stage in (1, 2, 3)}}

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def outcome(text, key):
    (line,) = [line for line in text.splitlines() if line.startswith(key + " ")]
    return line.removeprefix(key + " ")


def whole_and_resumed(launch, tmp_path, num_processes, config, kills, *options):
    """What a whole run wrote, and each one that was killed at a step and resumed."""
    if num_processes > 1:
        options = (*options, "--expect", EXPECT[config])
    args = ["--output_dir", str(tmp_path / "whole"), *options]
    whole = launch(WORKER, num_processes, args=args, config=config).stdout
    assert json.loads(outcome(whole, "STEPS")) == 21
    resumed = []
    for step in kills:
        args = ["--output_dir", str(tmp_path / f"killed-{step}"), *options]
        killed = launch(WORKER, num_processes, args=[*args, "--kill_at", str(step)], config=config, check=False)
        assert killed.returncode != 0
        assert "STEPS" not in killed.stdout
        resumed.append(launch(WORKER, num_processes, args=[*args, "--resume"], config=config).stdout)
    return whole, resumed


# A window ends at steps 6, 10, 14 and 18, and a checkpoint is written every 5 steps: after 13 the last one was written
# at a decision, after 17 between two.
@pytest.mark.parametrize(
    ("num_processes", "config", "kills", "options"),
    [
        pytest.param(1, None, (13, 17), (), id="one-process"),
        pytest.param(1, None, (17,), ("--lora",), id="one-process-lora"),
        pytest.param(1, None, (17,), ("--trainer", "curriculum", "--lora"), id="one-process-curriculum-lora"),
        pytest.param(2, None, (17,), ("--trainer", "curriculum"), id="ddp-curriculum"),
        pytest.param(2, "zero2.yaml", (17,), ("--attach",), id="zero-2"),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(launch, tmp_path, num_processes, config, kills, options):
    whole, resumed = whole_and_resumed(launch, tmp_path, num_processes, config, kills, *options)
    for text in resumed:
        for key in ("DECISIONS", "SCORES", "LOSSES", "WEIGHTS"):
            assert outcome(text, key) == outcome(whole, key), key


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("trainer", "lora", "policy"),
    [
        ("plain", False, "adaptive"),
        ("plain", True, "adaptive"),
        ("plain", False, "random"),
        ("plain", False, "gradient"),
        ("curriculum", False, "adaptive"),
        ("curriculum", True, "gradient"),
    ],
)
@pytest.mark.parametrize(
    ("num_processes", "config"), [(1, None), (2, None), (2, "zero1.yaml"), (2, "zero2.yaml")],
    ids=["one-process", "ddp", "zero-1", "zero-2"],
)  # fmt: skip
def test_every_combination_killed_and_resumed(launch, tmp_path, num_processes, config, trainer, lora, policy):
    options = ["--trainer", trainer, "--policy", policy, *(["--lora"] if lora else [])]
    options += ["--attach"] if config else []
    whole, resumed = whole_and_resumed(launch, tmp_path, num_processes, config, (13, 17), *options)
    for text in resumed:
        for key in ("DECISIONS", "SCORES", "LOSSES", "WEIGHTS"):
            assert outcome(text, key) == outcome(whole, key), key


@pytest.mark.parametrize("policy", ["adaptive", "random"])
def test_resumed_under_zero_3_makes_the_same_decisions_and_losses(launch, tmp_path, policy):
    whole, (text,) = whole_and_resumed(launch, tmp_path, 2, "zero3.yaml", (17,), "--attach", "--policy", policy)
    assert outcome(text, "DECISIONS") == outcome(whole, "DECISIONS")
    losses = [json.loads(outcome(each, "LOSSES")) for each in (whole, text)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
