"""What vLLM calls when it starts (entry point `vllm.general_plugins`); from then on `vllm serve FOLDER` works.

There is no modelling code for vLLM: its Transformers backend runs `AcFormerForConditionalGeneration` as it is.
"""

MODEL = "acformer.serving.vllm_model:AcFormerForConditionalGeneration"


def register() -> None:
    """Our Auto classes with transformers, our architecture with vLLM; may be called more than once."""
    from vllm import ModelRegistry

    import acformer.hf  # noqa: F401 (registers the Auto classes)

    ModelRegistry.register_model("AcFormerForConditionalGeneration", MODEL)
