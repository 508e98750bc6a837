"""How hard the scenes are: three difficulties of one description, and the vocabulary that they are drawn from."""

from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files

from acformer.errors import unknown_name

VERSION = 1  # of all scenes; whatever changes an image or a question changes it too
SPLITS = ("train", "validation", "test", "novel")


@dataclass(frozen=True)
class Noun:
    """A thing to draw: its OpenMoji character, the theme that it is often seen with, how one speaks of it.

    form: "" a cat, an owl; "~" bread, never "a bread"; "+" scissors, which "are".
    """

    name: str
    char: str
    theme: str
    form: str = ""

    @property
    def phrase(self) -> str:
        """`a cat`, `an owl`, `bread`, `scissors`."""
        article = "an" if self.name[0] in "aeiou" and not self.name.startswith("uni") else "a"
        return self.name if self.form else f"{article} {self.name}"

    @property
    def verb(self) -> str:
        """`is` or `are`."""
        return "are" if self.form == "+" else "is"


@dataclass(frozen=True)
class Difficulty:
    """nouns: so many of each theme. objects, sizes (px), word_sizes (px): ranges. scenes: per split.

    hidden: share of an object's square that others may cover, all together; 0: objects stand apart.
    busy: the ground is a photograph or a texture, hardly lightened, never plain.
    """

    name: str
    nouns_per_theme: int
    num_words: int
    objects: tuple[int, int]
    sizes: tuple[int, int]
    word_sizes: tuple[int, int]
    printed: tuple[int, int]
    scenes: tuple[int, int, int, int]
    hidden: float = 0.0
    busy: bool = False

    @cached_property
    def nouns(self) -> tuple[Noun, ...]:
        """The vocabulary, theme by theme, in each the most frequent first."""
        return tuple(noun for theme in vocabulary().values() for noun in theme[: self.nouns_per_theme])

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words that may be printed; numbers come besides."""
        return word_list()[: self.num_words]

    def num_scenes(self, split: str) -> int:
        """How many scenes a split has; `UsageError` for an unknown one."""
        if split not in SPLITS:
            raise unknown_name(f"split of {self.name}", split, SPLITS)
        return self.scenes[SPLITS.index(split)]


DIFFICULTIES = {
    each.name: each
    for each in (
        Difficulty(
            "openmoji-scenes",
            nouns_per_theme=99,
            num_words=1000,
            objects=(2, 8),
            sizes=(24, 110),
            word_sizes=(14, 40),
            printed=(0, 2),
            scenes=(40_000, 500, 1_000, 500),
        ),
        Difficulty(
            "openmoji-scenes-small",
            nouns_per_theme=3,
            num_words=16,
            objects=(2, 4),
            sizes=(56, 110),
            word_sizes=(40, 56),
            printed=(0, 1),
            scenes=(8_000, 250, 500, 250),
        ),
        Difficulty(
            "openmoji-scenes-hard",
            nouns_per_theme=10,
            num_words=32,
            objects=(3, 9),
            sizes=(36, 110),
            word_sizes=(36, 52),
            printed=(0, 2),
            scenes=(16_000, 250, 500, 250),
            hidden=0.35,
            busy=True,
        ),
    )
}


@cache
def vocabulary() -> dict[str, tuple[Noun, ...]]:
    """The nouns by theme, as `vocabulary.txt` lists them: character, name and form (see `Noun`)."""
    themes = {}
    for line in _text("vocabulary.txt").splitlines():
        theme, _, listed = line.partition(": ")
        pairs = [entry.split(" ") for entry in listed.split(", ")]
        themes[theme] = tuple(Noun(n.rstrip("~+"), char, theme, n[len(n.rstrip("~+")) :]) for char, n in pairs)
    return themes


@cache
def nouns_by_name() -> dict[str, Noun]:
    """The whole vocabulary; a name is there once."""
    return {noun.name: noun for theme in vocabulary().values() for noun in theme}


@cache
def lookalikes() -> dict[str, frozenset[str]]:
    """What a person may take for what (a poodle is a dog), both ways, from `lookalikes.txt`.

    They may stand together in a scene, but no question's answer hangs on telling them apart.
    """
    found: dict[str, set[str]] = {name: set() for name in nouns_by_name()}
    for line in _text("lookalikes.txt").splitlines():
        head, _, others = line.partition(": ")
        for other in others.split():
            found[head].add(other)
            found[other].add(head)
    return {name: frozenset(others) for name, others in found.items()}


@cache
def word_list() -> tuple[str, ...]:
    """1,000 common English words of three to eight letters, none of them a noun of the vocabulary."""
    return tuple(_text("words.txt").split())


def _text(name: str) -> str:
    return (files("acformer.lab.scenes") / name).read_text(encoding="utf-8")
