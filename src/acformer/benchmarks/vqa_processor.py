"""The answer processor of the VQA challenges, and the VQA score, as the official code has them.

Two uses of one set of rules: EvalAI's processor (`evalai`), which LLaVA runs over its answers before it uploads them,
and VQA's own evaluation (`official_answer`, `punctuation`), which does not tokenise first. Both keep the official
code's slips, since published numbers were made with them: a full stop after a digit goes unless a digit follows, and
of more than 32 full stops only the first 32 go.

What differs between benchmarks and protocols is which of these runs over the answer and which over the people's.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
"""Signs that go; `: ' & % $ # * ~ ^ |` stay."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = frozenset(("a", "an", "the"))
_PAIRS = """
'ow'sat='ow's'at 'ows'at='ow's'at I'dve=I'd've Id've=I'd've Im=I'm Ive=I've aint=ain't arent=aren't cant=can't
couldn'tve=couldn't've couldnt=couldn't couldnt've=couldn't've couldve=could've didnt=didn't doesnt=doesn't dont=don't
hadn'tve=hadn't've hadnt=hadn't hadnt've=hadn't've hasnt=hasn't havent=haven't he'dve=he'd've hed=he'd hed've=he'd've
hes=he's howd=how'd howll=how'll hows=how's isnt=isn't it'dve=it'd've itd=it'd itd've=it'd've itll=it'll let's=let's
maam=ma'am mightn'tve=mightn't've mightnt=mightn't mightnt've=mightn't've mightve=might've mustnt=mustn't
mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at shant=shan't
she'dve=she'd've she's=she's shed've=she'd've shouldn'tve=shouldn't've shouldnt=shouldn't shouldnt've=shouldn't've
shouldve=should've somebody'd=somebodyd somebody'dve=somebody'd've somebodyd've=somebody'd've somebodyll=somebody'll
somebodys=somebody's someone'dve=someone'd've someoned=someone'd someoned've=someone'd've someonell=someone'll
someones=someone's something'dve=something'd've somethingd=something'd somethingd've=something'd've
somethingll=something'll thats=that's there'dve=there'd've thered=there'd thered've=there'd've therere=there're
theres=there's they'dve=they'd've theyd=they'd theyd've=they'd've theyll=they'll theyre=they're theyve=they've
twas='twas wasnt=wasn't we'dve=we'd've wed've=we'd've werent=weren't weve=we've whatll=what'll whatre=what're
whats=what's whatve=what've whens=when's whered=where'd wheres=where's whereve=where've who'dve=who'd've whod=who'd
whod've=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
wouldn'tve=wouldn't've wouldnt=wouldn't wouldnt've=wouldn't've wouldve=would've y'all'dve=y'all'd've
y'alld've=y'all'd've y'allll=y'all'll yall=y'all yall'd've=y'all'd've yall'll=y'all'll you'dve=you'd've youd=you'd
youd've=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = dict(pair.split("=") for pair in _PAIRS.split())
"""A word with an apostrophe missing -> the word. Those with a capital are never met: all is lower case by then."""

EVALAI_COMMA = re.compile(r"\d,+\d")
OFFICIAL_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_NUM_FULL_STOPS = 32
"""re.UNICODE, which the official code passes to `sub` where the number of replacements stands."""


@lru_cache(maxsize=2**18)
def evalai(text: str) -> str:
    """EvalAI's processor: what LLaVA uploads, and both sides of TextVQA's score."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return digits_and_articles(punctuation(one_line(words.strip()), EVALAI_COMMA))


@lru_cache(maxsize=2**18)
def official_answer(text: str) -> str:
    """What VQA's evaluation makes of a model's answer."""
    return digits_and_articles(punctuation(one_line(text)))


@lru_cache(maxsize=2**18)
def punctuation(text: str, number_with_comma: re.Pattern[str] = OFFICIAL_COMMA) -> str:
    """Without punctuation: each sign becomes a space, or nothing where it stands beside a space in `text`.

    A number with a comma in it (`1,000`) makes all signs of the text vanish without a space. And full stops go, but for
    those before a digit.
    """
    vanish = number_with_comma.search(text) is not None
    out = text
    for sign in PUNCTUATION:
        if sign in text:
            beside_space = f"{sign} " in text or f" {sign}" in text
            out = out.replace(sign, "" if vanish or beside_space else " ")
    return _FULL_STOP.sub("", out, count=_NUM_FULL_STOPS)


def digits_and_articles(text: str) -> str:
    """Lower case, number words up to ten as digits, no articles, apostrophes of contractions, single spaces."""
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    """Newlines and tabs as spaces, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_score(answer: str, people: Sequence[str]) -> float:
    """VQA's accuracy: min(1, matches among the others / 3), averaged over leaving out one person each.

    Both sides as they are to be compared. 0 where nobody answered.
    """
    matches, count = Counter(people)[answer], len(people)
    if not matches:
        return 0.0
    one_left_out = matches * min(1.0, (matches - 1) / 3)
    return (one_left_out + (count - matches) * min(1.0, matches / 3)) / count
