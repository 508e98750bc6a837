"""Scores as pure functions of answers, and how sure one can be of them."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {"a": "", "an": "", "the": "", "none": "0"} | {word: str(n) for n, word in enumerate(_NUMBERS)}

PUNCTUATION = "".join(sorted(set(string.punctuation) - set("+-#%$&@=^/\\|<>~"))) + " "
"""What may stand around an answer without being part of it."""
MAX_PICKS = 2**22
"""Of a bootstrap, held at once: VQAv2 has 2,000 draws of 75,000 images."""

Sums = Float[np.ndarray, "*draws counts"]


def normalise(answer: str) -> str:
    """Lower case, no punctuation around it, single spaces: what exact match compares.

    Signs belong to an answer: "-5" is not "5", nor "C++" "C"; a dash and a space before it are a list's.
    """
    words = " ".join(answer.lower().split())
    return re.sub(r"^[-*+] ", "", words).strip(PUNCTUATION)


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the two are the same answer once normalised (GQA's measure, Table 7)."""
    return normalise(prediction) == normalise(answer)


def normalise_words(answer: str) -> str:
    """Lower case, no articles, numbers as digits, no punctuation but the point of a decimal: ours, for our own data.

    Not the answer processor of the VQA challenges, which is `acformer.benchmarks.vqa_processor`: this one drops all
    apostrophes and most signs, so that "dont" and "don't" are equal without a list, and "A&W" and "a w" too.
    """
    text = re.sub(r"['’]|(?<=\d),(?=\d)", "", answer.lower())
    text = re.sub(r"\.(?!\d)|[^\w\s.]|_", " ", text)
    return " ".join(word for word in (_WORDS.get(word, word) for word in text.split()) if word)


def same_words(prediction: str, answer: str) -> bool:
    """Whether the two are the same answer once `normalise_words` has run over both."""
    return normalise_words(prediction) == normalise_words(answer)


def accuracy_by_kind(correct: Sequence[bool], kinds: Sequence[str | None]) -> dict[str, float]:
    """Accuracy of each kind of question, sorted by name; questions without a kind are left out."""
    groups: dict[str, list[bool]] = {}
    for right, kind in zip(correct, kinds, strict=True):
        if kind is not None:
            groups.setdefault(kind, []).append(right)
    return {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}


def most_frequent(keys: Sequence[str], answers: Sequence[str]) -> dict[str, str]:
    """The most frequent answer to each key (a question, a family); of equally frequent ones the first seen."""
    table: dict[str, Counter[str]] = {}
    for key, answer in zip(keys, answers, strict=True):
        table.setdefault(key, Counter())[answer] += 1
    return {key: counts.most_common(1)[0][0] for key, counts in table.items()}


def first_known(tables: Sequence[Mapping[str, str]], keys: Sequence[str]) -> str:
    """The answer of the first table that knows its key (tables and keys side by side); "" of none."""
    return next((table[key] for table, key in zip(tables, keys, strict=True) if key in table), "")


def interval(
    points: Sequence[float], groups: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of points (right or wrong), drawing whole groups (images)."""
    counts = np.stack([np.asarray(points, dtype=float), np.ones(len(points))], axis=1)  # (answers, 2)
    by_group = sum_by_group(counts, groups, list(dict.fromkeys(groups)))
    return bootstrap(by_group, lambda sums: sums[..., 0] / sums[..., 1], seed=seed, draws=draws)


def sum_by_group(
    counts: Float[np.ndarray, "answers counts"], groups: Sequence[str], names: Sequence[str]
) -> Float[np.ndarray, "groups counts"]:
    """Rows of the same group added up, one row for each of `names`; a group without answers has zeros."""
    index = {name: i for i, name in enumerate(names)}
    sums = np.zeros((len(index), counts.shape[1]))
    np.add.at(sums, [index[name] for name in groups], counts)
    return sums


def bootstrap(
    by_group: Float[np.ndarray, "groups counts"],
    score: Callable[[Sums], np.ndarray],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> tuple[float, float]:
    """95 % interval of a score of summed counts, drawing whole groups (images) with replacement.

    Questions about one image stand or fall together, so drawing single questions would look too sure.
    """
    random, groups = np.random.default_rng(seed), len(by_group)
    at_once = max(1, MAX_PICKS // groups)
    sums = []
    for start in range(0, draws, at_once):
        picks = random.integers(0, groups, size=(min(at_once, draws - start), groups))
        # How often each group was drawn, (draws, groups), times its counts: (draws, counts).
        sums.append(np.stack([np.bincount(pick, minlength=groups) for pick in picks]) @ by_group)
    low, high = np.quantile(score(np.concatenate(sums)), [0.025, 0.975])
    return float(low), float(high)
