"""The generated messages: labels follow from the texts, rows from the seed, and no held-out text is trained on."""

import random
from collections import Counter

import pytest

from hf_curriculum.demo.encoder import build_message_tokenizer
from hf_curriculum.demo.messages import (
    MESSAGE_TASKS,
    MOODS,
    MULTI_LABEL_TASKS,
    TAGS,
    TOPICS,
    URGENCIES,
    WISHES,
    draw_messages,
    draw_pairs,
    generate_messages,
)


def words_of(text):
    return set(text.replace(".", " ").replace("?", " ").split())


def value_of(text, words):
    """The only value of a factor one of whose words is in the text."""
    found = [name for name, own in words.items() if words_of(text) & set(own.split())]
    assert len(found) == 1, text
    return found[0]


def wish_of(text):
    patterns = {wish: [line.split("{noun}") for line in lines] for wish, lines in WISHES.items()}
    found = [
        wish for wish, lines in patterns.items() if any(before in text and after in text for before, after in lines)
    ]
    return found


def test_every_label_follows_from_the_text():
    for row in generate_messages(120, seed=3):
        topic, mood = value_of(row["text"], TOPICS), value_of(row["text"], MOODS)
        urgency, wishes = value_of(row["text"], URGENCIES), wish_of(row["text"])
        factors = {"topic": topic, "mood": mood, "urgency": urgency, "wish": wishes[0]}
        if row["task"] == "intent":
            assert row["label"] in [[f"{wish} {topic}"] for wish in wishes]
        elif row["task"] == "tags" and len(wishes) == 1:
            wanted = [tag for tag, (factor, values) in TAGS.items() if factors[factor] in values]
            assert row["label"] == wanted
        elif row["task"] in ("topic", "mood"):
            assert row["label"] == [factors[row["task"]]]


def test_each_wording_belongs_to_one_value():
    for group in (TOPICS, MOODS, URGENCIES):
        words = [word for own in group.values() for word in own.split()]
        assert len(set(words)) == len(words)
    everything = [word for group in (TOPICS, MOODS, URGENCIES) for own in group.values() for word in own.split()]
    assert len(set(everything)) == len(everything)
    sizes = {len(own.split()) for own in TOPICS.values()}
    assert len(sizes) == 1, "a topic with more words would have rarer ones"


def test_rows_of_a_task_begin_alike_whatever_the_others_have():
    before = random.getstate()
    small = generate_messages({"tags": 12, "topic": 5}, seed=1)
    large = generate_messages({"topic": 40, "mood": 3, "tags": 30}, seed=1)
    assert random.getstate() == before
    for task, count in (("tags", 12), ("topic", 5)):
        own = [[row for row in rows if row["task"] == task][:count] for rows in (small, large)]
        assert own[0] == own[1]
        assert len(own[0]) == count
    assert generate_messages(12, seed=2)["text"][:] != generate_messages(12, seed=1)["text"][:]


def test_no_held_out_text_is_in_any_training_row_or_pair():
    trained = {row["text"] for seed in range(3) for row in generate_messages(300, seed=seed)}
    trained |= {message.text for pair in draw_pairs(300) for message in pair}
    held_out = {row["text"] for seed in range(3) for row in generate_messages(300, seed=seed, held_out=True)}
    assert len(held_out) > 3000
    assert not trained & held_out


def test_labels_are_spread_over_their_classes():
    rows = generate_messages(900)
    for task, count in (("topic", 6), ("mood", 3), ("intent", 18)):
        counts = Counter(row["label"][0] for row in rows if row["task"] == task)
        assert len(counts) == count
        assert 0.5 * 900 / count < min(counts.values()) <= max(counts.values()) < 1.6 * 900 / count
    sizes = Counter(len(row["label"]) for row in rows if row["task"] in MULTI_LABEL_TASKS)
    assert sizes[0] > 0
    assert max(sizes) >= 3
    assert set(MESSAGE_TASKS) == set(rows["task"])


def test_pairs_say_the_same_and_hold_half_of_the_wordings():
    pairs = draw_pairs(400, seed=5)
    known = {word for group in (TOPICS, MOODS) for own in group.values() for word in own.split()[:6]}
    unknown = {word for group in (TOPICS, MOODS) for own in group.values() for word in own.split()[6:]}
    seen = set()
    for first, second in pairs:
        for task in MESSAGE_TASKS:
            assert first.label(task) == second.label(task)
        seen |= words_of(first.text) | words_of(second.text)
    assert sum(first.text == second.text for first, second in pairs) == 0
    assert known <= seen
    assert not unknown & seen
    assert unknown <= {word for message in draw_messages(2000) for word in words_of(message.text)}
    assert pairs[:50] == draw_pairs(50, seed=5)


def test_texts_are_whole_words_to_their_tokenizer_and_come_back():
    tokenizer = build_message_tokenizer()
    for row in generate_messages(50):
        ids = tokenizer(row["text"]).input_ids
        assert len(ids) <= 48
        assert tokenizer.decode(ids) == row["text"]
        pieces = [token for token in tokenizer.convert_ids_to_tokens(ids) if token.strip("▁").isalpha()]
        assert len(pieces) == len([word for word in words_of_in_order(row["text"]) if word.isalpha()])


def words_of_in_order(text):
    return text.replace(".", " ").replace("?", " ").split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_rows": 0}, "`num_rows`: got 0"),
        ({"num_rows": {"topic": 0}}, "`num_rows`: got 0"),
        ({"num_rows": {}}, "`num_rows`: got {}"),
        ({"num_rows": {"weather": 3}}, r"`num_rows`: got \['weather'\]"),
        ({"num_rows": 1, "seed": -1}, "`seed`: got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_messages(**arguments)


def test_bad_numbers_of_pairs_are_named():
    with pytest.raises(ValueError, match="`num_rows`: got 0"):
        draw_pairs(0)
