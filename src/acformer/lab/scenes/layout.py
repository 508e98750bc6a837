"""What is where in a scene: a pure function of (difficulty, split, number).

Random numbers come from `random.Random` seeded with text, whose sequence Python promises to keep.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from random import Random

from acformer.lab.scenes.difficulty import VERSION, Difficulty, Noun, lookalikes

SIDE = 336  # pixels; 24 x 24 patches of 14
SIZES = ("small", "medium", "large")
MAX_OVERLAP = 0.04  # of the smaller of two things
TRIES = 60


@dataclass(frozen=True)
class Thing:
    """An object or a word and its square or rectangle: centre and extent in pixels."""

    text: str
    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        """Of its rectangle, in square pixels."""
        return self.width * self.height

    def shared(self, other: "Thing") -> float:
        """The area that lies in both rectangles."""
        across = min(self.x + self.width / 2, other.x + other.width / 2) - max(
            self.x - self.width / 2, other.x - other.width / 2
        )
        down = min(self.y + self.height / 2, other.y + other.height / 2) - max(
            self.y - self.height / 2, other.y - other.height / 2
        )
        return across * down if across > 0 and down > 0 else 0.0

    def overlaps(self, other: "Thing") -> bool:
        """Whether the two share more than `MAX_OVERLAP` of the smaller one."""
        return self.shared(other) > MAX_OVERLAP * min(self.area, other.area)


@dataclass(frozen=True)
class Scene:
    """objects and words with their places, in reading order; `key` seeds the background and the fonts."""

    key: str
    difficulty: Difficulty
    objects: tuple[Thing, ...]
    words: tuple[Thing, ...]

    @property
    def names(self) -> list[str]:
        """The nouns that are there, each once, in reading order."""
        return list(dict.fromkeys(thing.text for thing in self.objects))

    def clear_names(self) -> list[str]:
        """Those of `names` that no other thing in the scene can be taken for."""
        return [name for name in self.names if not lookalikes()[name] & set(self.names)]

    def single(self) -> list[Thing]:
        """The objects whose noun is there once, with no lookalike, so that one can speak of "the" one."""
        all_names, clear = [thing.text for thing in self.objects], self.clear_names()
        return [thing for thing in self.objects if all_names.count(thing.text) == 1 and thing.text in clear]


def make_scene(difficulty: Difficulty, split: str, number: int) -> Scene:
    """Scene `number` of a split; splits differ in their seeds, `novel` also in which nouns may stand together."""
    key = f"openmoji-scenes {VERSION}/{difficulty.name}/{split}/{number}"
    random = Random(key)
    nouns = _nouns(difficulty, split == "novel", random)
    things: list[Thing] = []
    for noun in nouns:
        low, high = difficulty.sizes
        size = math.exp(random.uniform(math.log(low), math.log(high)))
        _place(things, noun, size, size, random, difficulty.hidden)
    objects = tuple(sorted(things, key=reading_order))
    for _ in range(random.randint(*difficulty.printed)):
        word = str(random.randint(0, 999)) if random.random() < 0.1 else random.choice(difficulty.words)
        height = random.uniform(*difficulty.word_sizes)
        if word not in [thing.text for thing in things]:
            _place(things, word, height * 0.62 * len(word), height, random)
    words = tuple(sorted(things[len(objects) :], key=reading_order))
    return Scene(key, difficulty, objects, words)


def reading_order(thing: Thing) -> tuple[bool, float]:
    """Upper half before lower half, in each from left to right."""
    return thing.y > SIDE / 2, thing.x


def size_name(thing: Thing, difficulty: Difficulty) -> str:
    """small, medium or large: thirds of the difficulty's sizes on a logarithmic scale."""
    low, high = difficulty.sizes
    return SIZES[min(int(size_share(thing, difficulty) * 3), 2)] if low < high else SIZES[1]


def size_share(thing: Thing, difficulty: Difficulty) -> float:
    """0 for the difficulty's smallest size, 1 for its largest, on a logarithmic scale."""
    low, high = difficulty.sizes
    return math.log(thing.height / low) / math.log(high / low)


def place_name(thing: Thing) -> str:
    """top left, top right, bottom left or bottom right."""
    return f"{'top' if thing.y <= SIDE / 2 else 'bottom'} {'left' if thing.x <= SIDE / 2 else 'right'}"


@cache
def held_out(first: str, second: str) -> bool:
    """Whether two nouns stand together in `novel` only: one pair in ten, by the hash of their names."""
    pair = "+".join(sorted((first, second)))
    return hashlib.sha256(pair.encode()).digest()[0] < 26


@cache
def popularity(difficulty: Difficulty) -> dict[str, float]:
    """How often a noun is drawn, relative to the others: falls with its rank in its theme, as in real data."""
    ranks: dict[str, int] = {}
    weights = {}
    for noun in difficulty.nouns:
        rank = ranks[noun.theme] = ranks.get(noun.theme, -1) + 1
        weights[noun.name] = 1 / (rank + 6)
    return weights


def _nouns(difficulty: Difficulty, novel: bool, random: Random) -> list[str]:
    """Six in ten of the scene's theme, the others from anywhere; some noun may be there several times.

    The last place of a `novel` scene of one noun goes to another noun, so that each shows a held-out pair.
    """
    weights = popularity(difficulty)
    count = random.randint(*difficulty.objects)
    theme = random.choice([*dict.fromkeys(noun.theme for noun in difficulty.nouns)])
    chosen: list[str] = []
    while len(chosen) < count:
        needs_pair = novel and len(set(chosen)) == 1 and len(chosen) == count - 1
        if chosen and random.random() < 0.2 and not needs_pair:
            chosen.append(chosen[-1])
            continue
        at_home = random.random() < 0.6
        pool = [noun for noun in difficulty.nouns if _fits(noun, theme if at_home else None, chosen, novel)]
        pool = pool or [noun for noun in difficulty.nouns if _fits(noun, None, chosen, novel)]
        if pool:
            chosen += random.choices([n.name for n in pool], [weights[n.name] for n in pool])
        else:
            chosen.clear()  # nothing may stand beside these: start again
    return chosen


def _fits(noun: Noun, theme: str | None, chosen: list[str], novel: bool) -> bool:
    """Of the theme, new, and in a pair with the others that the split may show (`novel`: the first pair must be)."""
    if noun.name in chosen or (theme is not None and noun.theme != theme):
        return False
    pairs = [held_out(noun.name, other) for other in set(chosen)]
    return not any(pairs) if not novel else len(set(chosen)) != 1 or pairs[0]


def _place(things: list[Thing], text: str, width: float, height: float, random: Random, hidden: float = 0.0) -> None:
    """Add it where it is whole and (almost) free, or hides as little as it may; in a full scene it is left out."""
    if width > SIDE - 4:
        return
    for _ in range(TRIES):
        x = random.uniform(width / 2 + 2, SIDE - width / 2 - 2)
        y = random.uniform(height / 2 + 2, SIDE - height / 2 - 2)
        new = Thing(text, x, y, width, height)
        if _can_be_seen([*things, new], hidden) if hidden else not any(new.overlaps(thing) for thing in things):
            things.append(new)
            return


def _can_be_seen(things: list[Thing], hidden: float) -> bool:
    """Whether of each no more than that share lies in others' rectangles, all together: whichever is drawn on top."""
    return all(
        sum(thing.shared(other) for other in things if other is not thing) <= hidden * thing.area for thing in things
    )
