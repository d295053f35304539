"""The picture of a run's gates: what is drawn, not how it looks."""

import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_curriculum.analysis.gate_plots import draw_gates, plot_gates


# A neighbour's file: with `--import-mode=importlib` the tests' folders are on no path.
_spec = importlib.util.spec_from_file_location("task_runs", Path(__file__).with_name("task_runs.py"))
runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runs)

PNG = b"\x89PNG\r\n\x1a\n"


def read(path):
    with path.with_suffix(".csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_s_gates_are_drawn_into_its_record(build, tmp_path):
    pytest.importorskip("matplotlib")
    trainer = build({"output_dir": str(tmp_path / "run")}, peft_config=runs.cgc(num_task_experts=2))
    trainer.train()
    path = draw_gates(tmp_path / "run")
    assert path == trainer.record.folder / "gates.png"
    assert path.read_bytes().startswith(PNG)
    rows, tuner = read(path), trainer.model.base_model
    tables = tuner.gate_table()
    common = tuner.adapter_config().num_common_experts
    assert len(rows) == len(tables) * len(runs.NAMES) * (common + 2)
    for row in rows:
        task = runs.NAMES.index(row["task"])
        kind, number = row["expert"].split()
        place = int(number) if kind == "common" else common + 2 * task + int(number)
        assert float(row["gate"]) == pytest.approx(tables[row["layer"]][task, place].item())
        assert float(row["gate"]) > 0


def test_a_run_without_gates_has_no_picture(build, tmp_path):
    build({"output_dir": str(tmp_path / "run")}).train()
    assert draw_gates(tmp_path / "run") is None
    assert not list((tmp_path / "run").rglob("*.png"))


@pytest.mark.parametrize(("tasks", "common", "own"), [(1, 1, 0), (1, 0, 1), (3, 0, 2), (3, 2, 0), (14, 2, 1)])
def test_any_number_of_tasks_and_experts_is_drawn(tmp_path, tasks, common, own):
    pytest.importorskip("matplotlib")
    gates = np.arange(tasks * (common + tasks * own), dtype=float).reshape(tasks, -1).tolist()
    names = [f"$task_{number}" for number in range(tasks)]
    layers = {f"layer.{depth}.linear": gates for depth in range(60)}
    path = plot_gates(layers, names, common, tmp_path / "gates.png")
    assert path.read_bytes().startswith(PNG)
    rows = read(path)
    assert len(rows) == 60 * tasks * (common + own)
    last = [float(row["gate"]) for row in rows if row["task"] == names[-1] and row["layer"] == "layer.59.linear"]
    assert last == [*gates[-1][:common], *gates[-1][common + (tasks - 1) * own :][:own]]


@pytest.mark.parametrize("layers", [{}, {"a": [[1.0, 0.0]]}, {"a": [[1.0] * 3] * 2, "b": [[1.0] * 5] * 2}])
def test_gates_that_do_not_fit_the_tasks_are_refused(tmp_path, layers):
    with pytest.raises(ValueError, match=r"`layers`: got gates of the shapes .* expected one shape \(2, 1 \+"):
        plot_gates(layers, ["a", "b"], 1, tmp_path / "gates.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "hf_curriculum\[plots\]"'):
        plot_gates({"a": [[1.0]]}, ["a"], 1, tmp_path / "gates.png")
    assert not list(tmp_path.iterdir())
