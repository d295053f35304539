import math
import random
from collections import Counter

import pytest

from hf_curriculum.demo.corpus import NAMES
from hf_curriculum.demo.model import build_tokenizer
from hf_curriculum.demo.tasks import LABEL_TASKS, TASKS, generate_copies, generate_tasks, guess_losses


def solve(prompt):
    """The answer, worked out from the prompt alone."""
    instruction, _, rest = prompt.partition(": ")
    words = rest.split()
    return {
        "Reverse": lambda: " ".join(reversed(words)),
        "Last": lambda: words[-1],
        "Kind": lambda: {True: "names", False: "things"}[words[0] in NAMES],
        "Parity": lambda: str(int(rest) % 2),
    }[instruction]()


def test_every_completion_is_the_right_answer():
    for row in generate_tasks(400, seed=3):
        assert row["completion"] == solve(row["prompt"])
        assert row["label"] == (row["completion"] if row["task"] in LABEL_TASKS else None)


def test_tasks_take_turns_and_can_be_chosen():
    assert generate_tasks(9)["task"][:] == [*TASKS, *TASKS, "reverse"]
    assert set(generate_tasks(6, tasks=LABEL_TASKS)["task"]) == set(LABEL_TASKS)


def test_rows_are_a_function_of_the_seed_and_begin_alike():
    before = random.getstate()
    short, long, other = generate_tasks(40, seed=1), generate_tasks(80, seed=1), generate_tasks(40, seed=2)
    assert random.getstate() == before
    assert short["prompt"][:] == long["prompt"][:40] != other["prompt"][:]


def test_labels_are_not_all_alike():
    rows = generate_tasks(1200)
    for task in LABEL_TASKS:
        counts = Counter(row["label"] for row in rows if row["task"] == task)
        assert len(counts) == {"last": len(NAMES), "kind": 2, "parity": 2}[task]
        assert max(counts.values()) < {"last": 0.2, "kind": 0.6, "parity": 0.6}[task] * 300


def test_texts_are_short_for_the_demo_s_tokenizer_and_come_back():
    tokenizer = build_tokenizer()
    for row in generate_tasks(40):
        ids = tokenizer(row["prompt"] + "\n" + row["completion"]).input_ids
        assert len(ids) <= 32
        assert tokenizer.decode(ids) == row["prompt"] + "\n" + row["completion"]


def test_copies_repeat_their_prompt_and_hold_no_task():
    rows = generate_copies(50, seed=4)
    assert all(row["prompt"] == f"Copy: {row['completion']}" for row in rows)
    assert rows.column_names == ["prompt", "completion"]


def test_a_guess_loses_what_the_number_of_answers_says():
    labels = [[-100, 5, 9], [-100, 6, 9], [-100, 5, 9], [-100, 5, 6, 7, 9]]
    found = guess_losses(labels, ["a", "a", "a", "b"])
    assert found == {"a": pytest.approx(math.log(2) / 2), "b": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "`num_rows`: got 0"),
        ({"num_rows": 1, "seed": -1}, "`seed`: got -1"),
        ({"num_rows": 1, "tasks": ("sum",)}, "`tasks`: got \\['sum'\\]"),
        ({"num_rows": 1, "tasks": ()}, "`tasks`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_tasks(**arguments)
