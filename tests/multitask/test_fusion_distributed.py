"""Stages of attention fusion on two processes: like one process, equal on all ranks, killed and resumed."""

import json
from pathlib import Path

import numpy as np
import pytest


WORKER = Path(__file__).with_name("fusion_worker.py")
BACKENDS = {
    "ddp_cpu.yaml": "MULTI_CPU 2",
    "zero2.yaml": "DEEPSPEED-2 2",
    "zero3.yaml": "DEEPSPEED-3 2",
}
MOVED = {
    "tasks": ["lora", "own_classifier"],
    "fusion": ["classifier", "fusion"],
    "joint": ["classifier", "fusion", "lora"],
}

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def outcome(text, key):
    (line,) = [line for line in text.splitlines() if line.startswith(key + " ")]
    return json.loads(line.removeprefix(key + " "))


def check_parts(text, stage):
    assert outcome(text, "FROZEN") is True
    assert outcome(text, "MOVED") == MOVED[stage]


@pytest.mark.parametrize(
    ("config", "level", "stage", "options"),
    [
        ("ddp_cpu.yaml", "output", "fusion", ["cached"]),
        ("zero3.yaml", "output", "joint", []),
        *(
            pytest.param(*values, marks=pytest.mark.matrix)
            for values in [
                ("ddp_cpu.yaml", "output", "tasks", []),
                ("ddp_cpu.yaml", "output", "joint", ["--reentrant", "no"]),
                ("ddp_cpu.yaml", "layer", "fusion", []),
                ("zero2.yaml", "output", "fusion", ["cached"]),
                ("zero2.yaml", "layer", "joint", []),
                ("zero3.yaml", "output", "tasks", ["--reentrant", "yes"]),
                ("zero3.yaml", "output", "fusion", ["cached"]),
                ("zero3.yaml", "layer", "joint", ["--reentrant", "no"]),
            ]
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else value,
)
def test_two_processes_train_as_one(launch, tmp_path, config, level, stage, options):
    # ZeRO moves what belongs to tasks that a step has no row of; one process and DDP do not.
    sampling = "proportional" if config == "ddp_cpu.yaml" else "round_robin"
    common = ["--level", level, "--stage", stage, "--sampling", sampling]
    own = [option for option in options if option != "cached"]
    one = launch(WORKER, 1, args=[*common, "--output_dir", str(tmp_path / "one"), "--per_device", "6"]).stdout
    if "cached" in options:
        own += ["--cache", str(tmp_path / "cache")]
    args = [*common, *own, "--output_dir", str(tmp_path / "two"), "--expect", BACKENDS[config]]
    two = launch(WORKER, 2, args=args, config=config).stdout
    assert outcome(two, "STEPS") == outcome(one, "STEPS") == 14
    np.testing.assert_allclose(outcome(two, "LOSSES"), outcome(one, "LOSSES"), rtol=1e-3)
    # The first steps, before rounding has been multiplied by training.
    np.testing.assert_allclose(outcome(two, "LOSSES")[:3], outcome(one, "LOSSES")[:3], rtol=1e-5)
    if "cached" not in options:
        theirs = outcome(one, "EVALUATION")
        assert outcome(two, "EVALUATION") == pytest.approx(theirs, rel=1e-3)
    for text in (one, two):
        check_parts(text, stage)
    if config != "zero3.yaml":
        assert len(set(outcome(two, "RANKS"))) == 1


def killed_and_resumed(launch, tmp_path, num_processes, config, *options):
    """What a whole run wrote, and one that was killed after step 10 and resumed."""
    options = [*options, *(["--expect", BACKENDS[config]] if config else [])]
    whole = launch(WORKER, num_processes, args=["--output_dir", str(tmp_path / "whole"), *options], config=config)
    broken = ["--output_dir", str(tmp_path / "broken"), *options]
    killed = launch(WORKER, num_processes, args=[*broken, "--kill_at", "10"], config=config, check=False)
    assert killed.returncode != 0
    resumed = launch(WORKER, num_processes, args=[*broken, "--resume"], config=config)
    assert "checkpoint-8, the newest complete checkpoint" in resumed.stdout
    return whole.stdout, resumed.stdout


@pytest.mark.parametrize(
    ("config", "level", "stage", "cached"),
    [
        ("ddp_cpu.yaml", "output", "joint", False),
        pytest.param("ddp_cpu.yaml", "output", "fusion", True, marks=pytest.mark.matrix),
        ("zero2.yaml", "layer", "tasks", False),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(launch, tmp_path, config, level, stage, cached):
    options = ["--level", level, "--stage", stage, "--dropout", "0.1"]
    if cached:
        options += ["--cache", str(tmp_path / "cache")]
    whole, resumed = killed_and_resumed(launch, tmp_path, 2, config, *options)
    for key in ("STEPS", "WEIGHTS", "EVALUATION", "LOSSES", "MOVED"):
        assert outcome(resumed, key) == outcome(whole, key), key


@pytest.mark.matrix
def test_resumed_under_zero_3_goes_on_with_the_same_losses(launch, tmp_path):
    whole, resumed = killed_and_resumed(launch, tmp_path, 2, "zero3.yaml", "--stage", "joint")
    assert outcome(resumed, "STEPS") == outcome(whole, "STEPS")
    for key in ("EVALUATION", "LOSSES"):
        found, expected = outcome(resumed, key), outcome(whole, key)
        if key == "EVALUATION":
            assert found == pytest.approx(expected, rel=1e-5)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-5)
