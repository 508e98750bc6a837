"""What FSDP has to know about our models, and checkpoints that any number of processes can go on from.

Nothing is sharded or sent here: accelerate and torch do that.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers.integrations.fsdp import is_fsdp_enabled

from acformer.errors import UsageError

OPTIMIZER = "optimizer.pt"


def check_one_reader(*, cached: bool, elastic: bool, quantize: bool) -> None:
    """`UsageError` for what every rank would need weights for, where one alone reads them."""
    wanted = {"cache_features": cached, "elastic": elastic, "quantize": quantize}
    if is_fsdp_enabled() and (named := [name for name, is_wanted in wanted.items() if is_wanted]):
        raise UsageError(f"{named[0]} needs the weights on every rank: leave out fsdp_config.cpu_ram_efficient_loading")


def tell_apart(model: nn.Module) -> None:
    """Weights that learn get memory of their own where this rank has not read them; nobody writes to it.

    accelerate knows an optimizer's weights by their address, which is 0 for all that have none: of such a rank it would
    train one weight, and the others' shards would stay as they were.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta and weight.requires_grad:
                if id(weight) not in made:
                    made[id(weight)] = nn.Parameter(torch.empty_like(weight, device="cpu"))
                module._parameters[name] = made[id(weight)]


def set_up_fsdp(plugin: Any, model: Any) -> None:
    """Which blocks are sharded, and whole weights in what is saved, whoever goes on from it.

    The language model's blocks, or those that were named. Never the encoder's: a process whose batch has no image runs
    none of them, and the others would wait for it.
    """
    plugin.set_state_dict_type("FULL_STATE_DICT")
    encoder, text = block_classes(model.model.vision_tower), block_classes(model.model.language_model)
    named = plugin.transformer_cls_names_to_wrap or text
    plugin.transformer_cls_names_to_wrap = [name for name in named if name in text or name not in encoder]


def block_classes(part: nn.Module) -> list[str]:
    """Classes of the blocks that a model is a list of."""
    found: set[str] = set()
    inside: tuple[str, ...] = ()
    for name, module in part.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside or ("\0",)):
            inside += (f"{name}.",)
            found |= {type(block).__name__ for block in module}
    return sorted(found)


def save_sharded_optimizer(model: nn.Module, optimizer: Any, folder: Path, *, writes: bool) -> None:
    """As one process would save it; called by all, since each holds a part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    named = get_optimizer_state_dict(model, optimizer, options=options)
    if writes:
        torch.save(_numbered(named, _names(model, optimizer)), folder / OPTIMIZER)


def load_sharded_optimizer(model: nn.Module, optimizer: Any, folder: Path, *, reads: bool) -> None:
    """What any number of processes has saved; one reads it and sends each its part."""
    named: dict[str, Any] = {}
    if reads:
        found = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        named = _named(found, _names(model, optimizer))
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, optimizer, named, options=options)


def _names(model: nn.Module, optimizer: Any) -> list[str]:
    """Names of the weights in the order in which torch's optimizers number them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _numbered(named: dict[str, Any], names: list[str]) -> dict[str, Any]:
    number = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": [number[name] for name in group["params"]]} for group in named["param_groups"]]
    return {"state": {number[name]: state for name, state in named["state"].items()}, "param_groups": groups}


def _named(numbered: dict[str, Any], names: list[str]) -> dict[str, Any]:
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in numbered["param_groups"]]
    return {"state": {names[index]: state for index, state in numbered["state"].items()}, "param_groups": groups}
