"""What one visitor has open, and every step that a visitor can take. Steps give a new `Visit`; none changes one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from acformer.errors import UsageError
from acformer.images import ImageSource, load_image
from acformer.lab.demo.look import Eye, Look
from acformer.lab.demo.pins import Pins, steer
from acformer.lab.demo.respondent import Answer, Respondent
from acformer.viz.find import anchors_by_head

MAX_QUESTION = 500  # characters
MAX_ROUNDS = 50  # of answers that are kept


@dataclass(frozen=True, eq=False)
class Visit:
    """looks: the picture as each model sees it, the first one's is drawn. rounds: answers, one a model; newest last."""

    looks: tuple[Look, ...]
    pins: Pins = field(default_factory=Pins)
    question: str = ""
    rounds: tuple[tuple[Answer, ...], ...] = ()

    @property
    def look(self) -> Look:
        """The one that is drawn."""
        return self.looks[0]

    def anchors(self, num_anchors: int) -> tuple[tuple[int, ...], ...]:
        """Head by head, with the pins obeyed."""
        scores = steer(self.look.features, self.pins).cls_attention
        assert scores is not None  # `Eye` refuses encoders without
        return anchors_by_head(scores[0].cpu(), min(num_anchors, self.look.num_patches))

    def changed_from(self, place: int) -> Answer | None:
        """What the model in that place answered to the same question of the same picture before, if it was else."""
        asked = [answers[place] for answers in self.rounds if answers[place].question == self.question]
        return asked[-2] if len(asked) > 1 and asked[-2].text != asked[-1].text else None


class Guide:
    """Takes visitors through the steps: with one model or several to compare, or with an encoder alone."""

    def __init__(self, respondents: Sequence[Respondent] = (), eye: Eye | None = None):
        self.respondents = tuple(respondents)
        self.eyes = tuple(respondent.eye for respondent in respondents) or ((eye,) if eye else ())
        if not self.eyes:
            raise UsageError("the page needs a model or an encoder")

    def open(self, source: ImageSource) -> Visit:
        """A new picture: pins and answers of the old one are gone. `ImageError`: it cannot be read."""
        picture = load_image(source)
        return Visit(tuple(eye(picture) for eye in self.eyes))

    def ask(self, visit: Visit, question: str, num_tokens: int) -> Visit:
        """One answer a model more. `UsageError`: no question, one too long, a budget that a connector cannot give."""
        if len(question) > MAX_QUESTION:
            raise UsageError(f"the question has {len(question)} characters: make it {MAX_QUESTION} at most")
        seen = zip(self.respondents, visit.looks, strict=True)
        answers = tuple(
            respondent.answer(look, question, num_tokens, self._pins(visit, look)) for respondent, look in seen
        )
        return replace(visit, question=question, rounds=(*visit.rounds, answers)[-MAX_ROUNDS:])

    def toggle(self, visit: Visit, patch: int, num_tokens: int) -> Visit:
        """A patch pinned, removed or freed; the question, if there is one, asked again."""
        return self.pin(visit, visit.pins.toggled(patch), num_tokens)

    def pin(self, visit: Visit, pins: Pins, num_tokens: int) -> Visit:
        """Other pins, and the question asked again."""
        steer(visit.look.features, pins)  # a patch outside the picture is told before anything changes
        pinned = replace(visit, pins=pins)
        return self.ask(pinned, visit.question, num_tokens) if visit.question else pinned

    @staticmethod
    def _pins(visit: Visit, look: Look) -> Pins:
        """Pins mean patches of the picture that is drawn; a model with other patches has none."""
        return visit.pins if look.features.grid == visit.look.features.grid else Pins()
