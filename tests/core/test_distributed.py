from types import SimpleNamespace

import pytest

from hf_curriculum.core.distributed import check_launch


def test_process_that_believes_it_is_alone_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"Invalid `WORLD_SIZE`: got 2, expected 1.*use_cpu=True"):
        check_launch(SimpleNamespace(num_processes=1))
    check_launch(SimpleNamespace(num_processes=2))
    monkeypatch.delenv("WORLD_SIZE")
    check_launch(SimpleNamespace(num_processes=1))


SCRIPT = """
    import sys
    import numpy as np, torch, torch.distributed as dist
    from transformers import TrainingArguments

    from hf_curriculum.core.distributed import end_processes, on_main_process, rank_and_world, sum_over_ranks
    from hf_curriculum.core.console import say

    args = TrainingArguments(use_cpu=True, report_to="none")
    assert str(args.distributed_state.distributed_type) == "DistributedType.MULTI_CPU"
    rank, world = rank_and_world()
    assert world == 2
    say(f"said by {rank}")
    assert on_main_process(lambda: f"from {rank}") == "from 0"
    values = np.array([rank + 1.0, 10.0])
    assert sum_over_ranks(values, torch.device("cpu")).tolist() == [3.0, 20.0]
    assert values.tolist() == [rank + 1.0, 10.0]

    def fail():
        raise OSError(28, "disk full")

    try:
        on_main_process(fail)
    except OSError as error:
        assert rank == 0 and "disk full" in str(error)
    except RuntimeError as error:
        assert rank == 1 and "disk full" in str(error)
    sys.stdout.write(f"ended {rank}\\n")
    end_processes()
"""


@pytest.mark.distributed
def test_ranks_agree_on_values_and_on_errors(launch):
    text = launch(SCRIPT, 2).stdout
    assert "ended 0" in text
    assert "ended 1" in text
    assert text.count("said by") == 1
