"""Any language model of transformers: in ours it says what it says alone, or is refused in one line."""

import copy
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import tiny
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from acformer.errors import UsageError
from acformer.hf import AcFormerConfig
from acformer.hf.build import assemble
from acformer.hf.head import body_name
from acformer.vision.encoder import truncate

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width", "mamba_d_ssm"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "index_topk", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_shared_experts", "n_shared_experts", "mamba_n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("mamba_d_state", "mamba_chunk_size"), 8),
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 300,
    "is_decoder": True,
}
RECURRENT = {"layer_types": ["linear_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "longcat_flash": {"head_dim": 4},
    "bailing_hybrid": RECURRENT,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["full_attention"] * 2},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4, "layer_types": ["full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**RECURRENT, "linear_head_dim": 8, "linear_num_heads": 2},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_moe_text": RECURRENT,
    "qwen3_5_text": RECURRENT,
    "qwen3_next": RECURRENT,
    "qwen4_exp_text": RECURRENT,
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
}
"""What some want beside `SIZES`."""
NOT_TRIED = {
    "blt": "12 GB whatever the sizes",
    "git": "a BERT with an encoder of its own",
    "phi4_multimodal": "builds its vision and audio towers, 870 M weights, whatever the sizes",
    "roc_bert": "13 M weights whatever the sizes",
}
COMMON = [
    "bloom",
    "cohere2",
    "falcon",
    "gemma2",
    "gemma3_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
]
COMMON += ["mpt", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "smollm3", "stablelm", "starcoder2"]
OTHERS = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {*COMMON} - {*NOT_TRIED})


def small_config(name: str) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[name]
    known = {*(field.name for field in fields(config_class)), *config_class.attribute_map}
    if "qk_rope_head_dim" in known:  # attention in two parts, whose widths make the head's
        known.discard("head_dim")
    options = {key: value for key, value in SIZES.items() if key in known} | OWN.get(name, {})
    ids = {"vocab_size": len(tiny.tokenizer()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return config_class(**options, **ids)


def small_language_model(name: str):
    if not is_dataclass(CONFIG_MAPPING[name]):
        pytest.skip("an older kind of config")
    try:
        config = small_config(name)
        if config.get_text_config() is not config:
            pytest.skip("a model of several parts")
        torch.manual_seed(0)
        language_model = AutoModelForCausalLM.from_config(config).eval()
        language_model(input_ids=torch.tensor([[4, 5]]))
        return language_model
    except Exception as error:  # a config of its own kind: nothing that we could say about it
        pytest.skip(f"no small one: {type(error).__name__} {str(error)[:150]}")


def check_it_says_the_same(name: str) -> None:
    language_model = small_language_model(name)
    try:
        body_name(language_model)
    except UsageError as error:
        pytest.skip(f"refused: {error}")
    own = tiny.config()
    config = AcFormerConfig(
        vision_config=own.vision_config,
        text_config=copy.deepcopy(language_model.config),  # two models of one config object share its kernel
        connector="acformer",
        connector_kwargs=own.connector_kwargs,
        image_token_id=own.image_token_id,
    )
    tower = truncate(AutoModel.from_config(own.vision_config), config.feature_layer)
    model = assemble(config, tower, language_model).eval()
    ids = torch.randint(4, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = language_model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-6, rtol=1e-5)
        other = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
        changed = language_model(input_ids=other).logits
        torch.testing.assert_close(changed[:, :-1], wanted[:, :-1], atol=1e-5, rtol=1e-4)  # it looks back alone
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
        assert model.generate(input_ids=ids, **options).tolist() == language_model.generate(ids, **options).tolist()


@pytest.mark.parametrize("name", COMMON)
def test_a_language_model_says_what_it_says_alone(name):
    check_it_says_the_same(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_so_does_any_other(name):
    check_it_says_the_same(name)


@pytest.mark.parametrize(("name", "why"), [("minimax", "KV cache of its own"), ("deepseek_v4", "by the ids")])
def test_one_that_wants_more_than_embeddings_is_refused(name, why):
    with pytest.raises(UsageError, match=why):
        body_name(small_language_model(name))


def test_an_encoder_that_is_not_set_to_decode_is_refused():
    config = small_config("bert")
    config.is_decoder = False
    with pytest.raises(UsageError, match="cannot generate: set is_decoder to true"):
        body_name(AutoModelForCausalLM.from_config(config))
