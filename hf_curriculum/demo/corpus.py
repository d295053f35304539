"""
Worded arithmetic of known grade: the corpus of the demo.

A problem is a short story that changes one number a few times; its worked answer repeats each change with the result.
Two parameters of the generator make the grade, and nothing else does::

    grade = steps + digits - 1        steps: changes of the number, 1..3; digits: size of the operands, 1..3

Length is kept apart from the grade on purpose, so that a scorer which only measures length is caught: the story is
filled up with sentences without a number, the answer with a preface that the problem asks for by name. Both are drawn
for a target length that does not depend on the grade. The preface follows word by word from the last sentence of the
problem, so a model learns it early, and what is left of an answer's loss comes from its numbers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import invalid


if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset


__all__ = [
    "FAMILIES",
    "MAX_DIGITS",
    "MAX_GRADE",
    "MAX_STEPS",
    "PREFACES",
    "Family",
    "Problem",
    "generate_corpus",
    "vocabulary",
]

MAX_STEPS = 3
MAX_DIGITS = 3
MAX_GRADE = MAX_STEPS + MAX_DIGITS - 1

# Words, roughly tokens, that a story and an answer are filled up to. The ranges reach over the bare length of the
# hardest problem (about 50 and 45): below that, length would follow the grade.
PROMPT_TARGET = (16, 60)
ANSWER_TARGET = (26, 48)

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Ida", "Jon", "Kira", "Leo")
NOUNS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "tickets")


@dataclass(frozen=True)
class Family:
    """
    The words of one kind of story.

    Args:
        name (`str`):
            Value of the column `family`.
        opening (`str`):
            First sentence, with the number that the story starts from as `{n}`.
        more (`str`):
            Sentence that adds `{n}`.
        less (`str`):
            Sentence that takes `{n}` away.
        question (`str`):
            Last sentence.
        times (`str`, *optional*, defaults to `""`):
            Sentence that multiplies by `{n}`, always the first change. Empty in a family that never multiplies.
    """

    name: str
    opening: str
    more: str
    less: str
    question: str
    times: str = ""


FAMILIES = (
    Family(
        "orchard",
        "{name} has {n} {noun}.",
        "{name} finds {n} more.",
        "{name} gives {n} away.",
        "How many {noun} does {name} have?",
    ),
    Family(
        "market",
        "{name} pays {n} for {noun}.",
        "Then {name} pays {n} more.",
        "{name} gets {n} back.",
        "How much did {name} pay?",
    ),
    Family(
        "bus",
        "A bus starts with {n} people.",
        "Then {n} people get on.",
        "Then {n} people get off.",
        "How many people are on the bus?",
    ),
    Family(
        "trail",
        "{name} walks {n} steps.",
        "{name} goes on for {n} steps.",
        "{name} turns back for {n} steps.",
        "How far from the start is {name}?",
    ),
    Family(
        "library",
        "A shelf holds {n} {noun}.",
        "{name} puts {n} on it.",
        "{name} takes {n} off it.",
        "How many {noun} are on the shelf?",
    ),
    Family(
        "packing",
        "Each box holds {n} {noun}.",
        "{name} adds {n} loose ones.",
        "{name} drops {n} of them.",
        "How many {noun} are left?",
        times="{name} packs {n} boxes.",
    ),
)

FILLERS = (
    "It is a fine day.",
    "The sun is out.",
    "It rains in the night.",
    "A dog sleeps by the door.",
    "Nobody is in a hurry today.",
    "There is music in the street.",
    "The old clock on the wall is slow.",
    "Some birds sing in a tall tree near the river.",
)

# What an answer may begin with: it counts to a number that the problem names. Every count is the beginning of the
# next, so even the longest is made of words that many answers hold. A sentence of its own for each length is rare
# enough to stay unlearned in a short probe, and then it, and not the arithmetic, sets the loss of its rows.
NUMBER_WORDS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen"),
)
COUNTS = (0, 3, 6, 9, 12, 15)
PREFACES = tuple(
    (f"Count to {NUMBER_WORDS[count - 1]} first.", ", ".join(NUMBER_WORDS[:count]).capitalize() + ".")
    if count
    else ("Begin at once.", "")
    for count in COUNTS
)

OPENING_LINE = "Start with {n}."
ANSWER_LINE = "The answer is {n}."
STEP_LINES = {
    "+": "Add {n} to get {result}.",
    "-": "Take away {n} to get {result}.",
    "*": "Multiply by {n} to get {result}.",
}


@dataclass(frozen=True)
class Problem:
    """
    One problem before it is put into words.

    Args:
        family (`Family`):
            Kind of story.
        digits (`int`):
            Size of the operands in decimal digits, in `[1, MAX_DIGITS]`.
        start (`int`):
            Number that the story starts from.
        steps (`tuple[tuple[str, int, int], ...]`):
            Each change of the number: operation (`"+"`, `"-"` or `"*"`), operand, result.
    """

    family: Family
    digits: int
    start: int
    steps: tuple[tuple[str, int, int], ...]

    @property
    def grade(self) -> int:
        """Difficulty by construction, in `[1, MAX_GRADE]`: a function of the generator's parameters alone."""
        return len(self.steps) + self.digits - 1


def vocabulary() -> list[str]:
    """
    Lists every word and sign that a corpus can hold, digits aside.

    Returns:
        `list[str]`: words and punctuation marks, sorted, each once.

    Example:

    ```python
    >>> from hf_curriculum.demo.corpus import vocabulary

    >>> "apples" in vocabulary()
    True
    ```
    """
    texts = [*NAMES, *NOUNS, *FILLERS, OPENING_LINE, ANSWER_LINE, *STEP_LINES.values()]
    texts += [text for preface in PREFACES for text in preface]
    texts += [text for kind in FAMILIES for text in (kind.opening, kind.more, kind.less, kind.question, kind.times)]
    return words_of(texts)


def words_of(texts: Iterable[str]) -> list[str]:
    """
    Takes texts apart.

    Args:
        texts (`Iterable[str]`):
            The texts; fields in braces, to be filled in, do not count.

    Returns:
        `list[str]`: words and punctuation marks, sorted, each once.
    """
    bare = (re.sub(r"\{\w+\}", " ", text) for text in texts)
    return sorted({piece for text in bare for piece in re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)})


def check_draw(num_rows: int, seed: int) -> None:
    """
    Refuses what no rows can be drawn by.

    Args:
        num_rows (`int`):
            Number of rows.
        seed (`int`):
            Seed of the generator.

    Raises:
        `ValueError`: for a `num_rows` below 1 or a negative `seed`.
    """
    for name, value, least in (("num_rows", num_rows, 1), ("seed", seed, 0)):
        if value < least:
            raise invalid(name, value, f"an integer >= {least}")


def generate_corpus(num_rows: int, seed: int = 0) -> Dataset:
    """
    Generates worded arithmetic of known grade, with worked answers.

    The rows of a shorter corpus are the first rows of a longer one of the same seed.

    Args:
        num_rows (`int`):
            Number of rows, at least 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator, at least 0. Every seed gives another corpus of the same distribution.

    Returns:
        `datasets.Dataset`: columns `prompt` and `completion` (`str`), `grade` (`int`, in `[1, MAX_GRADE]`: the ground
        truth, from the number of steps and the size of the operands alone) and `family` (`str`).

    Raises:
        `ValueError`: for a `num_rows` below 1 or a negative `seed`.

    Example:

    ```python
    >>> from hf_curriculum.demo.corpus import generate_corpus

    >>> generate_corpus(3, seed=7).column_names
    ['prompt', 'completion', 'grade', 'family']
    ```
    """
    from datasets import Dataset

    check_draw(num_rows, seed)
    rng = random.Random(seed)
    columns: dict[str, list[str | int]] = {"prompt": [], "completion": [], "grade": [], "family": []}
    for _ in range(num_rows):
        problem = _draw_problem(rng)
        prompt, completion = _put_into_words(problem, rng)
        columns["prompt"].append(prompt)
        columns["completion"].append(completion)
        columns["grade"].append(problem.grade)
        columns["family"].append(problem.family.name)
    return Dataset.from_dict(columns)


def _draw_problem(rng: random.Random) -> Problem:
    grade = rng.randint(1, MAX_GRADE)
    digits = rng.randint(max(1, grade + 1 - MAX_STEPS), min(MAX_DIGITS, grade))
    family = rng.choice(FAMILIES)
    smallest, largest = 10 ** (digits - 1), 10**digits - 1
    # Half of the range where a product follows, so that the product has no more digits than the operands.
    start = value = rng.randint(smallest, largest // 2 if family.times else largest)
    steps = []
    for index in range(grade + 1 - digits):
        if family.times and index == 0:
            operation, operand = "*", rng.randint(2, min(9, largest // value))
            value *= operand
        else:
            operand = rng.randint(smallest, largest)
            operation = _draw_sign(value, operand, largest, rng)
            value += operand if operation == "+" else -operand
        steps.append((operation, operand, value))
    return Problem(family, digits, start, tuple(steps))


def _draw_sign(value: int, operand: int, largest: int, rng: random.Random) -> str:
    """Draws a sign that keeps the result positive and, where one does, within the digits of the operands."""
    fitting = [sign for sign, fits in (("+", value + operand <= largest), ("-", value > operand)) if fits]
    return rng.choice(fitting) if fitting else "+"


def _put_into_words(problem: Problem, rng: random.Random) -> tuple[str, str]:
    family, name, noun = problem.family, rng.choice(NAMES), rng.choice(NOUNS)
    sentences = {"+": family.more, "-": family.less, "*": family.times}
    story = [family.opening.format(n=problem.start, name=name, noun=noun)]
    story += [sentences[sign].format(n=operand, name=name, noun=noun) for sign, operand, _ in problem.steps]
    _fill_up(story, rng)

    answer = [OPENING_LINE.format(n=problem.start)]
    answer += [STEP_LINES[sign].format(n=operand, result=result) for sign, operand, result in problem.steps]
    answer.append(ANSWER_LINE.format(n=problem.steps[-1][2]))
    request, preface = _draw_preface(answer, rng)

    story += [family.question.format(name=name, noun=noun), request]
    return " ".join(story), " ".join([preface, *answer] if preface else answer)


def _fill_up(story: list[str], rng: random.Random) -> None:
    target = rng.randint(*PROMPT_TARGET)
    length = sum(map(_num_words, story))
    for filler in _shuffled(FILLERS, rng):
        if length + _num_words(filler) <= target:
            story.insert(rng.randint(0, len(story)), filler)
            length += _num_words(filler)


def _draw_preface(answer: list[str], rng: random.Random) -> tuple[str, str]:
    missing = rng.randint(*ANSWER_TARGET) - sum(map(_num_words, answer))
    return min(PREFACES, key=lambda preface: abs(_num_words(preface[1]) - missing))


def _shuffled(items: tuple[str, ...], rng: random.Random) -> Iterator[str]:
    return iter(rng.sample(items, len(items)))


def _num_words(text: str) -> int:
    """Counts words, digits and punctuation marks: the tokens of the demo's tokenizer."""
    return len(re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text))
