"""The pictures of whom tasks listen to: what is drawn, not how it looks."""

import csv
import sys

import numpy as np
import pytest

from hf_curriculum.analysis.fusion_plots import draw_fusion, plot_attention
from hf_curriculum.core.records import RunRecord


PNG = b"\x89PNG\r\n\x1a\n"
NAMES = ["topic", "tags"]


def read(path):
    with path.with_suffix(".csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record_of(folder, names, mean, by_class, step=7):
    record = RunRecord(folder)
    record.append("fusion_attention", step, names=names, mean=mean, by_class=by_class, rows=[3] * len(names))
    return record


def test_a_run_s_attention_is_drawn_into_its_record(tmp_path):
    pytest.importorskip("matplotlib")
    mean = [[0.75, 0.25], [0.5, 0.5]]
    classes = {"tags": {"classes": ["new", "old", "rare"], "attention": [[0.1, 0.9], [0.2, 0.8], [None, None]]}}
    record_of(tmp_path, NAMES, [[1.0, 0.0], [0.0, 1.0]], {"topic": classes["tags"]}, step=3)
    draw_fusion(tmp_path)
    record = record_of(tmp_path, NAMES, mean, classes)
    path = draw_fusion(tmp_path)
    assert path == record.folder / "fusion_attention.png"
    assert {file.name for file in record.folder.glob("*.png")} == {"fusion_attention.png", "fusion_attention_tags.png"}
    assert all(file.read_bytes().startswith(PNG) for file in record.folder.glob("*.png"))
    assert [(row["asks"], row["listens to"], float(row["attention"])) for row in read(path)] == [
        ("topic", "topic", 0.75),
        ("topic", "tags", 0.25),
        ("tags", "topic", 0.5),
        ("tags", "tags", 0.5),
    ]
    cells = read(record.folder / "fusion_attention_tags.png")
    assert [row["attention"] for row in cells] == ["0.1", "0.9", "0.2", "0.8", "", ""]
    assert [row["class"] for row in cells[::2]] == ["new", "old", "rare"]


def test_a_run_without_attention_has_no_picture(tmp_path):
    RunRecord(tmp_path).append("tasks", 0, names=NAMES)
    assert draw_fusion(tmp_path) is None
    assert not list(tmp_path.rglob("*.png"))


def test_tasks_of_names_that_are_no_file_names_have_a_picture_each(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["a b", "a_b", "a?b", "été", "$x_1^$", "very long " * 15 + "end", "情感"]
    mean = np.full((7, 7), 1 / 7).tolist()
    record = record_of(tmp_path, names, mean, {name: {"classes": ["x"], "attention": [[1 / 7] * 7]} for name in names})
    draw_fusion(tmp_path)
    assert len(list(record.folder.glob("fusion_attention_*.png"))) == len(names)
    assert [row["asks"] for row in read(record.folder / "fusion_attention.png")][::7] == names
    assert all(len(file.name.encode()) < 80 for file in record.folder.iterdir())


@pytest.mark.parametrize(("rows", "tasks"), [(1, 1), (3, 1), (1, 40), (40, 40), (150, 4), (250, 3)])
def test_any_number_of_tasks_and_classes_is_drawn(tmp_path, rows, tasks):
    pytest.importorskip("matplotlib")
    table = np.random.default_rng(0).dirichlet(np.ones(tasks), rows)
    names, across = [f"class {number}" for number in range(rows)], [f"task {number}" for number in range(tasks)]
    path = plot_attention(table, names, tmp_path / "x.png", tasks=across)
    from matplotlib.image import imread

    height, width = imread(path).shape[:2]
    assert max(height, width) < 6500
    if rows <= 200:
        # Names of 7 points do not touch: 150 pixels per inch.
        assert height / rows > 7 / 72 * 150
    assert [float(row["attention"]) for row in read(path)] == table.ravel().tolist()


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize(("tasks", "shown"), [(12, 24), (13, 0)])
def test_numbers_stand_in_the_cells_of_few_tasks(tmp_path, monkeypatch, tasks, shown):
    pytest.importorskip("matplotlib")
    import hf_curriculum.analysis.fusion_plots as plots

    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *rest: kept.append(figure))
    table = np.full((2, tasks), 1 / tasks)
    table[0] = np.nan
    plot_attention(table, ["a", "b"], tmp_path / "x.png", tasks=[f"t{number}" for number in range(tasks)])
    assert texts_of(kept[0]) == (["-"] * 12 + ["0.08"] * 12 if shown else [])


def test_long_names_are_cut_in_the_middle_and_unknown_characters_numbered(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    import hf_curriculum.analysis.fusion_plots as plots

    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, *rest: kept.append(figure))
    monkeypatch.setattr(plots, "_fonts", lambda texts: (["DejaVu Sans"], {"情"}))
    names = ["intents of customers in spoken language", "情情 mood", "情", "line\nbreak"]
    plot_attention(np.eye(4), names, tmp_path / "x.png", what="task")
    shown = [label.get_text() for label in kept[0].axes[0].get_yticklabels()]
    assert shown == ["intents of cu…oken language", "#1 mood", "#2", "line break"]


@pytest.mark.parametrize("attention", [[], [[0.5, 0.5]], [[1.0], [1.0]]])
def test_attention_that_does_not_fit_the_tasks_is_refused(tmp_path, attention):
    with pytest.raises(ValueError, match=r"`attention`: got shape .* expected \(2, 2\)"):
        plot_attention(attention, NAMES, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.font_manager", None)
    with pytest.raises(ImportError, match=r'pip install "hf_curriculum\[plots\]"'):
        plot_attention(np.eye(2), NAMES, tmp_path / "x.png")
    record_of(tmp_path, NAMES, [[1.0, 0.0]] * 2, {})
    with pytest.raises(ImportError, match=r'pip install "hf_curriculum\[plots\]"'):
        draw_fusion(tmp_path)
