"""
Time and memory of a plan over many rows, one fresh process per arm.

Each arm cuts random scores into levels (`quantile`) and builds and hashes the plan. Memory is the peak of the process
less what it held before the scores were drawn.

    python benchmarks/plan.py                       # 10^5, 10^6 and 10^7 rows
    python benchmarks/plan.py --rows 1000 10000 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from hf_curriculum.curriculum.config import CurriculumConfig
from hf_curriculum.curriculum.levels import assign_levels
from hf_curriculum.curriculum.plan import build_plan


__all__ = ["main"]

ARMS = {
    "staged": {"pacing": "staged"},
    "cumulative + replay 0.2": {"pacing": "cumulative", "replay_fraction": 0.2},
    "cumulative + replay 0.2, grouped": {"pacing": "cumulative", "replay_fraction": 0.2, "group_by_length": True},
}
MAX_SECONDS, MAX_GB = 10.0, 2.0


def peak_gb() -> float:
    """Peak resident memory of this process, in 10^9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run_arm(arm: str, num_rows: int) -> dict[str, float]:
    """
    Measures one arm in this process.

    Args:
        arm (`str`):
            A key of `ARMS`.
        num_rows (`int`):
            Rows of the data set.

    Returns:
        `dict`: `levels_s`, `plan_s`, `total_s` (wall time) and `peak_gb`.
    """
    before = peak_gb()
    rng = np.random.default_rng(0)
    difficulty = rng.lognormal(size=num_rows)
    config = CurriculumConfig(num_levels=3, **ARMS[arm])  # type: ignore[arg-type]
    lengths = rng.integers(10, 2000, num_rows) if config.group_by_length else None
    start = time.perf_counter()
    levels = assign_levels(difficulty, num_levels=3, method="quantile")
    cut = time.perf_counter()
    plan = build_plan(levels, config, global_batch_size=64, seed=0, lengths=lengths)
    plan.hash  # noqa: B018 - the hash is part of what a run waits for
    end = time.perf_counter()
    return {"levels_s": cut - start, "plan_s": end - cut, "total_s": end - start, "peak_gb": peak_gb() - before}


def main() -> None:
    """Runs every arm at every size and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7], help="sizes to measure")
    parser.add_argument("--repeats", type=int, default=3, help="processes per arm and size; medians are shown")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_arm(args.one[0], int(args.one[1]))))
        return
    print(f"{'arm':34}{'rows':>12}{'levels s':>10}{'plan s':>10}{'total s':>10}{'peak GB':>10}{'us/row':>10}")
    passed = True
    for arm in ARMS:
        totals = []
        for num_rows in args.rows:
            command = [sys.executable, __file__, "--one", arm, str(num_rows)]
            runs = [
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(args.repeats)
            ]
            median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            totals.append(median["total_s"])
            passed = passed and median["total_s"] < MAX_SECONDS and median["peak_gb"] < MAX_GB
            print(
                f"{arm:34}{num_rows:>12,}{median['levels_s']:>10.3f}{median['plan_s']:>10.3f}"
                f"{median['total_s']:>10.3f}{median['peak_gb']:>10.3f}{1e6 * median['total_s'] / num_rows:>10.3f}"
            )
        for (small, fast), (large, slow) in zip(zip(args.rows, totals), list(zip(args.rows, totals))[1:]):
            print(f"{'':34}{large / small:.3g}x the rows take {slow / fast:.3g}x the time")
    print(f"every size under {MAX_SECONDS:g} s and {MAX_GB:g} GB: {'yes' if passed else 'NO'}")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
