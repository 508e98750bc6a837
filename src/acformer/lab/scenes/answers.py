"""Answers to a scene's questions from what `SceneProbe` predicts: rules, the same for every connector."""

from torch import Tensor

from acformer.lab.scenes.difficulty import Difficulty
from acformer.lab.scenes.layout import SIDE, SIZES, Thing, place_name
from acformer.lab.scenes.questions import ANSWERS, LETTERS, SIDES, Question, offset
from acformer.lab.scenes.targets import NUMBER, class_names


class ProbeAnswers:
    """Answers questions about one image; `predictions`: of `SceneProbe`, without the batch dimension."""

    def __init__(self, difficulty: Difficulty, predictions: dict[str, Tensor]):
        self.difficulty, self.predictions = difficulty, predictions
        names = class_names(difficulty)
        self.index = {name: number for number, name in enumerate(names)}
        self.nouns, self.words = names[: len(difficulty.nouns)], names[len(difficulty.nouns) :]

    def answer(self, question: Question) -> str:
        """The text of the answer; questions name nouns of the difficulty."""
        family, _, variant = question.kind.partition("-")
        match family, variant:
            case "exist", _:
                return "yes" if self._present(question.about[0]) > 0 else "no"
            case "relate", "object":
                return self._neighbour(question.about[0], question.side)
            case "relate", _:
                return self._seen_from(*question.about)
            case "count", "all":
                return str(self.difficulty.objects[0] + int(self.predictions["total"].argmax()))
            case "count", _:
                return str(1 + int(self.predictions["count"][self.index[question.about[0]]].argmax()))
            case "attribute", "size":
                share = float(self.predictions["size"][self.index[question.about[0]]])
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
        return float(self.predictions["present"][self.index[name]])

    def _thing(self, name: str) -> Thing:
        x, y = self.predictions["place"][self.index[name]].tolist()
        return Thing(name, x * SIDE, y * SIDE, 0, 0)

    def _neighbour(self, name: str, side: str) -> str:
        """Of the other nouns that are present (at least the likeliest one), the furthest on that side."""
        others = sorted((noun for noun in self.nouns if noun != name), key=self._present, reverse=True)
        present = [noun for noun in others if self._present(noun) > 0] or others[:1]
        origin = self._thing(name)
        return max(present, key=lambda noun: offset(self._thing(noun), origin, side)[0])

    def _seen_from(self, name: str, origin: str) -> str:
        thing, seer = self._thing(name), self._thing(origin)
        return ANSWERS[max(SIDES, key=lambda side: offset(thing, seer, side)[0])]

    def _word(self, side: str) -> str:
        """The likeliest word; where two are asked about, the upper or lower of the likeliest two."""
        likely = sorted(self.words, key=self._present, reverse=True)
        if side:
            likely[:2] = sorted(likely[:2], key=lambda word: self._thing(word).y, reverse=side == "below")
        return "a number" if likely[0] == NUMBER else likely[0]


def split(predictions: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """One dict an image, on the CPU."""
    moved = {name: value.detach().float().cpu() for name, value in predictions.items()}
    return [{name: value[row] for name, value in moved.items()} for row in range(len(moved["present"]))]
