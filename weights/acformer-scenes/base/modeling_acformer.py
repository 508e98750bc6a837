"""For `trust_remote_code=True`: the classes of the package acformer, which must be installed."""

try:
    from acformer.hf import AcFormerForConditionalGeneration, AcFormerModel  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "acformer":
        raise
    raise ImportError("this model needs the package acformer: pip install acformer") from None
