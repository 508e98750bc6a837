"""Which option an answer means: MMBench's rules, and lmms-eval's search for the likeliest letter where they end."""

from collections.abc import Callable, Mapping, Sequence

from acformer.benchmarks.benchmark import OPTION_LETTER, Benchmark

LETTERS = "ABCDE"
WRAPPINGS = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)
"""What may stand around a letter, in the order in which it is looked for."""
PHRASES = (
    *(f"{start}answer is" for start in ("the ", "", "the correct ", "correct ", "the best ", "best ", "my ")),
    *(f"{start}option is" for start in ("the correct ", "correct ", "the best ", "best ")),
    *(f"{start}choice is" for start in ("the ", "", "the correct ", "correct ", "my ")),
    *("i choose", "i select", "i pick", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


class OptionLetter(Benchmark):
    """One of the options by its letter; models that explain themselves first are given room for it, as LLaVA does."""

    suffix = OPTION_LETTER
    max_new_tokens = 1024


def no_letter(found: Sequence[str | None]) -> list[int]:
    """The places of answers in which no letter was found."""
    return [place for place, letter in enumerate(found) if letter is None]


def letter_by_rules(answer: str, options: Mapping[str, str]) -> str | None:
    """The one letter that is a word of the answer, else the one option whose text is in it, else None.

    An `A` in an answer of more than three words may be an article, and is no letter.
    """
    words = answer.split()
    for before, after in (("", ""), *WRAPPINGS):
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        may_be_article = not before + after and "A" in words and len(words) > 3
        if len(found) == 1 and not may_be_article:
            return found[0]
    named = [letter for letter, text in options.items() if text.lower() in answer.lower()]
    return named[0] if len(named) == 1 else None


def likely_letter(answer: str, letters: Sequence[str]) -> str | None:
    """The last letter in the most telling place that has one, by lmms-eval's order of places; None if there is none.

    The first place with a letter decides: the start of the answer, its end, after a phrase such as "the answer is", in
    brackets, before a full stop, a colon, a bracket, a space, anywhere.
    """
    text = answer.strip()
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    padded, core = f" {text} ", text.strip()
    places = (
        lambda letter: 0 if core.startswith(letter) and not core[1:2].isalpha() else -1,
        lambda letter: 0 if core.endswith(letter) and not core[-2:-1].isalpha() else -1,
        lambda letter: _after_phrase(padded, letter),
        *(_last(padded, form) for form in ("({})", "{}.", "{}:", "{})", "{} ", "{}")),
    )
    for place in places:
        last, found = max(((place(letter), letter) for letter in letters), key=lambda pair: pair[0], default=(-1, ""))
        if last >= 0:
            return found
    return None


def _after_phrase(text: str, letter: str) -> int:
    """Where the letter first stands after a phrase; of several phrases, the last such place."""
    lower = text.lower()
    ends = (lower.find(phrase) + len(phrase) for phrase in PHRASES if phrase in lower)
    return max((text.find(letter, end) for end in ends), default=-1)


def _last(text: str, form: str) -> Callable[[str], int]:
    return lambda letter: text.rfind(form.format(letter))
