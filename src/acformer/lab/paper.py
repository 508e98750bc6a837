"""Every number that we hold ourselves to, as data: the paper's, and in `TOKENPACKER` its strongest rival's.

"Visual Anchors Are Strong Information Aggregators For Multimodal Large Language Model" (Liu et al., NeurIPS
2024, arXiv 2405.17815). Nothing here was measured by us. A table is a dict of rows, a row a dict of columns,
without those that the paper leaves empty: `TABLE3["acformer", 145]["MME"] == 1846.1`.

`tokens` are visual tokens an image as the paper counts them: [CLS] and the anchors (65, 145, 257), or all of
CLIP-L/14-336 with [CLS] (577). Connectors have the names that this package gives them.
"""

from dataclasses import dataclass

Scores = dict[str, float]


@dataclass(frozen=True)
class PaperStage:
    """One stage of training (Sec. 4.1); `llava15_learning_rate` is what LLaVA-1.5 has there."""

    data: str
    samples: int
    trained: tuple[str, ...]
    learning_rate: float
    llava15_learning_rate: float
    batch_size: int
    template: str
    epochs: int = 1
    schedule: str = "cosine"
    warmup: float = 0.03
    optimizer: str = "AdamW"
    weight_decay: float = 0.0
    dtype: str = "bfloat16"
    max_length: int = 2048


def _table(columns: str, rows: dict) -> dict:
    """Values under their columns' names, without those that are None."""
    names = columns.split()
    return {
        key: {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for key, values in rows.items()
    }


# Sec. 4.1: the encoder, frozen, and the module that reads it. H = 16 heads, R_v of the last block but one.
ENCODER = {
    "name": "CLIP ViT-L/14-336",
    "image_size": 336,
    "patch_size": 14,
    "grid": (24, 24),
    "num_prefix_tokens": 1,
    "hidden_size": 1024,
    "num_heads": 16,
    "feature_layer": -2,
}
# Sec. 3.3: the stack that the queries pass through; on its feed-forward width, text and release differ.
STACK = {"depth": 6, "num_heads": 8, "head_dim": 64}
FEED_FORWARD_WIDTH = {"text": 2048, "release": 4096}

# Sec. 4.1: LLaVA-1.5's recipe with one change, the learning rate of stage 1.
RECIPE = {
    "pretrain": PaperStage(
        data="LLaVA image-caption pairs (LAION/CC/SBU, BLIP captions)",
        samples=558_000,
        trained=("connector",),
        learning_rate=5e-4,
        llava15_learning_rate=1e-3,
        batch_size=256,
        template="plain",
    ),
    "finetune": PaperStage(
        data="LLaVA-1.5 mix",
        samples=665_000,
        trained=("connector", "language_model"),
        learning_rate=2e-5,
        llava15_learning_rate=2e-5,
        batch_size=128,
        template="vicuna_v1",
    ),
}

# Tables 1 and 2, 336 px: (language model, connector, tokens). `speed`: of pre-training, LLaVA-1.5's being 1.
TABLES_1_2: dict[tuple[str, str, int], Scores] = _table(
    "POPE MME MMB MM-Vet TextVQA GQA VQAv2 VizWiz SQA-img speed",
    {
        ("vicuna-7b", "mlp", 577): (85.9, 1794.6, 64.3, 30.5, 58.2, 62.0, 78.5, 50.0, 66.8, 1.00),
        ("vicuna-7b", "acformer", 145): (86.4, 1846.1, 68.4, 30.3, 58.0, 61.3, None, None, None, 2.23),
        ("vicuna-7b", "acformer", 257): (None, 1848.8, 68.3, None, 58.2, 61.2, 78.4, 52.8, 69.4, 1.65),
        ("vicuna-13b", "mlp", 577): (85.9, 1826.7, 67.7, 35.4, 61.2, 63.3, 80.0, 53.6, 71.6, 1.00),
        ("vicuna-13b", "acformer", 145): (86.1, 1870.0, 69.2, 34.1, 60.7, 62.8, None, None, None, 2.30),
        ("vicuna-13b", "acformer", 257): (None, None, None, None, 61.3, 63.0, 79.8, 53.7, 71.8, 1.69),
    },
)

# Table 3, Vicuna-7B: (connector, tokens). Pooling a 24 x 24 grid by 2 x 2 ends at 145, so it has no 257.
TABLE3: dict[tuple[str, int], Scores] = _table(
    "TextVQA GQA MMB MME",
    {
        ("pooling", 65): (53.4, 59.8, 66.8, 1734.0),
        ("pooling", 145): (55.1, 60.9, 68.0, 1791.4),
        ("pooling_pr", 65): (53.9, 60.0, 66.8, 1728.9),
        ("pooling_pr", 145): (54.7, 60.9, 68.0, 1759.1),
        ("random_pr", 65): (53.9, 59.1, 66.9, 1728.7),
        ("random_pr", 145): (54.6, 59.7, 67.0, 1772.7),
        ("perceiver", 65): (51.0, 56.1, 63.2, 1702.8),
        ("perceiver", 145): (52.1, 56.4, 65.4, 1720.8),
        ("perceiver", 257): (52.3, 56.8, 65.7, 1735.9),
        ("c_abstractor", 65): (52.8, 59.0, 67.0, 1743.3),
        ("c_abstractor", 145): (53.4, 60.2, 67.8, 1775.4),
        ("c_abstractor", 257): (53.7, 60.8, 68.3, 1790.0),
        ("acformer", 65): (56.1, 59.2, 67.3, 1744.2),
        ("acformer", 145): (58.0, 61.3, 68.4, 1846.1),
        ("acformer", 257): (58.2, 61.2, 68.3, 1848.8),
    },
)

# Table 3, Vicuna-13B. The MME of `acformer` is 1870.0 in Table 1.
TABLE3_13B: dict[tuple[str, int], Scores] = _table(
    "TextVQA GQA MMB MME",
    {
        ("perceiver", 145): (53.4, 56.9, 64.7, 1749.3),
        ("c_abstractor", 145): (58.5, 62.1, 68.8, 1823.6),
        ("acformer", 145): (60.7, 62.8, 69.2, 1869.3),
    },
)

# Table 4, Vicuna-7B: the anchors without cross-attention, with the rest fused into one token, and with it.
TABLE4: dict[tuple[str, int], Scores] = _table(
    "TextVQA GQA MMB MME",
    {
        ("top_p", 145): (56.3, 60.8, 68.2, 1798.8),
        ("e_vit", 146): (57.1, 61.0, 68.3, 1808.4),
        ("acformer", 145): (58.0, 61.3, 68.4, 1846.1),
    },
)

# Table 5, OpenLLaMA-3B, 145 tokens: (data of stage 2, connector).
TABLE5: dict[tuple[str, str], Scores] = _table(
    "TextVQA GQA OKVQA VQAv2 VizWiz MME",
    {
        ("llava-665k", "perceiver"): (35.03, 54.35, 54.14, 70.04, 31.16, 1592.7),
        ("llava-665k", "acformer"): (35.89, 55.45, 55.15, 72.76, 33.88, 1622.3),
        ("cauldron", "perceiver"): (38.76, 44.98, 49.66, 70.83, 32.87, 1502.5),
        ("cauldron", "acformer"): (40.49, 45.67, 50.57, 73.01, 32.97, 1523.1),
    },
)

# Table 6, `acformer` on 8 A100-80G: (language model, tokens), minutes of stage 1 and stage 2.
TABLE6: dict[tuple[str, int], Scores] = _table(
    "pretrain finetune",
    {
        ("vicuna-7b", 65): (42, 9 * 60 + 52),
        ("vicuna-7b", 145): (60 + 20, 10 * 60 + 12),
        ("vicuna-7b", 257): (60 + 50, 10 * 60 + 30),
        ("vicuna-13b", 145): (2 * 60 + 4, 17 * 60 + 32),
    },
)

# Table 7: what each benchmark's number is. OKVQA (Table 5) is not in it.
METRICS = {
    "TextVQA": "VQA score",
    "VizWiz": "VQA score",
    "VQAv2": "VQA score",
    "GQA": "exact match",
    "POPE": "F1",
    "SQA-img": "accuracy",
    "MMB": "accuracy",
    "MME": "sum of perception and cognition",
    "MM-Vet": "GPT-4 score",
}

# Fig. 1: the mean of three benchmarks against the time of a step. An image, so no values of its own.
FIGURE1_TOKENS = (65, 145, 257, 577)

# Sec. 3.2: up to so many per cent of the activated tokens are salient in the [CLS] attention too. What counts
# as activated or salient is not said.
OVERLAP = 69.38

# Not in the paper: TokenPacker (IJCV 2025), its authors' table. LLaVA-1.5's data, Vicuna-7B, mean of six.
TOKENPACKER: dict[tuple[str, int], float] = {
    ("mlp", 576): 62.0,
    ("tokenpacker", 144): 62.8,
    ("ldp_v2", 144): 61.2,
    ("pooling", 144): 60.9,
    ("pixel_shuffle", 144): 60.8,
    ("resampler", 144): 60.4,
    ("c_abstractor", 144): 60.0,
    ("tokenpacker", 64): 61.9,
    ("ldp_v2", 64): 60.6,
    ("resampler", 64): 60.1,
    ("pixel_shuffle", 64): 59.7,
    ("c_abstractor", 64): 59.3,
    ("pooling", 64): 59.1,
}
