"""The same run killed and resumed, and under every backend that starts on CPU."""

import json
from pathlib import Path

import numpy as np
import pytest


WORKER = Path(__file__).with_name("train_worker.py")
BACKENDS = {
    "ddp_cpu.yaml": "MULTI_CPU 2",
    "zero1.yaml": "DEEPSPEED-1 2",
    "zero2.yaml": "DEEPSPEED-2 2",
    "zero3.yaml": "DEEPSPEED-3 2",
}

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def outcome(text, key):
    (line,) = [line for line in text.splitlines() if line.startswith(key + " ")]
    return json.loads(line.removeprefix(key + " "))


def killed_and_resumed(launch, tmp_path, num_processes, config, *options):
    """What a whole run wrote, and one that was killed after step 10 and resumed."""
    # 41 rows twice in global batches of 4 or 8: 21 or 11 steps, a checkpoint every 4 and a log every 3, so that the
    # losses of the tasks since the last log are in the checkpoint.
    options = [*options, *(["--expect", BACKENDS[config]] if config else [])]
    whole = launch(WORKER, num_processes, args=["--output_dir", str(tmp_path / "whole"), *options], config=config)
    broken = ["--output_dir", str(tmp_path / "broken"), *options]
    killed = launch(WORKER, num_processes, args=[*broken, "--kill_at", "10"], config=config, check=False)
    assert killed.returncode != 0
    resumed = launch(WORKER, num_processes, args=[*broken, "--resume"], config=config)
    assert "checkpoint-8, the newest complete checkpoint" in resumed.stdout
    return whole.stdout, resumed.stdout


@pytest.mark.parametrize(
    ("num_processes", "config"),
    [(1, None), (2, None), (2, "zero1.yaml"), (2, "zero2.yaml")],
    ids=["one-process", "ddp", "zero-1", "zero-2"],
)
def test_killed_and_resumed_equals_uninterrupted(launch, tmp_path, num_processes, config):
    whole, resumed = killed_and_resumed(launch, tmp_path, num_processes, config)
    for key in ("STEPS", "WEIGHTS", "EVALUATION", "LOSSES"):
        assert outcome(resumed, key) == outcome(whole, key), key


def test_resumed_under_zero_3_goes_on_with_the_same_losses(launch, tmp_path):
    # Without dropout, whose masks differ under ZeRO-3 from one start of the processes to the next.
    whole, resumed = killed_and_resumed(launch, tmp_path, 2, "zero3.yaml", "--dropout", "0")
    assert outcome(resumed, "STEPS") == outcome(whole, "STEPS")
    for key in ("EVALUATION", "LOSSES"):
        np.testing.assert_allclose(outcome(resumed, key), outcome(whole, key), rtol=1e-5, err_msg=key)


_OF_ONE_PROCESS = {}


def of_one_process(launch, tmp_path, options):
    """Output of one process; run once for all backends that are compared with it."""
    if tuple(options) not in _OF_ONE_PROCESS:
        args = ["--output_dir", str(tmp_path / "one"), "--per_device", "4", *options]
        _OF_ONE_PROCESS[tuple(options)] = launch(WORKER, 1, args=args).stdout
    return _OF_ONE_PROCESS[tuple(options)]


@pytest.mark.parametrize("shared", [True, False], ids=["shared-lora", "cgc-lora"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("config", BACKENDS)
def test_every_backend_has_the_losses_of_one_process(launch, tmp_path, config, packing, shared):
    common = ["--dropout", "0", *(["--packing"] if packing else []), *(["--shared_lora"] if shared else [])]
    one = of_one_process(launch, tmp_path, common)
    args = ["--output_dir", str(tmp_path / "two"), "--per_device", "2", "--expect", BACKENDS[config], *common]
    two = launch(WORKER, 2, args=args, config=config).stdout
    assert outcome(two, "STEPS") == outcome(one, "STEPS")
    np.testing.assert_allclose(outcome(two, "LOSSES"), outcome(one, "LOSSES"), rtol=1e-3)
    # Rows that even out the last batch count in a flattened batch, and only there.
    tolerance = 5e-2 if packing else 1e-3
    np.testing.assert_allclose(outcome(two, "EVALUATION"), outcome(one, "EVALUATION"), rtol=tolerance)
