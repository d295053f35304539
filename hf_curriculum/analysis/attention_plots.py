"""
Pictures of attention before and after a fine-tune, each as PNG with its data as CSV beside it.

matplotlib is an optional extra, imported where a picture is drawn: `pip install "hf_curriculum[plots]"`.

Shapes: L layers, H heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .attention_comparison import Comparison
from .attention_measurement import AttentionMeasurement, mean_without_nan
from .attention_words import CATEGORIES, CONTENT, FUNCTION, Word, WordRules, row_spearman, split_words
from .pictures import Row, new_figure, save_figure


__all__ = ["draw_all", "plot_categories", "plot_entropy_change", "plot_idf", "plot_sentence"]

# Okabe and Ito's palette, which people with any kind of colour vision can tell apart; one colour for each category.
COLORS = ("#0072B2", "#56B4E9", "#E69F00", "#999999", "#CC79A7")
SINK_COLOR = "#444444"
BLANK_COLOR = "#cccccc"
LINE_CHARACTERS = 84


def _limit(values: np.ndarray) -> float:
    """Largest size among numbers, for a scale that is even about 0."""
    known = np.abs(values[np.isfinite(values)])
    return float(known.max()) if known.size and known.max() > 0 else 1e-6


def plot_entropy_change(comparison: Comparison, path: str | Path, title: str = "") -> Path:
    """
    Draws the change of entropy of every head, with the sink and without it.

    Args:
        comparison ([`~hf_curriculum.analysis.attention_comparison.Comparison`]):
            The two models.
        path (`str` or `Path`):
            PNG file; the data goes beside it.
        title (`str`, *optional*, defaults to `""`):
            Names of the two models.

    Returns:
        `Path`: the PNG.

    Raises:
        `ImportError`: without matplotlib.
    """
    panels = {"entropy": "all tokens", "entropy_rest": "first token left out"}
    layers, heads = comparison.heads["entropy"].shape
    figure = new_figure(2.6 + 2 * max(2.2, 0.42 * heads), 1.7 + max(2.2, 0.3 * layers))
    axes = figure.subplots(1, 2, sharey=True)
    limit = max(_limit(comparison.heads[name]) for name in panels)
    for axis, (name, label) in zip(axes, panels.items()):
        image = axis.imshow(comparison.heads[name], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("head")
        axis.set_xticks(range(0, heads, max(1, heads // 8)))
        step = max(1, layers // 16)
        axis.set_yticks(range(0, layers, step), comparison.layers[::step])
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="change of entropy, share of the maximum\n(blue: narrower, red: wider)")
    figure.suptitle(_title("Change of attention entropy", title), fontsize=11)
    rows = [
        (comparison.layers[layer], head, *(comparison.heads[name][layer, head] for name in panels))
        for layer in range(layers)
        for head in range(heads)
    ]
    return save_figure(figure, Path(path), ("layer", "head", "entropy_change", "entropy_rest_change"), rows)


def _title(what: str, models: str) -> str:
    return f"{what}: {models}" if models else what


def plot_categories(comparison: Comparison, path: str | Path, title: str = "") -> Path:
    """
    Draws the mass on the sink, and on each category with the sink taken out, layer by layer, before and after.

    Args:
        comparison ([`~hf_curriculum.analysis.attention_comparison.Comparison`]):
            The two models.
        path (`str` or `Path`):
            PNG file; the data goes beside it.
        title (`str`, *optional*, defaults to `""`):
            Names of the two models.

    Returns:
        `Path`: the PNG.

    Raises:
        `ImportError`: without matplotlib.
    """
    layers = comparison.layers
    figure = new_figure(3.2 + 0.62 * len(layers), 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    places, width = np.arange(len(layers)), 0.38
    names = ["sink", *(f"mass_{name}" for name in CATEGORIES)]
    rows: list[Row] = [
        (layer, name, item.before, item.after, item.change, item.low, item.high)
        for name in names
        for layer, item in zip(layers, comparison.by_layer[name])
    ]
    for offset, side, alpha in ((-0.2, "before", 0.55), (0.2, "after", 1.0)):
        top.bar(places + offset, _side(comparison, "sink", side), width, color=SINK_COLOR, alpha=alpha, label=side)
        base = np.zeros(len(layers))
        for name, color in zip(CATEGORIES, COLORS):
            heights = _side(comparison, f"mass_{name}", side)
            if not any(_side(comparison, f"mass_{name}", each).any() for each in ("before", "after")):
                continue
            label = name if side == "after" else None
            bottom.bar(places + offset, heights, width, bottom=base, color=color, alpha=alpha, label=label)
            base = base + heights
    top.set_ylabel("mass on the\nfirst token")
    top.set_ylim(bottom=0)
    top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="left, pale: before\nright: after")
    bottom.set_ylabel("share of the rest")
    bottom.set_ylim(0, 1)
    bottom.set_xlabel("layer")
    bottom.set_xticks(places, layers)
    handles, labels = bottom.get_legend_handles_labels()
    bottom.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(_title("Where attention lies", title), fontsize=11)
    columns = ("layer", "category", "before", "after", "change", "low", "high")
    return save_figure(figure, Path(path), columns, rows)


def _side(comparison: Comparison, name: str, side: str) -> np.ndarray:
    return np.array([getattr(item, side) for item in comparison.by_layer[name]])


def _lines(text: str) -> list[tuple[int, int]]:
    """First character and character after the last of each line of a text, broken at spaces."""
    lines, start = [], 0
    while start < len(text):
        end = min(start + LINE_CHARACTERS, len(text))
        newline = text.find("\n", start, end)
        if newline >= 0:
            end = newline + 1
        elif end < len(text) and (space := text.rfind(" ", start, end)) > start:
            end = space + 1
        lines.append((start, end))
        start = end
    return lines


def plot_sentence(
    text: str, before: AttentionMeasurement, after: AttentionMeasurement, index: int, path: str | Path, title: str = ""
) -> Path:
    """
    Draws a text three times, each word coloured by the attention it receives: before, after, and the change.

    The first token is left out of every number. Its word is grey, as is any that was not read.

    Args:
        text (`str`):
            The text.
        before ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The base model.
        after ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The tuned model.
        index (`int`):
            Which of the measured texts it is.
        path (`str` or `Path`):
            PNG file; the data goes beside it.
        title (`str`, *optional*, defaults to `""`):
            Names of the two models.

    Returns:
        `Path`: the PNG.

    Raises:
        `ImportError`: without matplotlib.
    """
    words = before.texts[index].words
    measured = {word.start for word in words}
    blank = [word for word in split_words(text, WordRules()) if word.start not in measured]
    sides = [measurement.texts[index].received for measurement in (before, after)]
    with np.errstate(divide="ignore", invalid="ignore"):
        old, new = (np.log2(values) for values in sides)
        panels = {"before": old, "after": new, "change": new - old}
    lines = _lines(text)
    figure = new_figure(9.5, 1.0 + 3 * (0.55 + 0.24 * len(lines)))
    axes = figure.subplots(3, 1)
    limits = {name: 2.0 if name != "change" else _limit(values) for name, values in panels.items()}
    for axis, (name, values) in zip(axes, panels.items()):
        image = _draw_words(
            axis, text, lines, [*zip(words, values), *((word, np.nan) for word in blank)], limits[name]
        )
        bar = figure.colorbar(
            image, ax=axis, fraction=0.03, pad=0.01, extend="neither" if name == "change" else "both"
        )
        if name == "change":
            bar.set_label("log2 after / before", fontsize=8)
        else:
            bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
        bar.ax.tick_params(labelsize=8)
        axis.set_title(name, fontsize=10, loc="left")
    figure.suptitle(_title("Attention received, 1 = what distance explains, first token left out", title), fontsize=11)
    rows = [
        (word.start, word.text, CATEGORIES[word.category], *values)
        for word, *values in zip(words, *sides, panels["change"])
    ]
    columns = ("character", "word", "category", "received_before", "received_after", "log2_change")
    return save_figure(figure, Path(path), columns, rows)


def _draw_words(
    axis: Any, text: str, lines: list[tuple[int, int]], values: Sequence[tuple[Word, float]], limit: float
) -> Any:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    norm, colors = Normalize(-limit, limit), colormaps["RdBu_r"]
    for row, (start, end) in enumerate(lines):
        for word, value in values:
            if start <= word.start < end:
                color = colors(norm(value)) if np.isfinite(value) else BLANK_COLOR
                axis.add_patch(Rectangle((word.start - start, row), word.end - word.start, 0.9, color=color, lw=0))
        for column, character in enumerate(text[start:end].rstrip("\n")):
            if not character.isspace():
                axis.text(
                    column + 0.5, row + 0.45, character, family="monospace", fontsize=8.5, ha="center", va="center",
                    parse_math=False,
                )  # fmt: skip
    axis.set_xlim(0, LINE_CHARACTERS)
    axis.set_ylim(len(lines), 0)
    axis.set_axis_off()
    return ScalarMappable(norm, colors)


def plot_idf(before: AttentionMeasurement, after: AttentionMeasurement, path: str | Path, title: str = "") -> Path:
    """
    Draws the attention that each word receives against its rarity, before and after.

    A point is a word of the corpus, mean over its occurrences; numbers and punctuation are left out, as in the
    measure `idf_correlation`, which is taken within texts and by head.

    Args:
        before ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The base model.
        after ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The tuned model.
        path (`str` or `Path`):
            PNG file; the data goes beside it.
        title (`str`, *optional*, defaults to `""`):
            Names of the two models.

    Returns:
        `Path`: the PNG.

    Raises:
        `ImportError`: without matplotlib.
    """
    figure = new_figure(9.0, 4.2)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    tables = [_by_word(measurement) for measurement in (before, after)]
    for axis, table, side in zip(axes, tables, ("before", "after")):
        points = np.array([(idf, received) for idf, received, _, _ in table.values()]).reshape(-1, 2)
        kinds = np.array([kind for _, _, kind, _ in table.values()])
        counts = np.array([count for *_, count in table.values()])
        for kind in (FUNCTION, CONTENT):
            chosen = kinds == kind
            axis.scatter(
                *points[chosen].T, s=6 + 4 * np.sqrt(counts[chosen]), color=COLORS[kind], alpha=0.45, linewidths=0,
                label=f"{CATEGORIES[kind]} words",
            )  # fmt: skip
        axis.axhline(1, color=SINK_COLOR, lw=0.8, ls=":")
        rho = row_spearman(points[None, :, 1], points[:, 0])[0]
        axis.set_title(f"{side}: Spearman {rho:+.2f} over {len(points)} words", fontsize=10)
        axis.set_xlabel("idf of the word, nats")
    axes[0].set_yscale("log", base=2)
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].set_ylabel("attention received\n(1 = what distance explains)")
    axes[1].legend(frameon=False, fontsize=8, markerscale=1.2)
    what = _title("Attention against rarity, all texts, layers and heads pooled", title)
    figure.suptitle(what, fontsize=11)
    rows = [
        (word, CATEGORIES[kind], count, idf, received, tables[1][word][1])
        for word, (idf, received, kind, count) in tables[0].items()
        if word in tables[1]
    ]
    columns = ("word", "category", "count", "idf", "received_before", "received_after")
    return save_figure(figure, Path(path), columns, rows)


def _by_word(measurement: AttentionMeasurement) -> dict[str, tuple[float, float, int, int]]:
    """Lower-case word -> idf, mean attention received, category, occurrences."""
    found: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for text in measurement.texts:
        for word, received, idf in zip(text.words, text.received, text.idf):
            if word.category in (CONTENT, FUNCTION) and not np.isnan(received):
                found[word.text.lower()].append((float(idf), float(received), word.category))
    return {
        word: (items[0][0], float(mean_without_nan(np.array([item[1] for item in items]), 0)), items[0][2], len(items))
        for word, items in sorted(found.items())
    }


def draw_all(
    texts: Sequence[str],
    before: AttentionMeasurement,
    after: AttentionMeasurement,
    comparison: Comparison,
    folder: str | Path,
    *,
    title: str = "",
    sentence: int = 0,
) -> list[Path]:
    """
    Draws the four pictures into a folder.

    Args:
        texts (`Sequence[str]`):
            The probe texts.
        before ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The base model.
        after ([`~hf_curriculum.analysis.attention_measurement.AttentionMeasurement`]):
            The tuned model.
        comparison ([`~hf_curriculum.analysis.attention_comparison.Comparison`]):
            Of the two.
        folder (`str` or `Path`):
            Where to; made when missing.
        title (`str`, *optional*, defaults to `""`):
            Names of the two models.
        sentence (`int`, *optional*, defaults to `0`):
            Which text to draw word by word.

    Returns:
        `list[Path]`: the PNG files; each has a CSV of the same name.

    Raises:
        `ImportError`: without matplotlib.
    """
    folder = Path(folder)
    return [
        plot_entropy_change(comparison, folder / "entropy_change.png", title),
        plot_categories(comparison, folder / "categories.png", title),
        plot_sentence(texts[sentence], before, after, sentence, folder / "sentence.png", title),
        plot_idf(before, after, folder / "idf.png", title),
    ]
