"""How much of a batch is padding, with rows drawn at random and with rows of like length (docs/training.md).

    acformer fetch easy-vqa smollm2-135m dinov2-s14
    python examples/padding.py

Captions and dialogues of easy-VQA one to one, in SmolLM's tokens, 16 rows a batch, five orders each. No model runs.
"""

import random
from collections.abc import Sequence
from statistics import mean

from transformers import AutoTokenizer

from acformer.data.collate import ConversationDataset
from acformer.data.datasets import load_samples
from acformer.data.lengths import grouped_by_length
from acformer.data.templates import TEMPLATES
from acformer.fetch.embedded import resolve
from acformer.hf import AcFormerProcessor
from acformer.hf.build import square_image_processor

ROWS, SEEDS = 16, range(5)


def main() -> None:
    """Print a line for each number of visual tokens."""
    samples = load_samples("easy-vqa:captions", limit=800) + load_samples("easy-vqa:train_dialogues", limit=800)
    for num_visual_tokens in (576, 145, 65):
        data = ConversationDataset(samples, processor(num_visual_tokens))
        lengths = [len(data[index][0]["input_ids"]) for index in range(len(data))]
        drawn = mean(padding(lengths, random.Random(seed).sample(range(len(data)), len(data))) for seed in SEEDS)
        alike = mean(padding(lengths, grouped_by_length(data.lengths(), ROWS, f"{seed} 0")) for seed in SEEDS)
        print(f"{num_visual_tokens} visual tokens: {drawn:.1%} padding at random, {alike:.1%} with like lengths")


def processor(num_placeholders: int) -> AcFormerProcessor:
    """SmolLM's tokenizer, LLaVA's dialogue template."""
    special = {"image_token": "<image>"}
    tokenizer = AutoTokenizer.from_pretrained(resolve("embedded:smollm2-135m"), extra_special_tokens=special)
    pixels = square_image_processor(resolve("embedded:dinov2-s14"), 336)
    return AcFormerProcessor(pixels, tokenizer, num_placeholders=num_placeholders, chat_template=TEMPLATES["vicuna_v1"])


def padding(lengths: Sequence[int], order: Sequence[int]) -> float:
    """Share of the positions of all batches that hold no token."""
    batches = [[lengths[index] for index in order[start : start + ROWS]] for start in range(0, len(order), ROWS)]
    return 1 - sum(map(sum, batches)) / sum(max(batch) * len(batch) for batch in batches)


if __name__ == "__main__":
    main()
