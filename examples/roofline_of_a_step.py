"""The arithmetic of a step of stage 1 at a preset's size: what fewer visual tokens may save at most, on any machine.

    python examples/roofline_of_a_step.py [PRESET]      (default llava15-7b: CLIP-L/14 at 336 pixels, Vicuna-7B)

Counts FLOP alone, without weights and without a device; `acformer bench train` measures against the same counts.
"""

import sys

import torch

from acformer.lab.bench.presets import build_connectors, load_preset
from acformer.lab.bench.roofline import encoder_flops
from acformer.lab.bench.train import caption_lengths, step_flops


def main(name: str = "llava15-7b") -> None:
    """One line a connector and T: TFLOP of a step, and how many times `mlp` over all patches needs them."""
    preset = load_preset(name)
    config, captions, grid = preset.config, caption_lengths(preset.train_batch), preset.geometry.grid
    encoder = len(captions) * encoder_flops(config.vision_config, grid, config.feature_layer)
    connectors = build_connectors(preset, ("mlp", "acformer"), preset.tokens, torch.device("meta"), torch.float32)
    steps = {key: step_flops(config, connector, captions) for key, connector in connectors.items()}
    everything = next(iter(steps.values()))
    print(f"{name}, {len(captions)} captions of {min(captions)} to {max(captions)} tokens")
    for (connector, tokens), step in steps.items():
        cached, encoded = everything / step, (everything + encoder) / (step + encoder)
        gains = f"mlp / this {cached:.2f}, with encoder {encoded:.2f}"
        print(f"{connector:9} T {tokens:3}  {step / 1e12:5.1f} TFLOP  {gains}")


if __name__ == "__main__":
    main(*sys.argv[1:])
