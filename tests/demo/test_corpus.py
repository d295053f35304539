"""The generated corpus: right answers, known grades, and no way to read the grade off the length."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from hf_curriculum.demo.corpus import FAMILIES, MAX_DIGITS, MAX_GRADE, MAX_STEPS, PREFACES, generate_corpus, vocabulary
from hf_curriculum.demo.model import build_tokenizer


STEP = re.compile(r"(Add|Take away|Multiply by) (\d+) to get (\d+)\.")


def _ranks(values: list[int]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _spearman(left: list[int], right: list[int]) -> float:
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str | int]]:
    return generate_corpus(2000, seed=3).to_list()


def test_columns_and_types(rows):
    assert list(rows[0]) == ["prompt", "completion", "grade", "family"]
    features = generate_corpus(2).features
    assert [features[name].dtype for name in features] == ["string", "string", "int64", "string"]


def test_same_seed_gives_the_same_rows_and_a_longer_corpus_begins_with_them(rows):
    assert generate_corpus(50, seed=3).to_list() == rows[:50]


def test_another_seed_gives_other_rows(rows):
    texts = {row["prompt"] for row in rows}
    others = generate_corpus(2000, seed=4)["prompt"]
    assert sum(prompt in texts for prompt in others) < 20


def test_rows_are_mostly_distinct(rows):
    assert len({(row["prompt"], row["completion"]) for row in rows}) > 0.99 * len(rows)


@pytest.mark.parametrize(("num_rows", "seed", "name"), [(0, 0, "num_rows"), (-1, 0, "num_rows"), (1, -1, "seed")])
def test_a_value_out_of_range_is_refused_by_name(num_rows, seed, name):
    with pytest.raises(ValueError, match=f"Invalid `{name}`: got -?[01], expected an integer >= [01]"):
        generate_corpus(num_rows, seed=seed)


def test_every_worked_answer_is_right(rows):
    """Evaluates the numbers of the story anew, and compares each line of the answer with them."""
    for row in rows:
        start = re.search(r"Start with (\d+)\.", row["completion"])
        value = int(start[1])
        for verb, operand, result in STEP.findall(row["completion"]):
            value = {"Add": value + int(operand), "Take away": value - int(operand)}.get(verb, value * int(operand))
            assert value == int(result) > 0, row
        assert re.findall(r"The answer is (\d+)\.", row["completion"]) == [str(value)], row


def test_the_story_holds_the_operands_of_the_answer_in_order_and_no_other_number(rows):
    for row in rows:
        operands = [operand for _, operand, _ in STEP.findall(row["completion"])]
        start = re.search(r"Start with (\d+)\.", row["completion"])
        assert re.findall(r"\d+", row["prompt"]) == [start[1], *operands]


def test_the_sign_of_each_step_is_the_one_that_the_story_tells(rows):
    verbs = {"more": "Add", "less": "Take away", "times": "Multiply by"}
    patterns = {
        family.name: [
            (re.compile(re.escape(getattr(family, kind)).replace(r"\{n\}", r"\d+").replace(r"\{name\}", r"\w+")), verb)
            for kind, verb in verbs.items()
            if getattr(family, kind)
        ]
        for family in FAMILIES
    }
    for row in rows:
        found = sorted(
            (match.start(), verb)
            for pattern, verb in patterns[row["family"]]
            for match in pattern.finditer(row["prompt"])
        )
        assert [verb for _, verb in found] == [verb for verb, _, _ in STEP.findall(row["completion"])], row


def test_grade_is_steps_plus_digits_minus_one(rows):
    """Fails if the grade came from anything but the two parameters, both of which the text shows."""
    for row in rows:
        steps = STEP.findall(row["completion"])
        digits = len(re.search(r"Start with (\d+)\.", row["completion"])[1])
        assert row["grade"] == len(steps) + digits - 1
        assert all(len(operand) == digits for verb, operand, _ in steps if verb != "Multiply by")


def test_every_grade_family_and_size_occurs(rows):
    grades = Counter(row["grade"] for row in rows)
    assert sorted(grades) == list(range(1, MAX_GRADE + 1))
    assert min(grades.values()) > 0.8 * len(rows) / MAX_GRADE
    assert {row["family"] for row in rows} == {family.name for family in FAMILIES}
    sizes = {
        (len(STEP.findall(row["completion"])), len(re.search(r"Start with (\d+)", row["completion"])[1]))
        for row in rows
    }
    assert sizes == {(steps, digits) for steps in range(1, MAX_STEPS + 1) for digits in range(1, MAX_DIGITS + 1)}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_length_does_not_tell_the_grade(seed):
    corpus = generate_corpus(3000, seed=seed).to_dict()
    tokenizer = build_tokenizer()
    prompt = [len(ids) for ids in tokenizer(corpus["prompt"])["input_ids"]]
    completion = [len(ids) for ids in tokenizer(corpus["completion"])["input_ids"]]
    total = [first + second for first, second in zip(prompt, completion, strict=True)]
    assert abs(_spearman(total, corpus["grade"])) <= 0.35
    assert abs(_spearman(completion, corpus["grade"])) <= 0.5


def test_the_preface_follows_from_the_problem(rows):
    """A preface that the problem did not announce would put noise of its own into the loss of an answer."""
    prefaces = {}
    for row in rows:
        request = re.search(r"[^.?]+\.$", row["prompt"])[0].strip()
        preface, _ = row["completion"].split("Start with")
        assert prefaces.setdefault(request, preface) == preface
    assert len(prefaces) == len(PREFACES)


def test_texts_are_plain_ascii(rows):
    assert all(row[name].isascii() for row in rows for name in ("prompt", "completion", "family"))


def test_the_vocabulary_covers_every_text(rows):
    words = set(vocabulary())
    text = " ".join(f"{row['prompt']} {row['completion']}" for row in rows)
    assert set(re.findall(r"[A-Za-z]+|[^\sA-Za-z0-9]", text)) <= words
    assert sorted(words) == vocabulary()
