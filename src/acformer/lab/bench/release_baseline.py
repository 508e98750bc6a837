"""The authors' way, as a baseline: eager attention through all blocks, every N x N map kept, selection in a loop.

Written from the paper (Sec. 3.2, 3.3), not from their code. `select_anchors_reference` is the same search made to be
read; here it is made as their description has it run, with one sort and one wait for the device a head.
"""

from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from acformer.vision.encoder import num_blocks, tower_inputs
from acformer.vision.families import num_prefix_tokens


def encode(
    tower: PreTrainedModel, pixels: Float[Tensor, "B C Y X"], feature_layer: int
) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B H N"]]:
    """All hidden states and attention maps of an eager tower, of which one layer's tokens and [CLS] row are used."""
    output = tower(**tower_inputs(tower.config, pixels), output_attentions=True, output_hidden_states=True)
    block = num_blocks(tower.config, feature_layer)
    row = output.attentions[block - 1][:, :, 0, num_prefix_tokens(tower.config) :]
    return output.hidden_states[block], row


def select(cls_attention: Float[Tensor, "B H N"], num_anchors: int) -> Int[Tensor, "B A"]:
    """floor(num_anchors / H) patches a head, image by image and head by head (Fig. 7); ascending."""
    quota = num_anchors // cls_attention.shape[1]
    anchors = []
    for image in cls_attention:
        taken: set[int] = set()  # patches of earlier heads, which a later one passes over
        for scores in image:
            order = scores.argsort(descending=True).tolist()
            taken |= {*islice((patch for patch in order if patch not in taken), quota)}
        anchors.append(sorted(taken))
    return torch.tensor(anchors, device=cls_attention.device)
