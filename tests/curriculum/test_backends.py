"""The same run under every backend that starts on CPU: the same losses and the same matrix as one process."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_curriculum.demo import build_model, build_tokenizer


WORKER = Path(__file__).with_name("train_worker.py")
BACKENDS = {
    "ddp_cpu.yaml": "MULTI_CPU 2",
    "zero1.yaml": "DEEPSPEED-1 2",
    "zero2.yaml": "DEEPSPEED-2 2",
    "zero3.yaml": "DEEPSPEED-3 2",
}


def outcome(text, key):
    (line,) = [line for line in text.splitlines() if line.startswith(key + " ")]
    return json.loads(line.removeprefix(key + " ").replace("nan", "NaN"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_backend_follows_the_plan_of_one_process(launch, tmp_path, lora):
    common = ["--dropout", "0", "--print_losses", *(["--lora"] if lora else [])]
    one = launch(WORKER, 1, args=["--output_dir", str(tmp_path / "one"), "--per_device", "4", *common]).stdout
    for config, expected in BACKENDS.items():
        args = ["--output_dir", str(tmp_path / config), "--per_device", "2", "--expect", expected, *common]
        two = launch(WORKER, 2, args=args, config=config).stdout
        np.testing.assert_allclose(outcome(two, "LOSSES"), outcome(one, "LOSSES"), rtol=1e-4, err_msg=config)
        # The Trainer weighs batches, not tokens, so that evaluation by two processes averages otherwise.
        np.testing.assert_allclose(outcome(two, "MATRIX"), outcome(one, "MATRIX"), rtol=1e-2, err_msg=config)


@pytest.mark.slow
@pytest.mark.distributed
def test_model_partitioned_at_load_is_refused_by_scorers_that_run_it_and_trained_by_the_others(launch, tmp_path):
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = ["--model_path", str(tmp_path / "model"), "--dropout", "0", "--output_dir", str(tmp_path / "out")]
    refused = launch(WORKER, 2, args=[*args, "--scorer", "loss"], config="zero3.yaml", check=False)
    assert refused.returncode != 0
    assert "--curriculum_score_only true" in refused.stdout
    trained = launch(WORKER, 2, args=[*args, "--expect", "DEEPSPEED-3 2"], config="zero3.yaml").stdout
    assert outcome(trained, "STEPS") == 14
