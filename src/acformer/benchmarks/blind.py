"""What one would score without looking: the answers that are right most often.

Learnt from the questions about all other images, since a benchmark has no training questions: the most frequent right
answer to the same question, or, where no other image is asked it, to any.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from acformer.benchmarks.answers import Question


def blind_texts(questions: Sequence[Question]) -> list[str]:
    """An answer to each question; every question has right answers."""
    truths = [max(question.answers, key=question.answers.count) for question in questions]
    asked: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        asked[question.text].append(place)
    frequent = {
        text: Counter(truths[place] for place in places).most_common()
        for text, places in asked.items()
        if len(places) > 1
    }
    to_same: Counter[tuple[str, ...]] = Counter(
        (one.text, one.group, truth) for one, truth in zip(questions, truths, strict=True)
    )
    to_any: Counter[tuple[str, ...]] = Counter((one.group, truth) for one, truth in zip(questions, truths, strict=True))
    of_all = Counter(truths).most_common()
    return [
        _best(frequent.get(one.text, ()), to_same, one.text, one.group) or _best(of_all, to_any, one.group)
        for one in questions
    ]


def _best(ordered: Sequence[tuple[str, int]], own: Counter[tuple[str, ...]], *key: str) -> str:
    """Of answers, the most frequent first, the one with the highest count but for `own[*key, answer]`; "" of none."""
    best, most = "", 0
    for answer, count in ordered:
        if count <= most:
            break
        if (left := count - own[*key, answer]) > most:
            best, most = answer, left
    return best
