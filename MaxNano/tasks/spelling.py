"""Spelling: count a letter in a word (SpellingBee), and spell a word (SimpleSpelling).

A model sees tokens, not letters, and must memorize the letters of each token. Both tasks are
generated from a word list and need no data set. The default words are SCOWL's lists up to size 35
in lower case (words.txt, license in words_license.txt); chat_word_list names another file.
Source: nanochat/tasks/spellingbee.py@72b9064; with the same words the problems are the same.
"""

import random
import string
from importlib import resources
from typing import Any

from MaxNano.storage import files
from MaxNano.tasks.base import Conversation, Task, check_split, dialogue, same_final_number

# The seed of a problem is its index; of the test split, its index plus this.
_TEST_SEED = 10_000_000

# Templates of equal probability.
_QUESTIONS = (
    "How many {letter} are in the word {word}",
    "How many {letter} are in {word}",
    "Count the number of {letter} in {word}",
    "How many times does {letter} appear in {word}",
    "What's the count of {letter} in {word}",
    "In the word {word}, how many {letter} are there",
    "How many letter {letter} are in the word {word}",
    "Count how many {letter} appear in {word}",
    "Tell me the number of {letter} in {word}",
    "How many occurrences of {letter} are in {word}",
    "Find the count of {letter} in {word}",
    "Can you count the {letter} letters in {word}",
    "What is the frequency of {letter} in {word}",
    "How many {letter}s are in {word}",
    "How many {letter}'s are in {word}",
    "Count all the {letter} in {word}",
    "How many times is {letter} in {word}",
    "Number of {letter} in {word}",
    "Total count of {letter} in {word}",
    "How many {letter} does {word} have",
    "How many {letter} does {word} contain",
    "What's the number of {letter} in {word}",
    "{word} has how many {letter}",
    "In {word}, count the {letter}",
    "How many {letter} appear in {word}",
    "Count the {letter} in {word}",
    "Give me the count of {letter} in {word}",
    "How many instances of {letter} in {word}",
    "Show me how many {letter} are in {word}",
    "Calculate the number of {letter} in {word}",
    "¿Cuántas {letter} hay en {word}?",
    "¿Cuántas veces aparece {letter} en {word}?",
    "Cuenta las {letter} en {word}",
    "¿Cuántas letras {letter} tiene {word}?",
    "{word}中有多少个{letter}",
    "{word}里有几个{letter}",
    "数一下{word}中的{letter}",
    "{word}这个词里有多少{letter}",
    "{word}에 {letter}가 몇 개 있나요",
    "{word}에서 {letter}의 개수는",
    "{word}에 {letter}가 몇 번 나오나요",
    "{word}라는 단어에 {letter}가 몇 개",
    "Combien de {letter} dans {word}",
    "Combien de fois {letter} apparaît dans {word}",
    "Compte les {letter} dans {word}",
    "Wie viele {letter} sind in {word}",
    "Wie oft kommt {letter} in {word} vor",
    "Zähle die {letter} in {word}",
    "{word}に{letter}は何個ありますか",
    "{word}の中に{letter}がいくつ",
    "{word}に{letter}が何回出てくる",
)
_QUOTES = ("", "'", '"')


class _Spelling(Task):
    kind = "generative"
    sizes: dict[str, int]  # problems by split, as in nanochat

    def __init__(self, config: Any, split: str):
        check_split(split, tuple(self.sizes), type(self).__name__)
        self._size = self.sizes[split]
        self._first_seed = _TEST_SEED if split == "test" else 0
        self.words = load_words(config.chat_word_list)

    def __len__(self) -> int:
        return self._size

    def _random(self, index: int) -> random.Random:
        return random.Random(self._first_seed + index)


class SpellingBee(_Spelling):
    """An answer is correct if its number after #### is the count of the letter."""

    sizes = {"train": 80_000, "test": 256}

    def conversation(self, index: int) -> Conversation:
        draw = self._random(index)
        word = draw.choice(self.words)
        is_in_word = draw.random() < 0.9
        letter = draw.choice(word if is_in_word else string.ascii_lowercase)
        question = draw.choice(_QUESTIONS)
        if draw.random() < 0.3:  # some users write in lower case ...
            question = question.lower()
        letter_quote, word_quote = draw.choice(_QUOTES), draw.choice(_QUOTES)
        question = question.format(
            letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}"
        )
        if draw.random() < 0.5:  # ... and some without a question mark
            question += "?"
        return dialogue(question, counting_answer(word, letter))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return same_final_number(conversation, completion)


class SimpleSpelling(_Spelling):
    """Spell a word; an answer is correct if it equals the expected text."""

    sizes = {"train": 200_000, "test": 256}

    def __init__(self, config: Any, split: str):
        super().__init__(config, split)
        random.Random(42).shuffle(
            self.words
        )  # so that an index has another word than in SpellingBee

    def conversation(self, index: int) -> Conversation:
        word = self._random(index).choice(self.words)
        return dialogue(f"Spell the word: {word}", spelled(word))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]


def spelled(word: str) -> str:
    """The word and its letters, without spaces: a space would make another token."""
    return f"{word}:{','.join(word)}"


def counting_answer(word: str, letter: str) -> list[dict[str, str]]:
    """The assistant's parts: it counts manually, then with the tool, and states the number."""
    lines, count = [], 0
    for position, other in enumerate(word, start=1):
        count += other == letter
        hit = f" hit! count={count}" if other == letter else ""
        lines.append(f"{position}:{other}{hit}")
    by_hand = (
        f"We are asked to find the number '{letter}' in the word '{word}'. "
        "Let me try a manual approach first.\n\n"
        f"First spell the word out:\n{spelled(word)}\n\n"
        f"Then count the occurrences of '{letter}':\n"
        + "".join(f"{line}\n" for line in lines)
        + f"\nThis gives us {count}."
    )
    return [
        {"type": "text", "text": by_hand},
        {"type": "text", "text": "\n\nLet me double check this using Python:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {
            "type": "text",
            "text": f"\n\nPython gives us {count}.\n\nMy final answer is:\n\n#### {count}",
        },
    ]


def load_words(path: str | None) -> list[str]:
    """The words of a file with one per line, or MaxNano's own list.

    Raises ValueError that names the line of a malformed word.
    """
    if path is None:
        return resources.files(__package__).joinpath("words.txt").read_text("utf-8").split()
    text = files.read_text(path, f"chat_word_list={path}")
    words = [line.strip() for line in text.splitlines()]
    for number, word in enumerate(words, start=1):
        if not word.isalpha():
            raise ValueError(f"chat_word_list={path}, line {number}: {word!r} is not one word")
    if not words:
        raise ValueError(f"chat_word_list={path} has no words")
    return words
