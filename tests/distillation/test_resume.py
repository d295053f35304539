"""A run with a teacher that is killed and resumed ends with the weights of one that was not."""

import json
from pathlib import Path

import numpy as np
import pytest


WORKER = Path(__file__).parent.parent / "curriculum" / "train_worker.py"


def outcomes(text, key):
    return [line.removeprefix(key + " ") for line in text.splitlines() if line.startswith(key + " ")]


def outcome(text, key):
    (line,) = outcomes(text, key)
    return line


# 96 rows in three levels, a quarter replayed: 28 steps of 4 rows with stage ends at 8, 18, 28, or 14 of 8 with ends at
# 4, 9, 14; a checkpoint every 4 steps, one kept.
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_processes", "config", "kill_at", "distillation", "lora"),
    [
        pytest.param(1, None, 22, {}, False, id="one-process"),
        pytest.param(1, None, 22, {"teacher_cache": "top_k", "cache_top_k": 8}, True, id="one-process-lora-cache"),
        pytest.param(1, None, 22, {"teacher": "ema", "ema_decay": 0.9}, True, id="one-process-lora-ema"),
        pytest.param(2, None, 13, {}, False, id="ddp"),
        pytest.param(2, "zero2.yaml", 13, {}, False, id="zero-2"),
    ],
)
def test_killed_in_the_third_stage_and_resumed_equals_uninterrupted(
    launch, tmp_path, num_processes, config, kill_at, distillation, lora
):
    extra = ["--distillation", json.dumps(distillation or {"alpha": 0.5}), *(["--lora"] if lora else [])]
    whole = launch(WORKER, num_processes, args=["--output_dir", str(tmp_path / "whole"), *extra], config=config)
    broken = ["--output_dir", str(tmp_path / "broken"), *extra]
    killed = launch(WORKER, num_processes, args=[*broken, "--kill_at", str(kill_at)], config=config, check=False)
    assert killed.returncode != 0
    resumed = launch(WORKER, num_processes, args=[*broken, "--resume"], config=config)
    assert f"checkpoint-{kill_at // 4 * 4}, the newest complete checkpoint" in resumed.stdout
    for key in ("STEPS", "WEIGHTS", "MATRIX"):
        assert outcome(resumed.stdout, key) == outcome(whole.stdout, key), key


@pytest.mark.slow
@pytest.mark.distributed
def test_resumed_under_zero_3_goes_on_with_the_same_losses(launch, tmp_path):
    extra = ["--distillation", '{"alpha": 0.5}', "--print_losses", "--dropout", "0"]
    whole = launch(WORKER, 2, args=["--output_dir", str(tmp_path / "whole"), *extra], config="zero3.yaml")
    broken = ["--output_dir", str(tmp_path / "broken"), *extra]
    launch(WORKER, 2, args=[*broken, "--kill_at", "13"], config="zero3.yaml", check=False)
    resumed = launch(WORKER, 2, args=[*broken, "--resume"], config="zero3.yaml")
    assert "checkpoint-12, the newest complete checkpoint" in resumed.stdout
    for key in ("LOSSES", "DIVERGENCES"):
        expected, found = (json.loads(outcome(run.stdout, key).replace("None", "NaN")) for run in (whole, resumed))
        np.testing.assert_allclose(found[-2:], expected[-2:], rtol=1e-5, err_msg=key)
