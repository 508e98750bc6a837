"""Scores as pure functions of answers, and how sure one can be of them."""

import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


def normalise(answer: str) -> str:
    """Lower case, no punctuation around it, single spaces: what exact match compares."""
    return " ".join(answer.lower().split()).strip(string.punctuation + " ")


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the two are the same answer once normalised (GQA's measure, Table 7)."""
    return normalise(prediction) == normalise(answer)


def accuracy_by_kind(correct: Sequence[bool], kinds: Sequence[str | None]) -> dict[str, float]:
    """Accuracy of each kind of question, sorted by name; questions without a kind are left out."""
    groups: dict[str, list[bool]] = {}
    for right, kind in zip(correct, kinds, strict=True):
        if kind is not None:
            groups.setdefault(kind, []).append(right)
    return {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}


def blind_answers(questions: Sequence[str], answers: Sequence[str]) -> dict[str, str]:
    """The most frequent answer to each question; under the key "" the most frequent of all."""
    table: dict[str, Counter[str]] = {"": Counter(answers)}
    for question, answer in zip(questions, answers, strict=True):
        table.setdefault(question, Counter())[answer] += 1
    return {question: counts.most_common(1)[0][0] for question, counts in table.items()}


def blind_accuracy(table: Mapping[str, str], questions: Sequence[str], answers: Sequence[str]) -> float:
    """What a `blind_answers` table scores that never looks at a picture: the floor of every data set."""
    right = [exact_match(table.get(q, table[""]), a) for q, a in zip(questions, answers, strict=True)]
    return sum(right) / len(right)


def interval(
    correct: Sequence[bool], groups: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of the accuracy, drawing whole groups (pictures) with replacement.

    Questions about one picture stand or fall together, so drawing single questions would look too sure.
    """
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    member = np.array([index[name] for name in groups])
    rights = np.bincount(member, weights=np.array(correct, dtype=float))
    sizes = np.bincount(member)
    picks = np.random.default_rng(seed).integers(0, len(sizes), size=(draws, len(sizes)))
    scores = rights[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)
