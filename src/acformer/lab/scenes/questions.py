"""Questions about a scene, in the families of the paper's benchmarks.

    exist      is there a cat?                        yes / no              POPE: random, popular, adversarial
    relate     what object is left of the cat?        the only one there    GQA
               where is the cat seen from the dog?    left, right, above, below
    count      how many times do you see a cat?       1 to 8
    attribute  how large is the cat? where is it?     small, ...; top left, ...
    read       what is written?                       the word              TextVQA
    choose     which of these is there? A cat B ...   a letter              MMBench (circular)

Asked only where the answer is beyond doubt: sizes near a border between two names, things near a middle line, pairs
near a diagonal and nouns that look like another one of the scene are left out. Answers are drawn first and then
something that has this answer, so that guessing the more frequent answer helps little; `evaluate` tells what guessing
still gets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from acformer.lab.scenes.difficulty import Difficulty, lookalikes, nouns_by_name
from acformer.lab.scenes.layout import SIDE, SIZES, Scene, Thing, place_name, popularity, size_name, size_share

LETTERS = "ABCD"
SIDES = ("left of", "right of", "above", "below")
ANSWERS = dict(zip(SIDES, ("left", "right", "above", "below"), strict=True))


@dataclass(frozen=True)
class Question:
    """`kind`: family, or family-variant. `variant`: tells the askings of one circular question apart.

    about: the nouns that the text names, in its order; `side` of `SIDES` where it names one.
    """

    kind: str
    text: str
    answer: str
    variant: int = 0
    about: tuple[str, ...] = ()
    side: str = ""


def ask(scene: Scene, *, thorough: bool) -> list[Question]:
    """The scene's questions, always the same.

    `thorough`: for evaluation: all three samplings of `exist` and all four orders of `choose`; else one of them.
    """
    random = Random(f"{scene.key}/questions")
    return [question for family in FAMILIES.values() for question in family(scene, random, thorough)]


def _exist(scene: Scene, random: Random, thorough: bool) -> list[Question]:
    """One noun that is there and one that is not, for each sampling of the absent one."""
    samplings = ("random", "popular", "adversarial")
    questions = []
    for sampling in samplings if thorough else random.choices(samplings, k=1):
        there = scene.names
        if sampling == "popular":
            there = [name for name in there if name in popular_names(scene.difficulty)]
        if there:
            for noun, answer in ((random.choice(there), "yes"), (_absent(scene, sampling, random), "no")):
                text = f"{nouns_by_name()[noun].verb} there {nouns_by_name()[noun].phrase}?"
                questions.append(Question(f"exist-{sampling}", text, answer, about=(noun,)))
    return questions


def _absent(scene: Scene, sampling: str, random: Random) -> str:
    """random: any; popular: of the tenth that scenes show most often; adversarial: of a theme that is there.

    Never one that something in the scene can be taken for.
    """
    weights = popularity(scene.difficulty)
    themes = {noun.name: noun.theme for noun in scene.difficulty.nouns}
    taken = {alike for name in scene.names for alike in (name, *lookalikes()[name])}
    absent = [name for name in weights if name not in taken]
    if sampling == "popular":
        absent = [name for name in absent if name in popular_names(scene.difficulty)]
    if sampling == "adversarial":
        near = {themes[name] for name in scene.names}
        absent = [name for name in absent if themes[name] in near] or absent
    return random.choices(absent, [weights[name] for name in absent])[0]


@cache
def popular_names(difficulty: Difficulty) -> frozenset[str]:
    """The most frequent noun of each theme, or the tenth that scenes show most often if that is more."""
    weights = popularity(difficulty)
    themes = len({noun.theme for noun in difficulty.nouns})
    return frozenset(sorted(weights, key=lambda name: -weights[name])[: max(themes, len(weights) // 10)])


def _relate(scene: Scene, random: Random, thorough: bool) -> list[Question]:
    """The one object on a side of another; and from which side one object is seen by another."""
    single = scene.single()
    found = [(side, a, b) for side in SIDES for a in single if (b := _only(scene, a, side)) is not None]
    questions = []
    if found:
        side, anchor, other = random.choice(found)
        questions.append(
            Question("relate-object", f"what object is {side} the {anchor.text}?", other.text, 0, (anchor.text,), side)
        )
    pairs = {side: [(a, b) for a in single for b in single if a is not b and _on_side(b, a, side)] for side in SIDES}
    if sides := [side for side in SIDES if pairs[side]]:
        side = random.choice(sides)
        anchor, other = random.choice(pairs[side])
        text = f"where {_verb(other)} the {other.text} seen from the {anchor.text}?"
        questions.append(Question("relate-side", text, ANSWERS[side], 0, (other.text, anchor.text)))
    return questions


def offset(thing: Thing, origin: Thing, side: str) -> tuple[float, float]:
    """How far `thing` lies in the direction of `side` from `origin`, and how far across, in pixels."""
    along, across = thing.x - origin.x, thing.y - origin.y
    if side in ("above", "below"):
        along, across = across, along
    return (-along if side in ("left of", "above") else along), abs(across)


def _on_side(thing: Thing, origin: Thing, side: str) -> bool:
    """Clearly on that side: 24 px away, and at most half as far across."""
    along, across = offset(thing, origin, side)
    return along > 24 and across < along / 2


def _only(scene: Scene, origin: Thing, side: str) -> Thing | None:
    """The only object on that side of another, all the others being clearly on the opposite one."""
    beyond = [thing for thing in scene.objects if thing is not origin and offset(thing, origin, side)[0] > -12]
    return beyond[0] if len(beyond) == 1 and offset(beyond[0], origin, side)[0] > 24 else None


def _count(scene: Scene, random: Random, thorough: bool) -> list[Question]:
    """All objects, and those of one noun; nouns that are there several times are asked about first."""
    names, clear = [thing.text for thing in scene.objects], scene.clear_names()
    questions = [Question("count-all", "how many objects are there?", str(len(names)))]
    if clear:
        several = [name for name in clear if names.count(name) > 1]
        noun = random.choice(several if several and random.random() < 0.7 else clear)
        text = f"how many times do you see {nouns_by_name()[noun].phrase}?"
        questions.append(Question("count-noun", text, str(names.count(noun)), about=(noun,)))
    return questions


def _attribute(scene: Scene, random: Random, thorough: bool) -> list[Question]:
    """Size and place of an object that is there once."""
    questions = []
    sized = [thing for thing in scene.single() if abs(size_share(thing, scene.difficulty) * 3 % 1 - 0.5) < 0.3]
    by_size = [[thing for thing in sized if size_name(thing, scene.difficulty) == size] for size in SIZES]
    if groups := [group for group in by_size if group]:
        thing = random.choice(random.choice(groups))
        text = f"how large {_verb(thing)} the {thing.text}?"
        questions.append(Question("attribute-size", text, size_name(thing, scene.difficulty), about=(thing.text,)))
    if placed := [t for t in scene.single() if min(abs(t.x - SIDE / 2), abs(t.y - SIDE / 2)) > 30]:
        thing = random.choice(placed)
        questions.append(
            Question(
                "attribute-place", f"where {_verb(thing)} the {thing.text}?", place_name(thing), about=(thing.text,)
            )
        )
    return questions


def _verb(thing: Thing) -> str:
    return nouns_by_name()[thing.text].verb


def _read(scene: Scene, random: Random, thorough: bool) -> list[Question]:
    """The printed word; of two, the upper or the lower one."""
    if len(scene.words) == 1:
        return [Question("read", "what is written?", scene.words[0].text)]
    if len(scene.words) == 2:
        upper, lower = sorted(scene.words, key=lambda word: word.y)
        if lower.y - upper.y > 24:
            which, word = random.choice((("at the top", upper), ("at the bottom", lower)))
            return [
                Question("read", f"what is written {which}?", word.text, side="above" if word is upper else "below")
            ]
    return []


def _choose(scene: Scene, random: Random, thorough: bool) -> list[Question]:
    """One noun that is there among three that are not; in evaluation in all four orders."""
    options = [random.choice(scene.names)]
    while len(options) < 4:
        absent = _absent(scene, random.choice(("random", "adversarial")), random)
        options += [absent] if absent not in options else []
    right = options[0]
    random.shuffle(options)
    questions = []
    for turn in range(4) if thorough else [random.randrange(4)]:
        turned = options[turn:] + options[:turn]
        listed = " ".join(f"{letter} {noun}" for letter, noun in zip(LETTERS, turned, strict=True))
        answer = LETTERS[turned.index(right)]
        questions.append(Question("choose", f"which is there? {listed}", answer, turn, tuple(turned)))
    return questions


FAMILIES: dict[str, Callable[[Scene, Random, bool], list[Question]]] = {
    "exist": _exist,
    "relate": _relate,
    "count": _count,
    "attribute": _attribute,
    "read": _read,
    "choose": _choose,
}
