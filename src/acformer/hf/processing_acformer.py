"""`AcFormerProcessor`: pictures and text in, model inputs out; one `<image>` becomes T image tokens."""

import copy
from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData

from acformer.fusion import fusion_class

IMAGE_TOKEN = "<image>"


class AcFormerProcessor(ProcessorMixin):
    """An image processor, a tokenizer that knows `<image>`, a chat template, and T.

    `num_image_tokens` comes from `AcFormerConfig.num_image_tokens` (the connector; 1 where `fusion` is not `concat`)
    and is saved with the processor, so that a server can size its prompts without the model.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 145,
        image_token: str = IMAGE_TOKEN,
        fusion: str = "concat",
        **kwargs: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.fusion = fusion
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {image_token!r} token; add it as a special token first")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, *, num_image_tokens: int | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Model inputs for prompts in which every image is one `<image>`.

        `num_image_tokens` asks for another T in this call and is passed on to the model with the inputs.
        """
        own = self.num_image_tokens if self.fusion == "concat" else None
        if num_image_tokens is None or num_image_tokens == own:
            return super().__call__(images=images, text=text, **kwargs)
        other = copy.copy(self)
        other.num_image_tokens = self.num_placeholders(num_image_tokens)
        inputs = other(images, text, **kwargs)
        inputs["num_image_tokens"] = num_image_tokens
        return inputs

    def num_placeholders(self, num_image_tokens: int | None = None) -> int:
        """Image tokens that a prompt holds for an image of T visual tokens (by default the model's own T)."""
        if num_image_tokens is None:
            return self.num_image_tokens
        return fusion_class(self.fusion).num_placeholders(num_image_tokens)

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """`ValueError` unless the prompts hold one `<image>` for every image; transformers <= 5.19 does not look."""
        super().validate_inputs(images=images, text=text, **kwargs)
        tags = sum(prompt.count(self.image_token) for prompt in text or [])
        count = 0 if images is None else len(make_flat_list_of_images(images))
        if text is not None and tags != count:
            raise ValueError(f"the prompts hold {tags} {self.image_token} tags, but there are {count} images")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """The text that stands for one image: T image tokens, whatever its size."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        """For vLLM: tokens per image of the given (height, width)s."""
        count = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)
