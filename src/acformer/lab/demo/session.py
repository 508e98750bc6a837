"""What one visitor has open, and every step that a visitor can take. A step returns a new `Session`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from acformer.errors import UsageError
from acformer.images import ImageSource, load_image
from acformer.lab.demo.demo_model import Answer, DemoModel
from acformer.lab.demo.encoded_image import EncodedImage, ImageEncoder
from acformer.lab.demo.pins import Pins, apply_pins
from acformer.viz.find import anchors_by_head

MAX_QUESTION = 500  # characters
MAX_ROUNDS = 50  # of answers that are kept


@dataclass(frozen=True, eq=False)
class Session:
    """images: the image as each model encoded it; the first is drawn. rounds: answers, one a model; newest last."""

    images: tuple[EncodedImage, ...]
    pins: Pins = field(default_factory=Pins)
    question: str = ""
    rounds: tuple[tuple[Answer, ...], ...] = ()

    @property
    def image(self) -> EncodedImage:
        """The one that is drawn."""
        return self.images[0]

    def anchors(self, num_anchors: int) -> tuple[tuple[int, ...], ...]:
        """Head by head, with the pins obeyed."""
        scores = apply_pins(self.image.features, self.pins).cls_attention
        assert scores is not None  # `ImageEncoder` refuses encoders without
        return anchors_by_head(scores[0].cpu(), min(num_anchors, self.image.num_patches))

    def changed_from(self, place: int) -> Answer | None:
        """What the model in that place answered to this question of this image before, if it was another answer."""
        asked = [answers[place] for answers in self.rounds if answers[place].question == self.question]
        return asked[-2] if len(asked) > 1 and asked[-2].text != asked[-1].text else None


class Controller:
    """Carries out the steps: with one model or several to compare, or with an encoder alone."""

    def __init__(self, models: Sequence[DemoModel] = (), image_encoder: ImageEncoder | None = None):
        self.models = tuple(models)
        self.encoders = tuple(model.image_encoder for model in models) or ((image_encoder,) if image_encoder else ())
        if not self.encoders:
            raise UsageError("the page needs a model or an encoder")

    def open(self, source: ImageSource) -> Session:
        """A new image: pins and answers of the old one are gone. `ImageError`: it cannot be read."""
        image = load_image(source)
        return Session(tuple(encode(image) for encode in self.encoders))

    def ask(self, session: Session, question: str, num_tokens: int) -> Session:
        """One answer a model more. `UsageError`: no question, one too long, a budget that a connector cannot give."""
        if len(question) > MAX_QUESTION:
            raise UsageError(f"the question has {len(question)} characters: make it {MAX_QUESTION} at most")
        answers = tuple(
            model.answer(image, question, num_tokens, self._pins(session, image))
            for model, image in zip(self.models, session.images, strict=True)
        )
        return replace(session, question=question, rounds=(*session.rounds, answers)[-MAX_ROUNDS:])

    def toggle(self, session: Session, patch: int, num_tokens: int) -> Session:
        """A patch pinned, removed or freed; the question, if there is one, asked again."""
        return self.pin(session, session.pins.toggled(patch), num_tokens)

    def pin(self, session: Session, pins: Pins, num_tokens: int) -> Session:
        """Other pins, and the question asked again."""
        apply_pins(session.image.features, pins)  # refuses a patch outside the image before anything changes
        pinned = replace(session, pins=pins)
        return self.ask(pinned, session.question, num_tokens) if session.question else pinned

    @staticmethod
    def _pins(session: Session, image: EncodedImage) -> Pins:
        """Pins mean patches of the image that is drawn; a model with other patches has none."""
        return session.pins if image.features.grid == session.image.features.grid else Pins()
