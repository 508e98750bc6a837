"""The name of the keys and values that a language model keeps: `past_key_values`, from transformers 5.24 on `cache`."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

OLD, NEW = "past_key_values", "cache"
CACHE = NEW if NEW in {field.name for field in fields(BaseModelOutputWithPast)} else OLD
"""As the installed transformers calls it, in arguments and in outputs."""


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, under either name; None where there is none."""
    found = arguments.get(NEW)
    return arguments.get(OLD) if found is None else found
