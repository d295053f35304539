"""The same run killed and resumed, and under every backend that starts on CPU."""

import json
from pathlib import Path

import numpy as np
import pytest


WORKER = Path(__file__).with_name("train_worker.py")
BACKENDS = {"ddp_cpu.yaml": "MULTI_CPU 2", "zero2.yaml": "DEEPSPEED-2 2", "zero3.yaml": "DEEPSPEED-3 2"}

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def outcome(text, key):
    (line,) = [line for line in text.splitlines() if line.startswith(key + " ")]
    return json.loads(line.removeprefix(key + " "))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(launch, tmp_path, num_processes):
    # 41 rows twice in global batches of 4 or 8: 21 or 11 steps, a checkpoint every 4 and a log every 3, so that the
    # losses of the tasks since the last log are in the checkpoint.
    whole = launch(WORKER, num_processes, args=["--output_dir", str(tmp_path / "whole")])
    broken = ["--output_dir", str(tmp_path / "broken")]
    killed = launch(WORKER, num_processes, args=[*broken, "--kill_at", "10"], check=False)
    assert killed.returncode != 0
    resumed = launch(WORKER, num_processes, args=[*broken, "--resume"])
    assert "checkpoint-8, the newest complete checkpoint" in resumed.stdout
    for key in ("STEPS", "WEIGHTS", "EVALUATION", "LOSSES"):
        assert outcome(resumed.stdout, key) == outcome(whole.stdout, key), key


@pytest.mark.parametrize("shared", [True, False], ids=["shared-lora", "cgc-lora"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_every_backend_has_the_losses_of_one_process(launch, tmp_path, packing, shared):
    common = ["--dropout", "0", *(["--packing"] if packing else []), *(["--shared_lora"] if shared else [])]
    one = launch(WORKER, 1, args=["--output_dir", str(tmp_path / "one"), "--per_device", "4", *common]).stdout
    for config, expected in BACKENDS.items():
        args = ["--output_dir", str(tmp_path / config), "--per_device", "2", "--expect", expected, *common]
        two = launch(WORKER, 2, args=args, config=config).stdout
        assert outcome(two, "STEPS") == outcome(one, "STEPS")
        np.testing.assert_allclose(outcome(two, "LOSSES"), outcome(one, "LOSSES"), rtol=1e-3, err_msg=config)
        # Rows that even out the last batch count in a flattened batch, and only there.
        tolerance = 5e-2 if packing else 1e-3
        np.testing.assert_allclose(
            outcome(two, "EVALUATION"), outcome(one, "EVALUATION"), rtol=tolerance, err_msg=config
        )
