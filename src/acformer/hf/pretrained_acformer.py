"""What transformers needs to know about our modules; loading that refuses weights which do not fit.

transformers itself warns of them, and goes on with random ones.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from acformer.connectors import Connector, build_connector
from acformer.errors import CheckpointError
from acformer.fusion import GatedBlock
from acformer.hf.configuration_acformer import AcFormerConfig


class AcFormerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about our modules: what they support, how they are initialised."""

    config: AcFormerConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    keys_left_out: ClassVar[set[str]] = set()
    """Weights of a whole model's checkpoint that this class has no use for."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: of custom code, transformers would leave every module uninitialised that has no weights of its own."""
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | None, *args: Any, strict: bool = True, **kwargs: Any
    ) -> Any:
        """As transformers', but a missing, unexpected or wrong-shaped weight is a `CheckpointError`.

        Safetensors alone are read unless `use_safetensors=False` says otherwise: a pickle may be anything.
        `strict=False` restores transformers' behaviour: a report is printed and a model is returned.
        """
        name, want_report = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        shapes_may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs.setdefault("use_safetensors", True)
        kwargs |= {"ignore_mismatched_sizes": shapes_may_differ or strict, "output_loading_info": True}
        model, report = super().from_pretrained(name, *args, **kwargs)
        if strict:
            _refuse_wrong_keys(cls, name, report, shapes_may_differ)
        return (model, report) if want_report else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Connector):
            self._start_as_built(module)
        elif isinstance(module, GatedBlock):
            module.close()

    def _start_as_built(self, connector: Connector) -> None:
        """What was not loaded starts with the value that the connector's constructor gives it.

        transformers builds models without memory and would know only some kinds of weights; a connector may hold any.
        """
        waiting = {name: value for name, value in _tensors(connector).items() if not _is_loaded(value)}
        if not waiting:
            return
        with torch.device("cpu"):
            built = _tensors(build_connector(self.config.connector, connector.geometry, **self.config.connector_kwargs))
        for name, value in waiting.items():
            init.copy_(value, built[name])


def _tensors(connector: Connector) -> dict[str, Tensor]:
    """Weights and buffers, those among them that no checkpoint holds."""
    return {**dict(connector.named_parameters()), **dict(connector.named_buffers())}


def _is_loaded(value: Tensor) -> bool:
    return getattr(value, "_is_hf_initialized", False)


def _refuse_wrong_keys(
    model_class: type[AcFormerPreTrainedModel], name: str | None, report: dict, shapes_may_differ: bool
) -> None:
    problems = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(set(report["unexpected_keys"]) - model_class.keys_left_out),
        "of another shape": [] if shapes_may_differ else sorted(str(key) for key in report["mismatched_keys"]),
    }
    if told := [f"{len(keys)} weights {what} (first: {keys[0]})" for what, keys in problems.items() if keys]:
        raise CheckpointError(f"{name}: the weights do not fit the config: {'; '.join(told)}")
