"""What is talked about: questions and the one right answer to each, some thousands by a small grammar.

Sums and differences to twenty, what comes after a day, a month, a letter or a number, opposites, colours, spelling,
simple facts, repeating, greetings, and what nobody here knows. A tenth is held out of training, by what is asked and
not by how it is asked: the sums, the words and the phrasings that are held out never occur in training at all.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()
MONTHS = "january february march april may june july august september october november december".split()
LETTERS = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split()
OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("long", "short"),
    ("fast", "slow"),
    ("old", "young"),
    ("dark", "light"),
    ("good", "bad"),
    ("happy", "sad"),
    ("left", "right"),
    ("up", "down"),
    ("open", "closed"),
    ("full", "empty"),
    ("rich", "poor"),
    ("wet", "dry"),
)
COLOURS = (
    ("the sky", "blue"),
    ("the grass", "green"),
    ("the snow", "white"),
    ("the sun", "yellow"),
    ("the night", "black"),
    ("a lemon", "yellow"),
    ("a tomato", "red"),
    ("an orange", "orange"),
    ("a plum", "purple"),
    ("milk", "white"),
    ("coal", "black"),
    ("a frog", "green"),
    ("a mouse", "grey"),
    ("chocolate", "brown"),
)
WORDS = (
    "cat dog sun moon fish bird tree house book ship milk bread salt rain snow door hand foot star ring lamp desk "
    "boat frog duck nest leaf rock sand gold king road bell cake drum farm goat hill kite lion mask pond rose soap"
).split()
WRAPPED = ("moshi {}", "{} moshi", "please {}", "{} please")
"""How other questions are asked once more: what is asked must be told from how."""

ASKED = ("{}", "moshi {}", "{} moshi", "tell me {}", "please tell me {}", "moshi tell me {}")
"""How what is asked of facts may be wrapped."""

FACTS = (
    (("who are you", "what is your name", "what are you called"), "my name is moshi"),
    (("how old are you", "what is your age"), "i am very young"),
    (("where do you live", "where are you"), "i live in this computer"),
    (("what can you do", "how can you help me"), "i can count and spell and talk"),
    (("are you a person", "are you human"), "no i am a small program"),
    (("do you sleep", "do you ever rest"), "no i am always awake"),
    (("what do you like", "what do you enjoy"), "i like to talk with you"),
    (("how many days are in a week", "how long is a week"), "a week has seven days"),
    (("how many months are in a year", "how long is a year"), "a year has twelve months"),
    (("how many legs has a dog", "how many legs does a dog have"), "a dog has four legs"),
    (("how many legs has a bird", "how many legs does a bird have"), "a bird has two legs"),
    (("how many legs has a spider", "how many legs does a spider have"), "a spider has eight legs"),
)
GREETED = ("{}", "moshi {}", "{} moshi")

GREETINGS = (
    (("hello", "hi there"), "hello how can i help you"),
    (("good morning",), "good morning to you"),
    (("good evening",), "good evening to you"),
    (("how are you", "how are you today"), "i am fine thank you"),
    (("thank you", "thanks a lot"), "you are welcome"),
    (("goodbye", "see you later"), "goodbye for now"),
)
UNKNOWN = (
    ("what is the {} like", "weather|sea|hotel"),
    ("what time is {}", "it|the train|the game"),
    ("what did i {}", "read|like|enjoy"),
    ("what should i {}", "read|like|enjoy"),
    ("where is {}", "the hotel|the station|the shop|my key|my book|my dog"),
    ("when is {}", "my birthday|the game|the train"),
    ("when does the {} open", "shop|hotel|station"),
    ("who {}", "won the game|wrote this song|wrote this book|called me|is the president"),
    ("why is the {} late", "train|president|ship"),
    ("how much does {} cost", "it|the book|the hotel|the train|the ship"),
    ("how far is the {}", "station|hotel|shop|sea|moon"),
    ("how deep is the {}", "sea|pond|snow"),
)
I_DO_NOT_KNOW = "i don't know that"
AGAIN = ("say that again", "again please", "what did you say")
STOP = ("stop", "stop please", "be quiet")
SHARES = {
    "sum": 0.24,
    "echo": 0.24,
    "after": 0.13,
    "fact": 0.10,
    "spelling": 0.09,
    "opposite": 0.07,
    "colour": 0.05,
    "greeting": 0.05,
    "unknown": 0.03,
}
"""How often each topic is drawn: more often where there is more to learn."""


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, lower-case words; capitals are letters that are named.

    Attributes:
        topic: such as ``sum``.
        held_out: whether it is kept from training.
    """

    question: str
    answer: str
    topic: str
    held_out: bool


def is_held_out(what: str, share: int = 10) -> bool:
    """Whether something is one of the tenth (or another part) that is held out; the same everywhere and always."""
    return _number_of(what) % share == 0


def _number_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def exchanges() -> list[Exchange]:
    """Everything that can be asked."""
    found = []
    for topic, make in TOPICS.items():
        for question, answer, what in make():
            found.append(Exchange(question, answer, topic, is_held_out(f"{topic} {what}")))
    return found


def all_words() -> list[str]:
    """All words of questions and answers, sorted."""
    texts = [text for each in exchanges() for text in (each.question, each.answer)]
    return sorted({word for text in (*texts, *AGAIN, *STOP) for word in text.split()})


Made = Iterator[tuple[str, str, str]]


def _sums() -> Made:
    for a, b in itertools.product(range(21), repeat=2):
        for sign, result in (("plus", a + b), ("minus", a - b)):
            if 0 <= result <= 20:
                asked = f"{NUMBERS[a]} {sign} {NUMBERS[b]}"
                for phrase in ("what is {}", "how much is {}", "tell me {}"):
                    yield phrase.format(asked), f"{asked} is {NUMBERS[result]}", asked


def _after() -> Made:
    lists = (("day", DAYS, True), ("month", MONTHS, True), ("letter", LETTERS, False), ("number", NUMBERS, False))
    phrases = (
        "what comes after {name}",
        "which {kind} comes after {name}",
        "which {kind} follows {name}",
        "what is after {name}",
        "what follows {name}",
        "tell me what comes after {name}",
        "which {kind} is after {name}",
        "tell me the {kind} after {name}",
        "what is the {kind} after {name}",
    )
    for kind, names, again in lists:
        for place, name in enumerate(names if again else names[:-1]):
            following = names[(place + 1) % len(names)]
            for phrase in phrases:
                question = phrase.format(kind=kind, name=name)
                yield question, f"after {name} comes {following}", question


def _opposites() -> Made:
    phrases = (
        "what is the opposite of {}",
        "tell me the opposite of {}",
        "what is not {}",
        "say the opposite of {}",
        "which word is the opposite of {}",
        "tell me what is not {}",
    )
    for pair in OPPOSITES:
        for word, other in (pair, pair[::-1]):
            for phrase in phrases:
                yield phrase.format(word), f"the opposite of {word} is {other}", phrase.format(word)


def _colours() -> Made:
    phrases = (
        "what colour is {}",
        "which colour has {}",
        "tell me the colour of {}",
        "what is the colour of {}",
        "say which colour {} has",
        "tell me what colour {} is",
    )
    for thing, colour in COLOURS:
        for phrase in phrases:
            yield phrase.format(thing), f"{thing} is {colour}", phrase.format(thing)


def _spelling() -> Made:
    phrases = (
        "spell {}",
        "how do you spell {}",
        "can you spell {}",
        "spell the word {}",
        "tell me how you spell {}",
    )
    for word in WORDS:
        for phrase in phrases:
            yield phrase.format(word), " ".join(word.upper()), phrase.format(word)


def _echo() -> Made:
    for first, second in itertools.permutations(WORDS, 2):
        for phrase in ("say {} {}", "repeat {} {}"):
            yield phrase.format(first, second), f"{first} {second}", f"{first} {second}"


def _answers(table: Iterable[tuple[tuple[str, ...], str]], wrappings: Iterable[str]) -> Made:
    for questions, answer in table:
        for question, wrapping in itertools.product(questions, wrappings):
            wrapped = wrapping.format(question)
            # nobody could know what the words mean that are never heard: what is held out is how they are wrapped
            yield wrapped, answer, "always" if wrapped == question else wrapped


def _unknown() -> Made:
    for phrase, names in UNKNOWN:
        for name in names.split("|"):
            question = phrase.format(name)
            yield question, I_DO_NOT_KNOW, question


def _also_wrapped(make: Callable[[], Made]) -> Callable[[], Made]:
    """Every question as it is, and in one of the wrappings; held out are both or none."""

    def made() -> Made:
        for question, answer, what in make():
            yield question, answer, what
            yield WRAPPED[_number_of(question) % len(WRAPPED)].format(question), answer, what

    return made


TOPICS = {
    "sum": _also_wrapped(_sums),
    "after": _also_wrapped(_after),
    "opposite": _also_wrapped(_opposites),
    "colour": _also_wrapped(_colours),
    "spelling": _also_wrapped(_spelling),
    "echo": _also_wrapped(_echo),
    "fact": lambda: _answers(FACTS, ASKED),
    "greeting": lambda: _answers(GREETINGS, GREETED),
    "unknown": _also_wrapped(_unknown),
}
