"""`acformer` with accelerate's FSDP2 on CPUs (gloo): accelerate itself turns it into DDP there, without a word.

    torchrun --nproc-per-node 2 tests/fsdp_on_cpu.py train RECIPE finetune.training.fsdp=true ...

All else is what GPUs run: accelerate's plugin, torch's fully_shard, the Trainer's and our saving and loading.
"""

import os
import sys
from pathlib import Path

from accelerate import accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from acformer.cli import main

whole = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    whole(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp

prepare = accelerator.fsdp2_prepare_model


def telling(own, model):
    """Writes the share of frozen weights without memory to `$TELL_META.RANK` before the model is sharded."""
    if path := os.environ.get("TELL_META"):
        weights = [weight for weight in model.parameters() if not weight.requires_grad]
        Path(f"{path}.{os.environ['RANK']}").write_text(str(sum(w.is_meta for w in weights) / len(weights)))
    return prepare(own, model)


accelerator.fsdp2_prepare_model = telling

if __name__ == "__main__":
    sys.exit(main())
