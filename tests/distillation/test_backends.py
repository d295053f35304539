"""A run with a teacher under every backend that starts on CPU: the losses and gradients of one process."""

import json
from pathlib import Path

import numpy as np
import pytest


WORKER = Path(__file__).parent.parent / "curriculum" / "train_worker.py"
BACKENDS = {
    "ddp_cpu.yaml": "MULTI_CPU 2",
    "zero1.yaml": "DEEPSPEED-1 2",
    "zero2.yaml": "DEEPSPEED-2 2",
    "zero3.yaml": "DEEPSPEED-3 2",
}
# 96 rows in three levels, a quarter replayed, 8 rows a step: stages end at steps 4, 9 and 14.


def outcomes(text, key):
    return [line.removeprefix(key + " ") for line in text.splitlines() if line.startswith(key + " ")]


def values(text, key):
    (line,) = outcomes(text, key)
    return np.array(json.loads(line.replace("null", "NaN").replace("None", "NaN")))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_backend_distils_as_one_process_does(launch, tmp_path, lora):
    common = ["--dropout", "0", "--print_losses", "--teacher_digest", "--distillation", '{"alpha": 0.5}']
    common += ["--lora"] if lora else []
    one = launch(WORKER, 1, args=["--output_dir", str(tmp_path / "one"), "--per_device", "4", *common]).stdout
    for config, expected in BACKENDS.items():
        args = ["--output_dir", str(tmp_path / config), "--per_device", "2", "--expect", expected, *common]
        two = launch(WORKER, 2, args=args, config=config).stdout
        for key in ("LOSSES", "DIVERGENCES", "GRADIENTS"):
            # Gradients are where a wrong factor between CE and KD, or between processes, shows. Later on, their norms
            # and the small divergences follow what rounding has made of the weights.
            found, wanted = values(two, key), values(one, key)
            np.testing.assert_allclose(found[:7], wanted[:7], rtol=1e-4, atol=1e-6, err_msg=f"{config} {key}")
            np.testing.assert_allclose(found[:10], wanted[:10], rtol=1e-3, atol=1e-6, err_msg=f"{config} {key}")
            if key == "LOSSES":
                np.testing.assert_allclose(found, wanted, rtol=1e-4, err_msg=config)
            if key == "LOSSES" and config == "ddp_cpu.yaml":
                np.testing.assert_allclose(found[:10], wanted[:10], rtol=1e-6, err_msg=config)
        teacher = [line.split() for line in outcomes(two, "TEACHER")]
        assert [int(step) for step, _ in teacher] == list(range(5, 15)), config
        by_stage = [{digest for step, digest in teacher if (int(step) > 9) == later} for later in (False, True)]
        assert [len(digests) for digests in by_stage] == [1, 1], f"{config}: the teacher moved within a stage"
        assert by_stage[0] != by_stage[1], f"{config}: the teacher was not refreshed"
