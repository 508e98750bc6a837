"""Modules that a quantisation leaves out, by the names that users give: `connector` is `model.connector`.

transformers compares names from the start of the whole model's, and ignores in silence what begins otherwise.
"""

import copy
from typing import Any

LISTS = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Where quantisation configs keep them: bitsandbytes; torchao, quanto and others."""
PARTS = ("vision_tower", "connector", "fusion", "language_model")


def with_full_names(config: Any) -> Any:
    """A quantisation config, or its dict, in which parts of the model are named in full, too; the given one stays."""
    if config is None:
        return None
    config = copy.copy(config)
    for name in LISTS:
        given = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if not given:
            continue
        full = [f"model.{one}" for one in given if one.partition(".")[0] in PARTS]
        names = list(dict.fromkeys([*given, *full]))
        if isinstance(config, dict):
            config[name] = names
        else:
            setattr(config, name, names)
    return config
