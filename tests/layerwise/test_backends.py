"""Frozen layers under every backend that starts on CPU: each step is looked at, the end equals one process."""

import itertools
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("freeze_worker.py")
SHARDED_WORKER = Path(__file__).with_name("freeze_sharded_worker.py")
ZERO = {f"zero{stage}.yaml": f"DEEPSPEED-{stage} 2" for stage in (1, 2, 3)}
METHODS, CHECKPOINTING = ("full", "lora"), ("plain", "nonreentrant", "reentrant")

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def compared(launch, tmp_path, config, cases, *options):
    """Runs the cases in one launch, and sees that each was compared."""
    expect = ZERO.get(config, "MULTI_CPU 2")
    args = ["--output_dir", str(tmp_path / "run"), "--expect", expect, *options, "--cases", *cases]
    text = launch(WORKER, 2, args=args, config=config, timeout=600).stdout
    found = [line.split()[1] for line in text.splitlines() if line.startswith("COMPARED ")]
    assert found == list(cases)
    return text


def test_bare_callback_under_ddp_equals_one_process_and_static_graph_with_accumulation_is_refused(launch, tmp_path):
    cases = ("full,plain,unused,random", "lora,reentrant,used,adaptive", "full,nonreentrant,static,adaptive")
    assert "REFUSED" in compared(launch, tmp_path, None, cases, "--refuse", "static-graph")


@pytest.mark.parametrize(
    ("config", "cases"),
    [
        ("zero2.yaml", ("full,plain,-,adaptive", "lora,nonreentrant,-,random")),
        ("zero3.yaml", ("full,nonreentrant,-,random", "lora,plain,-,adaptive")),
    ],
    ids=["zero-2", "zero-3"],
)
def test_zero_equals_one_process_and_needs_the_callback_attached(launch, tmp_path, config, cases):
    assert "REFUSED" in compared(launch, tmp_path, config, cases, "--accumulation", "2", "--refuse", "unattached")


def sharded(launch, cases):
    text = launch(SHARDED_WORKER, 2, args=["--cases", *cases], timeout=600).stdout
    assert [line.split()[1] for line in text.splitlines() if line.startswith("COMPARED ")] == list(cases)


def test_fsdp2_equals_one_process_and_its_optimizer_state_loads(launch):
    # In bfloat16 a block sleeps through the first forward, in which FSDP2 settles dtypes.
    sharded(launch, ("full,nonreentrant,float32,random", "lora,plain,float32,adaptive", "full,plain,bfloat16,random"))


@pytest.mark.matrix
@pytest.mark.parametrize("policy", ["random", "adaptive"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_combination_of_fsdp2_equals_one_process(launch, precision, policy):
    sharded(launch, [",".join([*case, precision, policy]) for case in itertools.product(METHODS, CHECKPOINTING)])


@pytest.mark.matrix
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("policy", ["random", "adaptive"])
@pytest.mark.parametrize("config", ["ddp", *ZERO])
def test_every_combination_equals_one_process(launch, tmp_path, config, policy, accumulation):
    wrappers = ["-"] if config in ZERO else ["unused", "used", *(["static"] if accumulation == 1 else [])]
    cases = [
        ",".join([*case, policy])
        for case in itertools.product(METHODS, CHECKPOINTING, wrappers)
        # DDP itself refuses to look for unused parameters in a graph that is built while it goes backwards.
        if case[1:] != ("reentrant", "unused")
    ]
    options = ("--accumulation", str(accumulation), "--attach")
    compared(launch, tmp_path, config if config in ZERO else None, cases, *options)
