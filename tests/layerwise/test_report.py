"""The report of a run with frozen layers, read from its record alone."""

import csv
import math
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_curriculum import LayerFreezeCallback
from hf_curriculum.analysis.layer_plots import plot_layer_map
from hf_curriculum.core.records import RunRecord
from hf_curriculum.layerwise import callback as callback_module
from hf_curriculum.layerwise.report import (
    EVENT,
    LAYER_COLUMNS,
    read_layers,
    show_layers,
    show_static,
    static_layers,
)


def write_record(folder, windows, last_step=None, rates=(), scores=None, names=None, num_blocks=4, **more):
    """`windows`: (first step, active blocks, warm-up turn or None); `rates`: of each window, then of the last one."""
    names = [f"model.layers.{number}" for number in range(num_blocks)] if names is None else names
    record, measured = RunRecord(folder), [{}, *rates]
    record.start("run")
    for number, (first_step, active, turn) in enumerate(windows):
        record.append(
            "layers", first_step + 1, first_step=first_step, policy="adaptive", turn=turn, blocks=names,
            active=list(active), active_fraction=len(active) / len(names),
            rates=measured[number] if number < len(measured) else {},
            scores=dict(zip(names, [math.nan] * len(names) if scores is None else scores)), **more,
        )  # fmt: skip
    if last_step is not None:
        record.append("layers_end", last_step, rates=measured[-1] if len(measured) > len(windows) else {})
    return folder


def test_map_equals_a_count_step_by_step(tmp_path):
    rng = np.random.default_rng(0)
    firsts = np.cumsum([0, *rng.integers(1, 9, size=19)])
    windows = [
        (int(first), sorted(rng.choice(6, size=2, replace=False).tolist()), turn if turn < 3 else None)
        for turn, first in enumerate(firsts)
    ]
    layers = read_layers(write_record(tmp_path, windows, last_step=int(firsts[-1]) + 4, num_blocks=6))
    learned, chosen = [0] * 6, [0] * 6
    for step in range(int(firsts[-1]) + 4):
        _, active, _ = [window for window in windows if window[0] <= step][-1]
        for block in active:
            learned[block] += 1
    for _, active, turn in windows:
        for block in active:
            chosen[block] += turn is None
    assert layers.steps_learned.tolist() == learned
    assert layers.times_chosen.tolist() == chosen
    assert layers.num_steps == int(firsts[-1]) + 4
    assert (layers.num_warmup, layers.warmup_end) == (3, firsts[3])
    top = layers.rows()[0]
    assert dict(zip(LAYER_COLUMNS, top))["block"] == "model.layers.5"
    assert top[1:3] == [f"{learned[5] / layers.num_steps:.1%}", chosen[5]]


def test_rates_belong_to_the_window_that_they_were_measured_in(tmp_path):
    rates = [{"model.layers.3": 2.0}, {"model.layers.1": 3.0}, {"model.layers.0": 5.0}]
    windows = [(0, [3], 0), (2, [1], None), (4, [0], None)]
    layers = read_layers(write_record(tmp_path, windows, last_step=6, rates=rates))
    expected = np.full((3, 4), np.nan)
    expected[0, 3], expected[1, 1], expected[2, 0] = 2.0, 3.0, 5.0
    np.testing.assert_array_equal(layers.rates, expected)
    assert layers.bounds.tolist() == [0, 2, 4, 6]


def test_cut_off_run_is_known_as_far_as_its_record_goes(tmp_path):
    write_record(tmp_path, [(0, [3], None), (50, [2], None)], rates=[{"model.layers.3": 1.0}])
    assert read_layers(tmp_path).bounds.tolist() == [0, 50, 51]
    assert np.isnan(read_layers(tmp_path).rates[1]).all()
    RunRecord(tmp_path).append("stage_end", 80)
    assert read_layers(tmp_path).bounds.tolist() == [0, 50, 80]


def test_end_of_an_earlier_training_does_not_close_a_resumed_one(tmp_path):
    write_record(tmp_path, [(0, [3], None)], last_step=10, rates=[{"model.layers.3": 1.0}])
    line = RunRecord(tmp_path).read("layers")[0]
    values = {key: value for key, value in line.items() if key not in ("event", "step")}
    RunRecord(tmp_path).append("layers", 21, **{**values, "first_step": 20, "rates": {"model.layers.3": 7.0}})
    layers = read_layers(tmp_path)
    assert layers.bounds.tolist() == [0, 20, 21]
    assert layers.rates[0, 3] == 7.0


def test_record_of_a_training_is_read(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (24, 8))]
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=9, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    callback = LayerFreezeCallback(active_fraction=0.5, interval_steps=3, warmup_steps=4)
    Trainer(LlamaForCausalLM(config), args, train_dataset=rows, callbacks=[callback]).train()
    layers = read_layers(tmp_path)
    assert callback_module.EVENT == EVENT
    assert layers.bounds[:-1].tolist() == [0, 2, 4, 7]
    assert layers.num_warmup == 2
    assert [np.flatnonzero(active).tolist() for active in layers.active[2:]] == [*map(list, callback.run.decisions)]
    assert np.isfinite(layers.rates[:3][layers.active[:3]]).all()
    assert np.isfinite(layers.scores).all()


def test_folder_without_such_a_record_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"Invalid `output_dir`: got .*missing, without a record of layers, expected"):
        read_layers(tmp_path / "missing")
    RunRecord(tmp_path).start("run")
    with pytest.raises(ValueError, match=r"Looked for lines `layers` in .*record\.jsonl"):
        read_layers(tmp_path)
    write_record(tmp_path, [(0, [1], None)])
    names = [f"h.{number}" for number in range(4)]
    line = {**RunRecord(tmp_path).read("layers")[0], "blocks": names}
    RunRecord(tmp_path).append("layers", 5, **{k: v for k, v in line.items() if k not in ("event", "step")})
    with pytest.raises(ValueError, match="several sets of blocks"):
        read_layers(tmp_path)


def test_static_choice_is_what_learned_most_after_the_warmup(tmp_path, capsys):
    windows = [(0, [0], 0), (90, [1], None), (95, [3], None), (105, [1], None), (120, [2], None)]
    write_record(tmp_path, windows, last_step=124)
    assert static_layers(tmp_path).blocks == ("model.layers.1",)
    both = static_layers(tmp_path, active_fraction=0.5)
    assert both.blocks == ("model.layers.1", "model.layers.3")
    assert both.peft == {"layers_to_transform": [1, 3], "layers_pattern": "layers"}
    # Block 0 learned in the warm-up alone.
    everything = static_layers(tmp_path, active_fraction=1.0)
    assert everything.blocks == ("model.layers.1", "model.layers.2", "model.layers.3")
    show_static(both)
    show_layers(read_layers(tmp_path))
    text = "".join(capsys.readouterr())
    assert '"layers_to_transform": [1, 3]' in text
    assert "policy adaptive, 4 decisions in 124 steps, 90 of them warm-up in 1 turns" in text


@pytest.mark.parametrize(
    ("scores", "expected"), [([1.0, 4.0, 2.0, 3.0], 1), ([2.0, 2.0, 2.0, 2.0], 3), ([math.nan, 1.0, 2.0, 0.0], 2)]
)
def test_ties_go_by_score_then_to_the_head(tmp_path, scores, expected):
    windows = [(5 * block, [block], None) for block in range(4)]
    write_record(tmp_path, windows, last_step=20, scores=scores)
    assert static_layers(tmp_path).blocks == (f"model.layers.{expected}",)


def test_static_budget_counts_parameters_where_they_are_recorded(tmp_path):
    windows = [(0, [0], None), (9, [1], None), (17, [2], None), (24, [3], None)]
    write_record(tmp_path, windows, last_step=30, sizes=[50, 20, 20, 10])
    assert static_layers(tmp_path, active_fraction=0.3).blocks == ("model.layers.1", "model.layers.3")
    assert static_layers(tmp_path, active_fraction=0.5).blocks == ("model.layers.0",)


@pytest.mark.parametrize(
    ("windows", "fraction", "message"),
    [
        ([(0, [0], 0)], None, "a run that ended in its warm-up, expected a run with a decision"),
        ([(0, [0], None)], 0.0, r"Invalid `active_fraction`: got 0\.0, expected a float in \(0, 1\]"),
        ([(0, [0], None)], 1.5, "Invalid `active_fraction`"),
        ([(0, [0], None)], 0.1, r"expected at least 0\.25"),
    ],
    ids=["warm-up", "zero", "above one", "too small"],
)
def test_static_choice_that_cannot_be_made_is_told(tmp_path, windows, fraction, message):
    write_record(tmp_path, windows)
    with pytest.raises(ValueError, match=message):
        static_layers(tmp_path, active_fraction=fraction)


def test_peft_and_the_callback_take_the_static_choice(tmp_path):
    write_record(tmp_path, [(0, [1, 2], None)], num_blocks=6)
    found = static_layers(tmp_path)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2
    )
    adapted = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=1, target_modules=["q_proj", "down_proj"], **found.peft)
    )
    assert {name.split(".")[4] for name, p in adapted.named_parameters() if p.requires_grad} == {"1", "2"}
    callback = eval(found.callback, {"LayerFreezeCallback": LayerFreezeCallback})
    assert callback.config.blocks == ["model.layers.1", "model.layers.2"]
    # A third, rounded up: a budget below the blocks would be refused.
    assert callback.config.active_fraction == 0.3334


def test_blocks_without_numbers_are_not_for_peft(tmp_path, capsys):
    write_record(tmp_path, [(0, [1], None)], names=["stem", "body", "neck", "head"])
    found = static_layers(tmp_path)
    assert found.blocks == ("body",)
    assert found.peft is None
    show_static(found)
    assert "not numbered in one list" in "".join(capsys.readouterr())


@pytest.fixture
def layers(tmp_path):
    rates = [{"model.layers.3": 2.0}, {"model.layers.1": 300.0}]
    return read_layers(write_record(tmp_path, [(0, [3], 0), (2, [1], None), (4, [0], None)], rates=rates))


def test_picture_has_its_data_beside_it(layers, tmp_path):
    pytest.importorskip("matplotlib")
    path = plot_layer_map(path=tmp_path / "new" / "layers.png", **layers.picture())
    assert path.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    assert len(rows) == 3 * 4
    learned = {(row["first_step"], row["block"]): row["measured"] for row in rows if row["learned"] == "1"}
    assert learned == {
        ("0", "model.layers.3"): "2.0",
        ("2", "model.layers.1"): "300.0",
        ("4", "model.layers.0"): "nan",
    }


@pytest.mark.parametrize("rate", [None, 0.0, 3.0], ids=["not measured", "zero", "one value"])
def test_picture_is_drawn_whatever_was_measured(tmp_path, rate):
    pytest.importorskip("matplotlib")
    rates = [] if rate is None else [{"model.layers.3": rate}]
    found = read_layers(write_record(tmp_path, [(0, [3], None)], last_step=5, rates=rates))
    assert plot_layer_map(path=tmp_path / "layers.png", **found.picture()).stat().st_size > 1000


def test_bad_arrays_and_a_missing_library_are_told(layers, tmp_path, monkeypatch):
    drawn = {**layers.picture(), "path": tmp_path / "layers.png"}
    with pytest.raises(ValueError, match=r"Invalid `rates`: got shape \(2, 4\), expected \(3, 4\)"):
        plot_layer_map(**{**drawn, "rates": layers.rates[:2]})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf_curriculum\[plots\]"'):
        plot_layer_map(**drawn)
    assert not (tmp_path / "layers.png").exists()
