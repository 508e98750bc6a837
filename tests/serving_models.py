"""Models to serve, prompts to ask and what transformers says to them; run as a script, in a process of its own.

    python tests/serving_models.py FOLDER KIND     writes FOLDER/KIND (a model) and FOLDER/KIND.json (what it says)

A server may have patched transformers' classes, and must not be asked what transformers says.
"""

import base64
import json
import random
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

KINDS = {"clip": "clip_vision_model", "dinov2": "dinov2"}
BUDGETS = (None, 3, 16)
MAX_TOKENS = 8
IMAGES = (0, 1, 2, 3, 1, 0, 2, 1, 3, 0, 1, 2)
"""How many each of the twelve prompts has."""
WORDS = "red green blue user assistant chat what who which and a between"


def prompts() -> list[tuple[str, list[int]]]:
    """(question, numbers of its pictures) of twelve; some share a beginning, and pictures."""
    words = WORDS.split()
    return [(" ".join(words[row % 5 : row % 5 + 3 + row % 4]) + "?", list(range(n))) for row, n in enumerate(IMAGES)]


def picture_bytes(number: int) -> bytes:
    width, height, file = 20 + number, 14, BytesIO()
    pixels = random.Random(number).randbytes(3 * width * height)
    Image.frombytes("RGB", (width, height), pixels).save(file, "PNG")
    return file.getvalue()


def data_url(number: int) -> str:
    return "data:image/png;base64," + base64.b64encode(picture_bytes(number)).decode()


def messages(question: str, pictures: list[int], **part: Any) -> list[dict]:
    """As an OpenAI client sends them; `part`: further keys of `image_url`."""
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": data_url(one), **part}} for one in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def save_model(folder: Path, kind: str) -> None:
    """Random weights; heads of 32, which vLLM's kernel for CPUs can do."""
    import tiny
    import torch
    from transformers import CONFIG_MAPPING

    from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration

    config = tiny.config(vision=KINDS[kind])
    text = CONFIG_MAPPING["llama"](
        **{**config.text_config.to_dict(), "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
    )
    text.head_dim = 32
    torch.manual_seed(0)
    model = AcFormerForConditionalGeneration(
        AcFormerConfig(
            vision_config=config.vision_config,
            text_config=text,
            connector="acformer",
            connector_kwargs=config.connector_kwargs,
            image_token_id=config.image_token_id,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
        tokenizer = tiny.tokenizer()
        words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        for number, word in enumerate(words):  # it speaks letters, so that text says what the ids say
            if (not word.removeprefix("\u0120").isascii() and number != tokenizer.eos_token_id) or "<" in word:
                model.lm_head.weight[number] = 0
    model.generation_config.update(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tiny.processor(5, budgets=model.config.budgets).save_pretrained(folder)


def said(folder: Path) -> dict[str, list[dict]]:
    """By budget, for every prompt the ids of the prompt, the ids of the answer and its text."""
    import torch

    from acformer.hf.checkpoints import load_model

    model, processor = load_model(str(folder), dtype="float32")
    answers: dict[str, list[dict]] = {}
    for budget in BUDGETS:
        rows = answers[str(budget)] = []
        for question, pictures in prompts():
            inputs = processor.apply_chat_template(
                messages(question, pictures),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"num_image_tokens": budget},
            )
            prompt = inputs["input_ids"][0].tolist()
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0, len(prompt) :].tolist()
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            rows.append({"prompt": prompt, "ids": ids, "text": text})
    return answers


def main(folder: str, kind: str) -> None:
    save_model(Path(folder, kind), kind)
    Path(folder, f"{kind}.json").write_text(json.dumps(said(Path(folder, kind))))


if __name__ == "__main__":
    main(*sys.argv[1:])
