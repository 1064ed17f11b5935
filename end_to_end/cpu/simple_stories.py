"""Generated stories and small talk in simple words, so that a tiny model has something to learn.

Nobody wrote these texts: sentences are drawn from the templates below, with a seed, so the same
number is the same story. A model of a few million parameters learns from them in minutes to keep
to a subject for a few sentences; from real text alone it does not.
"""

import random
import re
from collections.abc import Mapping, Sequence

Messages = list[dict[str, str]]

GIRLS = "Anna Lily Mia Nora Rosa Sara Emma Ella Ruby Ivy Maya Clara Zoe Alice Lucy Grace".split()
BOYS = "Tom Ben Max Leo Sam Jack Finn Noah Theo Adam Oscar Paul Hugo Eli Luke Peter".split()
KINDS = (
    "fox rabbit bear mouse cat dog owl hedgehog squirrel duck frog turtle goat horse lamb bird"
).split()
PETS = (
    "Pip Dot Bella Coco Teddy Milo Hazel Biscuit Pepper Daisy Rusty Clover Bramble Nibbles".split()
)
THINGS = "ball kite book hat drum boat doll lamp bell cup key blanket scarf whistle".split()
FOODS = "cake bread soup apples cookies honey pancakes cheese berries jam".split()
PLACES = "garden park forest farm beach hill lake village market meadow barn river".split()
COLORS = "red blue green yellow white brown purple orange".split()
TRAITS = "little kind brave shy clever happy quiet curious careful gentle".split()
WEATHER = "sunny rainy windy cold warm snowy cloudy".split()

# The sentences of each part of a story; {word} is one of draw_words.
RULES: dict[str, Sequence[str]] = {
    "open": (
        "Once upon a time, there was a {trait} {who} named {name}.",
        "One day, a {trait} {who} named {name} went to the {place}.",
        "There was once a {trait} {who} called {name}, who lived near a {place}.",
        "{name} was a {trait} {who} who lived by the {place}.",
        "Long ago, near a {place}, there lived a {trait} {who} named {name}.",
        "It was a {weather} morning, and a {who} named {name} woke up early.",
    ),
    "likes": (
        "{name} had a {color} {thing} and loved it very much.",
        "Every day {name} played with a {color} {thing}.",
        "{name} liked to eat {food} and to sit in the sun.",
        "{name} loved to walk to the {place2} and look at the sky.",
        "{name}'s best friend was a {kind3} named {name3}.",
        "Every morning {he} ate some {food} and went out to play.",
    ),
    "day": (
        "One {weather} day, {name} went to the {place2}.",
        "On a {weather} day, {he} walked to the {place2} with {name3}, the {kind3}.",
        "One morning {he} wanted to go to the {place2}.",
        "It was a {weather} day, so {name} went outside.",
    ),
    "glad": (
        "{name} was very happy.",
        "{name} smiled and jumped up and down.",
        "{name} laughed, and {name2} laughed too.",
        '"Thank you," said {name}. "You are a good friend."',
        '"I am so happy!" said {name}.',
    ),
    "proud": (
        '"Look what I have!" cried {name}, and all the animals came to see it.',
        "{name} danced around it and sang a song.",
        '"It was good to wait," said {name}.',
    ),
    "end": (
        "From that day on, they were the best of friends.",
        "Then they went home and ate {food} together.",
        "That night {name} slept well and dreamed of the {place2}.",
        "And they all lived happily ever after.",
        "{name} never forgot that day.",
        "When the sun went down, {name} went home with a smile.",
        "Mother was proud of {name} and gave {him} some {food}.",
    ),
    "lost": (
        "But then the {thing} was gone.",
        "But when {name} looked for the {thing}, it was not there.",
        "Suddenly the wind took the {thing} and carried it away.",
    ),
    "sad": (
        "{name} was sad and began to cry.",
        "{name} sat down under a tree and did not know what to do.",
        '"Oh no!" said {name}. "What can I do now?"',
    ),
    "meets": (
        "Then a {kind2} named {name2} came by.",
        "Just then {he} met {name2}, a {trait2} {kind2}.",
        "A {trait2} {kind2} named {name2} saw {him} and stopped.",
    ),
    "asks": (
        '"Why are you sad?" asked {name2}.',
        '"What is the matter?" asked {name2}.',
        '"Can I help you?" asked {name2}.',
        '"Please do not cry," said {name2}. "I will help you."',
    ),
    "search": (
        "They looked in the {place2}, but the {thing} was not there.",
        "They looked behind the trees and under the stones.",
        "{name2} looked up, and {name} looked down.",
        "First they went to the {place}. Then they went to the {place2}.",
    ),
    "finds": (
        'At last {name2} saw something {color} in the grass. "Here it is!" said {name2}.',
        "Then they found the {thing} at the top of a tree, and {name2} brought it down.",
        "There was the {color} {thing}, right next to the {place2}!",
    ),
    "stuck": (
        "There {he} saw a {kind2} who could not get out of a hole.",
        "There {he} heard a small voice. It was a {kind2} who had hurt a foot.",
        "By the water sat a {kind2} who was lost and could not find the way home.",
    ),
    "begs": (
        '"Please help me," said the {kind2}. "My name is {name2}."',
        '"Can you help me?" asked the {kind2}, whose name was {name2}.',
        '"I am {name2}," said the {kind2}. "I want to go home."',
    ),
    "helps": (
        "{name} was not afraid. {He} took {name2} by the hand and helped.",
        '"Do not worry," said {name}. "I will help you."',
        "{name} thought for a while. Then {he} had an idea and ran to get a rope.",
        "{name} gave {name2} some {food} and a {color} blanket.",
    ),
    "saved": (
        "Soon {name2} was safe and warm.",
        "They walked together until they came to the house of {name2}.",
        "It was hard work, but in the end {name2} was free.",
    ),
    "alone": (
        "But {name} had no friends, and every day was long.",
        "{name} was new in the {place} and did not know anyone.",
        "{name} wanted a friend to play with.",
    ),
    "hello": (
        '"Hello, I am {name2}," said the {kind2}. "Do you want to play?"',
        '"Hello," said {name}. "What is your name?" "My name is {name2}," said the {kind2}.',
        '"What a nice {thing} you have!" said {name2}. "May I play with you?"',
    ),
    "play": (
        "They played with the {color} {thing} all day.",
        "They ran down the hill and up again.",
        "They shared the {food} and told each other stories.",
        "{name} showed {name2} the {place2}, and they sang a song.",
    ),
    "storm": (
        "Suddenly the sky became dark, and it began to rain.",
        "But then there was a big storm, and the wind was loud.",
        "In the night it became very cold, and snow fell on the {place}.",
    ),
    "shelter": (
        '"Come into my house," said a {kind2} named {name2}.',
        "{name} ran to a small house and knocked at the door. A {kind2} named {name2} opened it.",
        "There was a light in a window. It was the house of {name2}, the {kind2}.",
    ),
    "warm": (
        "They sat by the fire and ate warm {food}.",
        "{name2} gave {him} a dry blanket and hot {food}.",
        "They told stories until the rain stopped.",
    ),
    "seed": (
        "{name} found a small seed and put it into the ground near the house.",
        "Grandmother gave {name} a seed. {name} planted it next to the {place}.",
    ),
    "wait": (
        "Every day {he} gave it water, but nothing happened.",
        "The first day nothing grew. The second day nothing grew.",
        '"You must wait," said {name2}, the {kind2}. "Good things take time."',
    ),
    "grows": (
        "Then one morning there was a {color} flower.",
        "After many days a little green leaf came out of the ground.",
        "In the summer it was a big tree, full of sweet fruit.",
    ),
    "broke": (
        "{name} played in the house and broke the {color} {thing} of {name2}.",
        "{name} took the {thing} of {name2} without asking, and it fell and broke.",
    ),
    "truth": (
        '"I am sorry," said {name}. "I broke your {thing}."',
        "{name} was afraid, but {he} went to {name2} and told the truth.",
    ),
    "forgives": (
        '"Thank you for telling me," said {name2}. "We can mend it together."',
        '{name2} was sad for a moment and then smiled. "It is only a {thing}," said {name2}.',
    ),
    "bakes": (
        "{name} wanted to make {food} for {name2}, the {kind2}.",
        "It was the birthday of {name2}, the {kind2}, and {name} wanted to make {food}.",
    ),
    "shares": (
        "{He} went to the {place2} and brought milk and eggs.",
        'When the {food} came out of the oven, all the animals came. "May we have some?" they asked.',
        "{name} gave some to everyone, and there was enough for all.",
    ),
    "afraid": (
        "But {name} was afraid of the dark.",
        "But {name} was afraid of the water.",
        "But {name} was afraid to go into the {place2} alone.",
    ),
    "brave": (
        '"I will go with you," said {name2}. "Hold my hand."',
        "They went slowly, step by step, and nothing bad happened.",
        '"You see?" said {name2}. "You are very brave."',
    ),
}

# The parts of each kind of story.
PLOTS = (
    "open likes day lost sad meets asks search finds glad end",
    "open likes lost sad meets asks finds glad end",
    "open day stuck begs helps saved glad end",
    "open likes day stuck begs helps saved end",
    "open alone meets hello play end",
    "open alone day meets hello play glad end",
    "open day storm shelter warm end",
    "open likes storm shelter warm glad end",
    "open seed wait grows proud end",
    "open likes seed wait grows end",
    "open broke sad truth forgives glad end",
    "open likes bakes shares glad end",
    "open likes afraid meets asks brave glad end",
)


def draw_words(draw: random.Random, kind: str | None = None) -> dict[str, str]:
    """The words of a story about an animal of this kind; None: about any animal or child."""
    is_animal = kind is not None or draw.random() < 0.5
    kind = kind or draw.choice(KINDS)
    is_girl = draw.random() < 0.5
    place, place2 = draw.sample(PLACES, 2)
    name, name2, name3 = draw.sample(PETS, 3)
    kind2, kind3 = draw.sample([each for each in KINDS if each != kind], 2)
    if not is_animal:
        name = draw.choice(GIRLS if is_girl else BOYS)
    who = kind if is_animal else "girl" if is_girl else "boy"
    trait, trait2 = draw.sample(TRAITS, 2)
    return {
        "name": name,
        "name2": name2,
        "who": who,
        "name3": name3,
        "kind2": kind2,
        "kind3": kind3,
        "place": place,
        "place2": place2,
        "thing": draw.choice(THINGS),
        "food": draw.choice(FOODS),
        "color": draw.choice(COLORS),
        "weather": draw.choice(WEATHER),
        "trait": trait,
        "trait2": trait2,
        "he": "she" if is_girl else "he",
        "He": "She" if is_girl else "He",
        "him": "her" if is_girl else "him",
    }


def tell(draw: random.Random, words: Mapping[str, str]) -> str:
    """A story of about 500 characters, in one paragraph."""
    lines = (draw.choice(RULES[rule]) for rule in draw.choice(PLOTS).split())
    return with_articles(" ".join(lines).format_map(words))


def with_articles(text: str) -> str:
    """The text with "an" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def story(number: int) -> str:
    """Story `number`."""
    draw = random.Random(number)
    return tell(draw, draw_words(draw))


# ---- Small talk ---------------------------------------------------------------------------------

# Question and answers of turns that fit at any time of a conversation.
HELLO = ("Hello!", "Hi!", "Hello", "hi", "Good morning!", "Hey there!", "Hi, how are you?")
GREET = (
    "Hello! How are you today?",
    "Hi! It is nice to meet you. What would you like to talk about?",
    "Hello! I am glad that you are here.",
)
TALK: tuple[tuple[Sequence[str], Sequence[str]], ...] = (
    (
        ("How are you?", "How are you today?", "how are you doing?"),
        ("I am fine, thank you. And you?", "I am very well today. How are you?"),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Are you a person?"),
        (
            "I am a very small language model. I like stories.",
            "I am a small computer program that learned to talk from stories.",
        ),
    ),
    (
        ("What can you do?", "Can you help me?", "What do you know?"),
        (
            "I can tell you a story, talk a little, and add small numbers like 3+4.",
            "I know some stories, and I can add small numbers. Ask me for a story!",
        ),
    ),
    (
        ("I am fine.", "I am fine, thanks.", "I am happy today.", "I had a good day."),
        ("I am glad to hear that.", "That is good! What did you do today?"),
    ),
    (
        ("I am sad.", "I am sad today.", "I had a bad day.", "I am tired."),
        (
            "I am sorry to hear that. Would you like to hear a story?",
            "Oh, I am sorry. I hope that tomorrow will be better.",
        ),
    ),
    (
        ("Thank you!", "Thanks!", "That was a nice story.", "I liked that story.", "Thank you."),
        ("You are welcome!", "I am glad that you liked it.", "You are welcome. Come back soon!"),
    ),
    (
        ("Goodbye!", "Bye!", "Good night!", "See you tomorrow."),
        ("Goodbye! It was nice to talk to you.", "Bye! See you soon.", "Good night, sleep well!"),
    ),
    (
        ("What is your favorite color?", "Which color do you like?"),
        ("I like {color} best. And you?", "My favorite color is {color}."),
    ),
    (
        ("I like {color}.", "My favorite color is {color}."),
        ("{Color} is a beautiful color.", "I like {color} too!"),
    ),
    (
        ("Do you like {kind}s?", "What do you think about {kind}s?"),
        ("Yes, I like {kind}s very much. I know a story about a {kind}.", "I love {kind}s!"),
    ),
    (
        ("I have a {kind}.", "My {kind} is named {pet}.", "I saw a {kind} today."),
        ("A {kind}! How nice. What does it like to eat?", "I would like to meet your {kind}."),
    ),
    (
        ("What do you like to eat?", "What is your favorite food?"),
        ("I cannot eat, but in my stories everybody likes {food}.", "I like stories about {food}."),
    ),
    (
        ("My name is {person}.", "I am {person}.", "my name is {person}"),
        ("Hello, {person}! It is nice to meet you.", "That is a nice name, {person}."),
    ),
    (
        ("Where do you live?", "Where are you?"),
        ("I live in a computer, but my stories are about a {place}.", "I live in your computer."),
    ),
)
ASK = (
    "Tell me a story about a {kind}.",
    "Can you tell me a story about a {kind}?",
    "Please tell me a story about a {kind}.",
    "I want to hear a story about a {kind}.",
    "tell me a story about a {kind}",
    "Do you know a story about a {kind}?",
)
ASK_ANY = (
    "Tell me a story.",
    "Can you tell me a story?",
    "Please tell me a story.",
    "Another story!",
)


def conversation(number: int) -> Messages:
    """Conversation `number`: up to five turns of small talk and stories."""
    draw = random.Random(f"conversation {number}")
    turns = []
    if draw.random() < 0.5:
        turns.append((draw.choice(HELLO), draw.choice(GREET)))
    for _ in range(draw.randint(1, 4)):
        turns.append(_story_turn(draw) if draw.random() < 0.3 else _talk_turn(draw))
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]


def _talk_turn(draw: random.Random) -> tuple[str, str]:
    questions, answers = draw.choice(TALK)
    color = draw.choice(COLORS)
    words = {
        "color": color,
        "Color": color.capitalize(),
        "kind": draw.choice([kind for kind in KINDS if kind not in ("mouse", "fox")]),
        "pet": draw.choice(PETS),
        "food": draw.choice(FOODS),
        "person": draw.choice(GIRLS + BOYS),
        "place": draw.choice(PLACES),
    }
    question, answer = (draw.choice(each).format_map(words) for each in (questions, answers))
    return with_articles(question), with_articles(answer)


def _story_turn(draw: random.Random) -> tuple[str, str]:
    if draw.random() < 0.2:
        return draw.choice(ASK_ANY), tell(draw, draw_words(draw))
    kind = draw.choice(KINDS)
    question = draw.choice(ASK).format(kind=kind)
    return with_articles(question), tell(draw, draw_words(draw, kind))
