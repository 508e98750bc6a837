"""Answers to a scene's questions from what `SceneReader` says is there: rules, the same for every connector."""

from torch import Tensor

from acformer.lab.scenes.facts import NUMBER, entries
from acformer.lab.scenes.layout import SIDE, SIZES, Thing, place_name
from acformer.lab.scenes.levels import Level
from acformer.lab.scenes.questions import ANSWERS, LETTERS, SIDES, Question, offset


class SceneAnswers:
    """Answers questions about one picture; `said`: what the reader says of it, without the batch dimension."""

    def __init__(self, level: Level, said: dict[str, Tensor]):
        self.level, self.said = level, said
        names = entries(level)
        self.index = {name: number for number, name in enumerate(names)}
        self.nouns, self.words = names[: len(level.nouns)], names[len(level.nouns) :]

    def answer(self, question: Question) -> str:
        """The text of the answer; questions name nouns of the level."""
        family, _, variant = question.kind.partition("-")
        match family, variant:
            case "exist", _:
                return "yes" if self._present(question.about[0]) > 0 else "no"
            case "relate", "object":
                return self._neighbour(question.about[0], question.side)
            case "relate", _:
                return self._seen_from(*question.about)
            case "count", "all":
                return str(self.level.objects[0] + int(self.said["total"].argmax()))
            case "count", _:
                return str(1 + int(self.said["count"][self.index[question.about[0]]].argmax()))
            case "attribute", "size":
                share = float(self.said["size"][self.index[question.about[0]]])
                return SIZES[min(max(int(share * 3), 0), 2)]
            case "attribute", _:
                return place_name(self._thing(question.about[0]))
            case "read", _:
                return self._word(question.side)
            case "choose", _:
                logits = [self._present(noun) for noun in question.about]
                return LETTERS[logits.index(max(logits))]
        raise ValueError(f"no rule for questions of kind {question.kind!r}")

    def _present(self, name: str) -> float:
        return float(self.said["present"][self.index[name]])

    def _thing(self, name: str) -> Thing:
        x, y = self.said["place"][self.index[name]].tolist()
        return Thing(name, x * SIDE, y * SIDE, 0, 0)

    def _neighbour(self, name: str, side: str) -> str:
        """Of the other nouns that are there (at least the likeliest one), the furthest on that side."""
        others = sorted((noun for noun in self.nouns if noun != name), key=self._present, reverse=True)
        there = [noun for noun in others if self._present(noun) > 0] or others[:1]
        origin = self._thing(name)
        return max(there, key=lambda noun: offset(self._thing(noun), origin, side)[0])

    def _seen_from(self, name: str, origin: str) -> str:
        thing, seer = self._thing(name), self._thing(origin)
        return ANSWERS[max(SIDES, key=lambda side: offset(thing, seer, side)[0])]

    def _word(self, side: str) -> str:
        """The likeliest word; where two are asked about, the upper or lower of the likeliest two."""
        likely = sorted(self.words, key=self._present, reverse=True)
        if side:
            likely[:2] = sorted(likely[:2], key=lambda word: self._thing(word).y, reverse=side == "below")
        return "a number" if likely[0] == NUMBER else likely[0]


def split(said: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One dict a picture, on the CPU."""
    moved = {name: value.detach().float().cpu() for name, value in said.items()}
    return [{name: value[row] for name, value in moved.items()} for row in range(len(moved["present"]))]
