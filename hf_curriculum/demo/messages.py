"""
Generated messages to a customer service, and four related tasks on them: the data of the classification demo.

A message puts four hidden factors into words, each by one of many wordings::

    topic (6)  x  wish (3: ask, change, cancel)  x  mood (3)  x  urgency (2)

| task | label | what it shares |
|---|---|---|
| `topic` | the topic | the nouns, with `intent` and `tags` |
| `mood` | the mood | the adjectives, with `tags` |
| `intent` | topic and wish together, 18 classes | what `topic` knows |
| `tags` | several of five, each a function of one factor | what all others know |

A task with few rows meets only some of the wordings. One with many rows meets them all, so there is something to be
gained from consulting it. Labels follow from the factors, without noise.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..core.errors import invalid
from .corpus import check_draw, words_of


if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "MESSAGE_TASKS",
    "MULTI_LABEL_TASKS",
    "TAGS",
    "Message",
    "draw_messages",
    "draw_pairs",
    "generate_messages",
    "message_vocabulary",
]

MESSAGE_TASKS = ("topic", "mood", "intent", "tags")
MULTI_LABEL_TASKS = ("tags",)

TOPICS = {
    "delivery": "parcel package shipment courier driver doorstep mailbox depot carrier crate postman consignment",
    "billing": "invoice bill charge receipt fee statement tax surcharge payment balance discount refund",
    "account": "password login username profile address passcode settings newsletter membership code avatar nickname",
    "device": "screen battery keyboard charger hinge camera speaker microphone cable lid lens adapter",
    "travel": "seat ticket reservation flight room itinerary cabin platform luggage hotel shuttle train",
    "shop": "cashier queue shelf counter branch basket display stockroom escalator aisle entrance parking",
}
WISHES = {
    "ask": (
        "I have a question about the {noun}.",
        "Can you tell me more about the {noun}?",
        "Who knows about the {noun}?",
        "Please explain the {noun}.",
        "Is there any news of the {noun}?",
        "I would like to understand the {noun}.",
        "I wonder what the {noun} means.",
        "Describe the {noun} to me.",
    ),
    "change": (
        "Please change the {noun}.",
        "I need another {noun}.",
        "Could you swap the {noun}?",
        "The {noun} should be replaced.",
        "I want to update the {noun}.",
        "Kindly correct the {noun}.",
        "Exchange the {noun} for me.",
        "It is time to modify the {noun}.",
    ),
    "cancel": (
        "Please cancel the {noun}.",
        "I want to drop the {noun}.",
        "Remove the {noun}.",
        "I no longer need the {noun}.",
        "Get rid of the {noun}.",
        "We can do without the {noun}.",
        "Take the {noun} off my list.",
        "It is over with the {noun}.",
    ),
}
MOODS = {
    "happy": "great wonderful lovely superb pleasant fantastic delightful brilliant splendid charming perfect super",
    "neutral": "ordinary usual average plain standard regular normal typical common routine expected moderate",
    "angry": "awful terrible dreadful horrible poor annoying shameful ridiculous miserable pathetic rotten lousy",
}
MOOD_LINES = (
    "Your service is {word}.",
    "My experience was {word}.",
    "It all feels {word}.",
    "So far it has been {word}.",
)
URGENCIES = {
    "urgent": "today immediately tonight now instantly promptly",
    "patient": "sometime eventually later someday leisurely whenever",
}
URGENCY_LINES = ("Answer me {word}.", "I expect a reply {word}.", "Write back {word}.")
CONTEXT_LINES = ("This concerns the {noun}.", "You know my {noun}.", "The {noun} is from you.")
FILLERS = (
    "Hello.",
    "Good morning.",
    "Dear team.",
    "Thank you.",
    "My number is {number}.",
    "I am a customer.",
    "We spoke on the phone.",
    "My name is {name}.",
)
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo")

# Tag -> factor and the values of it that carry the tag.
TAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "complaint": ("mood", ("angry",)),
    "on site": ("topic", ("travel", "shop")),
    "online": ("topic", ("billing", "account")),
    "question": ("wish", ("ask",)),
    "urgent": ("urgency", ("urgent",)),
}

# Topic, wish, mood and urgency.
Factors: TypeAlias = tuple[str, str, str, str]

# Of the wordings of each factor, those that pairs hold.
FAMILIAR_SHARE = 0.5
# One text of so many is held out.
HELD_OUT_SHARE = 4
MOST_FILLERS = 2


@dataclass(frozen=True)
class Message:
    """
    One message and what it was made from.

    Args:
        text (`str`):
            The message.
        topic (`str`):
            What it is about.
        wish (`str`):
            What is wanted.
        mood (`str`):
            Of the sender.
        urgency (`str`):
            `"urgent"` or `"patient"`.
    """

    text: str
    topic: str
    wish: str
    mood: str
    urgency: str

    def label(self, task: str) -> list[str]:
        """
        Label of one task.

        Args:
            task (`str`):
                One of `MESSAGE_TASKS`.

        Returns:
            `list[str]`: one class, of `"tags"` any number in the order of `TAGS`.
        """
        if task == "tags":
            return [tag for tag, (factor, values) in TAGS.items() if getattr(self, factor) in values]
        return [f"{self.wish} {self.topic}" if task == "intent" else getattr(self, task)]


def generate_messages(num_rows: int | Mapping[str, int], seed: int = 0, *, held_out: bool = False) -> Dataset:
    """
    Generates rows of the four tasks, task by task.

    Of each task, the rows of a shorter set are the first rows of a longer one of the same seed, whatever the other
    tasks have. Whether a text is held out follows from the text alone, so no text of the held-out rows of any task is
    among the training rows of any task, for any seeds.

    Args:
        num_rows (`int` or `Mapping[str, int]`):
            Rows of each task, at least 1: one number for all, or a number for each task that is wanted.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator, at least 0.
        held_out (`bool`, *optional*, defaults to `False`):
            Whether to generate rows to evaluate on.

    Returns:
        `datasets.Dataset`: columns `text` (`str`), `task` (`str`) and `label` (`list[str]`: one class, of the
        multi-label task `"tags"` any number).

    Raises:
        `ValueError`: for a number of rows below 1, a negative `seed`, or an unknown task.

    Example:

    ```python
    >>> from hf_curriculum.demo.messages import generate_messages

    >>> generate_messages({"topic": 2, "tags": 1})["task"][:]
    ['topic', 'topic', 'tags']
    ```
    """
    from datasets import Dataset, Features, List, Value

    counts = dict.fromkeys(MESSAGE_TASKS, num_rows) if isinstance(num_rows, int) else dict(num_rows)
    if not counts or (unknown := [task for task in counts if task not in MESSAGE_TASKS]):
        raise invalid("num_rows", unknown if counts else counts, f"rows of some of {', '.join(MESSAGE_TASKS)}")
    columns: dict[str, list[object]] = {"text": [], "task": [], "label": []}
    for task, count in counts.items():
        messages = draw_messages(count, seed, stream=task, held_out=held_out)
        columns["text"] += [message.text for message in messages]
        columns["task"] += [task] * count
        columns["label"] += [message.label(task) for message in messages]
    text = Value("string")
    return Dataset.from_dict(columns, features=Features({"text": text, "task": text, "label": List(text)}))


def draw_messages(num_rows: int, seed: int = 0, *, stream: str = "plain", held_out: bool = False) -> list[Message]:
    """
    Draws messages with their factors.

    Args:
        num_rows (`int`):
            How many, at least 1. Fewer are the first of more.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator, at least 0.
        stream (`str`, *optional*, defaults to `"plain"`):
            Messages of one stream are drawn apart from those of another.
        held_out (`bool`, *optional*, defaults to `False`):
            Which side of the split all messages are from.

    Returns:
        `list[Message]`

    Raises:
        `ValueError`: for a `num_rows` below 1 or a negative `seed`.
    """
    check_draw(num_rows, seed)
    # A string seeds the generator by its digest, the same on every platform and version.
    generator = random.Random(f"messages {seed} {stream} {held_out}")
    return [_on_side(held_out, None, generator) for _ in range(num_rows)]


def draw_pairs(num_rows: int, seed: int = 0) -> list[tuple[Message, Message]]:
    """
    Draws pairs of messages that say the same in other words, for an encoder to learn from without labels.

    They hold the first half of the wordings of each factor alone: to an encoder that has read them the other half is
    new, as the words of a trade are to one from the Hub.

    Args:
        num_rows (`int`):
            How many pairs, at least 1. Fewer are the first of more.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the generator, at least 0.

    Returns:
        `list[tuple[Message, Message]]`: none of them with a text that [`generate_messages`] holds out.

    Raises:
        `ValueError`: for a `num_rows` below 1 or a negative `seed`.

    Example:

    ```python
    >>> from hf_curriculum.demo.messages import draw_pairs

    >>> first, second = draw_pairs(1)[0]
    >>> first.topic == second.topic
    True
    ```
    """
    check_draw(num_rows, seed)
    generator = random.Random(f"pairs of messages {seed}")
    pairs = []
    for _ in range(num_rows):
        factors = _factors(generator)
        first = _on_side(False, factors, generator, FAMILIAR_SHARE)
        pairs.append((first, _on_side(False, factors, generator, FAMILIAR_SHARE)))
    return pairs


def message_vocabulary() -> list[str]:
    """
    Lists every word and sign that a message can hold, digits aside.

    Returns:
        `list[str]`: words and punctuation marks, sorted, each once.

    Example:

    ```python
    >>> from hf_curriculum.demo.messages import message_vocabulary

    >>> "parcel" in message_vocabulary()
    True
    ```
    """
    texts = [*NAMES, *FILLERS, *MOOD_LINES, *URGENCY_LINES, *CONTEXT_LINES]
    texts += [line for lines in WISHES.values() for line in lines]
    texts += [*TOPICS.values(), *MOODS.values(), *URGENCIES.values()]
    return words_of(texts)


def _on_side(held_out: bool, factors: Factors | None, generator: random.Random, share: float = 1.0) -> Message:
    """The next message on one side of the split, of some factors or of any."""
    while True:
        drawn = _factors(generator) if factors is None else factors
        message = _put_into_words(drawn, generator, share)
        if (zlib.crc32(message.text.encode()) % HELD_OUT_SHARE == 0) == held_out:
            return message


def _factors(generator: random.Random) -> Factors:
    topic, wish = generator.choice(tuple(TOPICS)), generator.choice(tuple(WISHES))
    return topic, wish, generator.choice(tuple(MOODS)), generator.choice(tuple(URGENCIES))


def _put_into_words(factors: Factors, generator: random.Random, share: float = 1.0) -> Message:
    """One message, each factor in the first of its wordings, a share of them."""
    topic, wish, mood, urgency = factors

    def some(wordings: Sequence[str]) -> Sequence[str]:
        return wordings[: round(share * len(wordings))]

    nouns = generator.sample(some(TOPICS[topic].split()), 2)
    lines = [
        generator.choice(some(WISHES[wish])).format(noun=nouns[0]),
        generator.choice(CONTEXT_LINES).format(noun=nouns[1]),
        generator.choice(MOOD_LINES).format(word=generator.choice(some(MOODS[mood].split()))),
        generator.choice(URGENCY_LINES).format(word=generator.choice(some(URGENCIES[urgency].split()))),
    ]
    lines += [
        filler.format(number=generator.randint(100, 999), name=generator.choice(NAMES))
        for filler in generator.sample(FILLERS, generator.randint(0, MOST_FILLERS))
    ]
    generator.shuffle(lines)
    return Message(" ".join(lines), *factors)
