"""
What the attention probe costs: time and memory of a forward pass with it, against SDPA without it.

Time: the same batches through the same model, pass by pass in turn (plain SDPA, probe, probe without the comparison
of heads, eager with its maps), so that noise of the machine hits all alike; medians of the paired ratios. Memory: peak
resident memory minus that before the pass, one process for each arm and length.

    OMP_NUM_THREADS=1 python benchmarks/attention.py            # time at 256 tokens, memory at 512 to 4096
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaModel

from hf_curriculum.analysis.attention_layout import TokenLayout
from hf_curriculum.analysis.attention_probe import attention_probe


ARMS = ("plain", "probe", "probe-no-distance", "eager-maps")


def build(heads: int, layers: int) -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64 * heads,
        intermediate_size=172 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=16384,
    )
    return LlamaModel(config).eval()


def forward(model: LlamaModel, ids: torch.Tensor, arm: str) -> None:
    with torch.no_grad():
        if arm == "plain":
            model(ids, use_cache=False)
        elif arm == "eager-maps":
            model.set_attn_implementation("eager")
            model(ids, use_cache=False, output_attentions=True)
            model.set_attn_implementation("sdpa")
        else:
            texts = torch.arange(len(ids))[:, None].expand_as(ids).contiguous()
            layout = TokenLayout(texts, ids % 5, len(ids), 5)
            with attention_probe(model, head_distance=arm == "probe") as collector:
                collector.begin(layout)
                model(ids, use_cache=False)
                collector.finish()


def measure_time(heads: int, layers: int, rows: int, length: int, rounds: int) -> dict[str, list[float]]:
    model = build(heads, layers)
    ids = torch.randint(0, 8192, (rows, length), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(rounds + 1):
        for arm in ARMS:
            started = time.process_time()
            forward(model, ids, arm)
            if turn > 0:
                times[arm].append(time.process_time() - started)
    return times


def measure_memory(heads: int, layers: int, length: int, arm: str) -> float:
    """Megabytes of one pass, in this process, which must not have run anything larger before."""
    model = build(heads, layers)
    ids = torch.randint(0, 8192, (1, length), generator=torch.Generator().manual_seed(0))
    forward(model, ids[:, :32], arm)
    # The peak of the whole process is that of its imports; Linux lets a process start its peak again.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    forward(model, ids, arm)
    return memory("VmHWM") - before


def memory(name: str) -> float:
    """A line of the process's status, in MB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--memory_of", default=None, help="Used by the benchmark itself.")
    options = parser.parse_args()
    if options.memory_of is not None:
        print(json.dumps(measure_memory(options.heads, options.layers, options.length, options.memory_of)))
        return
    times = measure_time(options.heads, options.layers, options.rows, options.length, options.rounds)
    print(
        f"{options.layers} layers, {options.heads} heads, {options.rows} x {options.length} tokens, CPU time of a pass"
    )
    for arm in ARMS:
        ratio = np.array(times[arm]) / np.array(times["plain"])
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        print(f"  {arm:18} {np.median(times[arm]):7.3f} s   {middle:5.2f} x plain   quartiles {low:.2f}-{high:.2f}")
    if not options.lengths:
        return
    print("peak memory of a pass over one row, MB")
    print("  " + " ".join(f"{'tokens' if n == 0 else n:>9}" for n in (0, *options.lengths)))
    for arm in ARMS:
        found = []
        for length in options.lengths:
            command = [sys.executable, __file__, "--memory_of", arm, "--length", str(length)]
            command += ["--heads", str(options.heads), "--layers", str(options.layers)]
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
            found.append(float(output.splitlines()[-1]))
        print(f"  {arm:18}" + " ".join(f"{value:9.0f}" for value in found))


if __name__ == "__main__":
    main()
