"""The names that Hugging Face users expect; importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from acformer.hf.configuration_acformer import AcFormerConfig
from acformer.hf.modeling_acformer import AcFormerForConditionalGeneration, AcFormerModel
from acformer.hf.processing_acformer import AcFormerProcessor

AutoConfig.register("acformer", AcFormerConfig, exist_ok=True)
AutoModel.register(AcFormerConfig, AcFormerModel, exist_ok=True)
AutoModelForImageTextToText.register(AcFormerConfig, AcFormerForConditionalGeneration, exist_ok=True)
AutoProcessor.register(AcFormerConfig, AcFormerProcessor, exist_ok=True)

__all__ = ["AcFormerConfig", "AcFormerForConditionalGeneration", "AcFormerModel", "AcFormerProcessor"]
