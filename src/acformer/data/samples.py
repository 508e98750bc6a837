"""One record of a data set, whatever it came from."""

from dataclasses import dataclass
from pathlib import Path

from acformer.data.conversation import Message
from acformer.images.stored import StoredImage

ImageReference = Path | StoredImage | bytes
"""An image that is opened later: a file, a member of an archive, or the bytes of a file."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its images (in the order of the image parts) and where it came from.

    `answer` is the record's own `answer`, else the text of the last turn of the assistant; `kind` a label to
    group scores by; `file` and `record` (from 1; in JSON lines the line) name it in error messages.
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageReference, ...] = ()
    answer: str | None = None
    kind: str | None = None
    file: str = ""
    record: int = 0

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last turn of the assistant: what to ask when `answer` is wanted."""
        spoken = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return self.messages[: spoken[-1]] if spoken else self.messages
