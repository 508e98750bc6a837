"""vLLM's class of our models: its Transformers backend, and a budget that is checked before anything is computed.

Imported by vLLM alone. Differs from `TransformersMultiModalForCausalLM` in nothing that computes: a number of visual
tokens that the connector cannot give is refused as a bad request, where the backend would wrap the processor's sentence
into the whole input's contents.
"""

from typing import Any

from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from acformer.errors import UsageError
from acformer.hf.budgets import NAMES


class BudgetProcessor(MultiModalProcessor):
    """As the Transformers backend's, of requests whose budget the connector can give."""

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The prompt with its image tokens; `UsageError` (a bad request) for a budget that there is not."""
        options = self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs)
        asked = {**options, **options.get("images_kwargs", {})}
        if name := next((name for name in NAMES if isinstance(asked.get(name), list | tuple)), None):
            # Images are kept one by one, for whatever prompt they come in: a list would not fit those that are new.
            raise UsageError(f"{name}: vLLM takes one budget for all images of a request, not a list")
        self.info.get_hf_processor()._get_num_multimodal_tokens([(1, 1)], **options)
        return super().apply(inputs, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    BudgetProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class AcFormerForConditionalGeneration(MultiModalMixin, CausalMixin):
    """Vision encoder, connector and language model, which vLLM gives its own attention and cache."""
