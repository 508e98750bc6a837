"""Tokens a second of a training step with padding, batches of like length, and packed rows, on a mix like LLaVA's.

    python examples/packing.py [BATCHES] [CONNECTOR ...]      (a table on stdout; default 8 batches of each layout,
                                                              mlp with 576 visual tokens and acformer with 65)

Lengths are those of examples/llava_mix.py's records, at 4 bytes a token; the ids themselves are random. The language
model is a Llama of two layers of width 384 on the CPU in float32 (SDPA), trained with its connector; visual features
are cached, so that the encoder does not count. Layouts take turns batch by batch. "filled" is the share of positions
that hold a token, over the whole epoch; it does not depend on the machine.
"""

import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava_mix import _records
from transformers import LlamaConfig

from acformer.data.collate import Collator
from acformer.data.conversation import IGNORE
from acformer.data.image_root import ImageRoot
from acformer.data.layouts import as_sample
from acformer.data.lengths import TOKENS_PER_TURN, estimated_length, grouped_by_length
from acformer.data.packing import Packing
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

POOL, ROWS, LONGEST, WIDTH, VOCABULARY, IMAGE = 1600, 8, 2048, 384, 2048, 5


class _NoFiles(ImageRoot):
    def __init__(self) -> None:
        pass

    def find(self, name: str) -> Path:
        return Path(name)


def main(batches: str = "8", *connectors: str) -> None:
    """Print a table of Markdown."""
    print("| visual tokens | layout | filled, % | rows a batch | tokens a second | over padding |\n|" + "---|" * 6)
    for connector in connectors or ("mlp", "acformer"):
        model = _model(connector)
        layouts = _layouts(model.model.connector.num_tokens)
        spent = {name: [0.0, 0] for name in layouts}
        for number in range(int(batches)):
            for name, epoch in layouts.items():
                batch = epoch[random.Random(number).randrange(len(epoch))]
                seconds, tokens = _step(model, batch)
                spent[name][0] += seconds
                spent[name][1] += tokens
        speed = {name: tokens / seconds for name, (seconds, tokens) in spent.items()}
        for name, epoch in layouts.items():
            positions = sum(batch["input_ids"].numel() for batch in epoch)
            rows = sum(len(batch["input_ids"]) for batch in epoch) / len(epoch)
            filled = 100 * sum(map(_tokens, epoch)) / positions
            ratio = speed[name] / speed["padded"]
            told = f"{filled:.1f} | {rows:.1f} | {speed[name]:,.0f} | {ratio:.2f}"
            print(f"| {model.model.connector.num_tokens} | {name} | {told} |", flush=True)


def _model(connector: str) -> AcFormerForConditionalGeneration:
    torch.manual_seed(0)
    vision = tiny.vision_config(
        "clip_vision_model", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=96, patch_size=4,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=VOCABULARY, max_position_embeddings=LONGEST,
    )  # fmt: skip
    options = {"num_anchors": 64, "depth": 1, "num_heads": 2} if connector == "acformer" else {}
    config = AcFormerConfig(
        vision_config=vision, text_config=text, connector=connector, connector_kwargs=options, image_token_id=IMAGE
    )
    return AcFormerForConditionalGeneration(config).train()


def _layouts(num_tokens: int) -> dict[str, list[dict[str, Any]]]:
    """All batches of an epoch in each layout."""
    items = [_item(record, number, num_tokens) for number, record in enumerate(_records(POOL))]
    lengths = [len(item["input_ids"]) for item in items]
    shuffled = random.Random(0).sample(range(POOL), POOL)
    alike = grouped_by_length(lengths, ROWS, "0 0")
    tokenizer = SimpleNamespace(pad_token_id=0)
    processor = SimpleNamespace(tokenizer=tokenizer, image_token_id=IMAGE, num_placeholders=num_tokens)
    features = {"tokens": torch.randn(577, 64, generator=torch.Generator().manual_seed(0))}
    features["cls_attention"] = torch.rand(4, 576, generator=torch.Generator().manual_seed(1))
    packing = Packing(LONGEST, WIDTH)

    def epoch(order: list[int], packing: Packing | None) -> list[dict[str, Any]]:
        collator = Collator(processor, features=lambda path: features, packing=packing)
        return [collator([[items[i]] for i in order[start : start + ROWS]]) for start in range(0, POOL, ROWS)]

    return {
        "padded": epoch(shuffled, None),
        "like lengths": epoch(alike, None),
        "packed": epoch(shuffled, packing),
        "packed, like lengths": epoch(alike, packing),
    }


def _item(record: dict, number: int, num_tokens: int) -> dict[str, Any]:
    sample = as_sample(record, "mix", number + 1, _NoFiles())
    length = min(LONGEST, estimated_length(sample, num_tokens))
    image = [IMAGE] * num_tokens * len(sample.images)
    text = random.Random(number).choices(range(10, VOCABULARY), k=length - len(image))
    said = sum(len(m["content"].encode()) // 4 + TOKENS_PER_TURN for m in sample.messages if m["role"] == "assistant")
    hidden = max(1, length - said)
    ids = [1, *image, *text[1:]]
    labels = [IGNORE] * hidden + ids[hidden:]
    return {"id": sample.id, "images": sample.images, "input_ids": ids, "labels": labels[: len(ids)]}


def _tokens(batch: dict[str, Any]) -> int:
    return int((batch["input_ids"] != 0).sum())


def _step(model: AcFormerForConditionalGeneration, batch: dict[str, Any]) -> tuple[float, int]:
    inputs = {key: value for key, value in batch.items() if key != "sample_ids"}
    begun = time.process_time()
    model(**inputs, supervised_only=True).loss.backward()
    seconds = time.process_time() - begun
    model.zero_grad()
    return seconds, _tokens(batch)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
