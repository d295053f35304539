"""Order, memory, place and sharing in one run: a teacher that stands still, frozen blocks that do, exact resume."""

import json
import re
from pathlib import Path

import numpy as np
import pytest


WORKER = Path(__file__).with_name("together_worker.py")
EXPECT = {None: "MULTI_CPU 2", **{f"zero{stage}.yaml": f"DEEPSPEED-{stage} 2" for stage in (1, 2, 3)}}
RESULTS = {"STAGES", "DECISIONS", "TEACHER", "LOSSES", "DIVERGENCES", "MATRIX", "WEIGHTS"}
METHODS = [pytest.param((), id="full"), pytest.param(("--tasks",), id="cgc-lora")]
BACKENDS = [
    pytest.param(1, None, id="one-process"),
    pytest.param(2, None, id="ddp"),
    pytest.param(2, "zero1.yaml", id="zero-1"),
    pytest.param(2, "zero2.yaml", id="zero-2"),
    pytest.param(2, "zero3.yaml", id="zero-3"),
]

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def outcomes(text):
    """What the worker found, by name."""
    found = re.findall(r"^([A-Z]+) (.*)$", text, flags=re.MULTILINE)
    return {key: json.loads(value) for key, value in found if key in RESULTS}


def check_resumed(launch, num_processes, config, *options):
    """A teacher stands still in each stage but the first, frozen blocks do (the worker looks), and resume is exact."""
    kill_at = 22 if num_processes == 1 else 13  # in the third stage, in the middle of a window of layers
    if num_processes > 1:
        options = (*options, "--expect", EXPECT[config])
    if config == "zero3.yaml":
        options = (*options, "--dropout", "0")
    whole = outcomes(launch(WORKER, num_processes, args=["--output_dir", "whole", *options], config=config).stdout)
    stages = [{digest for step, digest in whole["TEACHER"] if begin < step <= end} for begin, end in whole["STAGES"]]
    assert [len(digests) for digests in stages] == [0, 1, 1]
    assert stages[1] != stages[2]
    assert len({tuple(active) for _, active in whole["DECISIONS"]}) > 1
    broken = ["--output_dir", "broken", *options]
    killed = launch(WORKER, num_processes, args=[*broken, "--kill_at", str(kill_at)], config=config, check=False)
    assert "WEIGHTS" not in killed.stdout
    text = launch(WORKER, num_processes, args=[*broken, "--resume"], config=config).stdout
    assert f"checkpoint-{kill_at // 4 * 4}, the newest complete checkpoint" in text
    resumed = outcomes(text)
    assert resumed["TEACHER"] == [[step, digest] for step, digest in whole["TEACHER"] if step > kill_at // 4 * 4]
    assert resumed["DECISIONS"] == whole["DECISIONS"]
    if config == "zero3.yaml":
        for key in ("LOSSES", "DIVERGENCES"):
            np.testing.assert_allclose(resumed[key][-2:], whole[key][-2:], rtol=1e-5, err_msg=key)
        return
    for key in ("LOSSES", "DIVERGENCES", "MATRIX", "WEIGHTS"):
        assert resumed[key] == whole[key], key


@pytest.mark.parametrize(
    ("num_processes", "config", "options"),
    [
        pytest.param(1, None, ("--tasks", "--checkpointing"), id="one-process-cgc-lora"),
        pytest.param(2, None, (), id="ddp-full"),
        pytest.param(2, "zero2.yaml", ("--tasks",), id="zero-2-cgc-lora"),
    ],
)
def test_all_methods_in_one_run_killed_and_resumed(launch, num_processes, config, options):
    check_resumed(launch, num_processes, config, *options)


@pytest.mark.matrix
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("num_processes", "config"), BACKENDS)
def test_every_combination_killed_and_resumed(launch, num_processes, config, method, checkpointing):
    options = [*method, *(["--checkpointing"] if checkpointing else [])]
    check_resumed(launch, num_processes, config, *options)
