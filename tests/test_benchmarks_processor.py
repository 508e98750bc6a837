"""The answer processor of the VQA challenges: probes worked out by the official rules, and what must never change."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acformer.benchmarks.vqa_processor import (
    ARTICLES,
    CONTRACTIONS,
    DIGITS,
    PUNCTUATION,
    evalai,
    official_answer,
    punctuation,
    vqa_score,
)

SIGNS = "".join(PUNCTUATION) + ":'&%$#*~^|."
TEXTS = st.lists(
    st.sampled_from(
        [*SIGNS, " ", "\n", "\t", "dont", "a", "The", "ten", "none", "1", "1,000", "x", "men's", "É", "y'allll"]
    )
).map("".join)


@pytest.mark.parametrize(
    ("text", "processed"),
    [
        ("A&W", "a&w"),
        ("a.m.", "am"),
        ("100%", "100%"),
        ("10:30", "10:30"),
        ("U.S.", "us"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("it's", "it 's"),
        ("Men's", "men 's"),
        ("www.example.com", "wwwexamplecom"),
        ("hello,world", "helloworld"),
        ("black & white", "black & white"),
        ("$5.00", "$5.00"),
        ("#1", "#1"),
        ("1,000", "1000"),
        ("3.", "3"),
        ("x-ray", "x ray"),
        ("x -ray", "x ray"),
        ("None of the two", "0 of 2"),
        ("the", ""),
        ("left\nright", "left right"),
        ("." * 40 + "x", "." * 8 + "x"),
    ],
)
def test_probes(text, processed):
    assert evalai(text) == processed


def test_vqas_own_evaluation_does_not_tokenise():
    assert official_answer("men's") == "men's"
    assert official_answer("hello,world") == "hello world"
    assert official_answer("Is it?") == "is it"
    assert punctuation("1,,2") == "1  2"
    assert evalai("1,,2") == "12"


@given(TEXTS)
def test_what_must_never_change(text):
    """No capital, sign, article, number word, spare space or bare contraction is left; kept signs and digits stay."""
    for process in (evalai, official_answer):
        found = process(text)
        words = found.split(" ") if found else []
        assert found == found.lower()
        assert all(words)
        assert not {*found} & {*PUNCTUATION}
        assert not {*words} & (ARTICLES | DIGITS.keys())
        assert all(CONTRACTIONS.get(word, word) == word or word not in text.lower().split() for word in words)
        before, after = Counter(text), Counter(found)
        assert all(before[sign] == after[sign] for sign in ":&%$#*~^|")
        assert after["'"] >= before["'"]
        assert re.sub(r"\D", "", text) in re.sub(r"\D", "", found) or "ten" in text.lower() or "none" in text.lower()
        assert process(text.upper()) == process(text.lower())


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=12), st.randoms())
def test_the_score_is_of_agreement(answer, people, chance):
    score = vqa_score(answer, people)
    assert 0 <= score <= 1
    shuffled = chance.sample(people, len(people))
    assert vqa_score(answer, shuffled) == score
    by_definition = [
        min(1.0, sum(one == answer for one in people[:i] + people[i + 1 :]) / 3) for i in range(len(people))
    ]
    assert score == pytest.approx(sum(by_definition) / len(people))


def test_nobody_agrees_with_nobody():
    assert vqa_score("x", []) == 0.0
