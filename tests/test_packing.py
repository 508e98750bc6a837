"""Packed rows: the loss of the same samples in rows of their own, or a refusal before anything trains."""

import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train import data, recipe  # noqa: F401 (fixtures)
from transformers import CONFIG_MAPPING

from acformer.data.collate import Collator, ConversationDataset
from acformer.data.conversation import IGNORE
from acformer.data.packing import Packing, packed_text
from acformer.data.samples import Sample
from acformer.errors import UsageError
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration
from acformer.training.dry_run import dry_run
from acformer.training.packed import check_packing, stage_packing
from acformer.training.recipe import StageSpec
from acformer.training.stages import train

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
}
APART = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 24},
    "gemma2": {"head_dim": 8, "sliding_window": 24},
    "gemma3_text": {"head_dim": 8, "sliding_window": 24},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {"n_positions": 1024},
}
NOT_APART = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "head_dim": 8, "block_types": ["recurrent"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
EAGER_ALONE = ["gemma2"]


def model_of(family: str, attention: str = "sdpa", **fields) -> AcFormerForConditionalGeneration:
    """The tiny model with another language model."""
    config = tiny.config()
    vocabulary = config.text_config.vocab_size
    known = CONFIG_MAPPING[family]
    text = known(**{**SIZES, **fields, "vocab_size": vocabulary})
    torch.manual_seed(0)
    whole = AcFormerConfig(
        vision_config=config.vision_config,
        text_config=text,
        connector=config.connector,
        connector_kwargs=config.connector_kwargs,
        image_token_id=config.image_token_id,
    )
    model = AcFormerForConditionalGeneration._from_config(whole, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # what is read changes what is said
    return model


@pytest.fixture
def batches(tmp_path):
    """The same seven samples, padded and packed: captions, dialogues, text alone, two images."""
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        tiny.picture(number).save(paths[-1])
    samples = []
    for number in range(7):
        images = ((paths[0],), (), (paths[1], paths[2]), (paths[2],))[number % 4]
        asked = [{"type": "image"}] * len(images) + [{"type": "text", "text": "which? " * (number % 3 + 1)}]
        turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": f"red {number} " * (number + 1)})
        samples.append(Sample(str(number), turns * (1 if images else 2), images))

    def make(packing: Packing | None) -> dict:
        dataset = ConversationDataset(samples, tiny.processor())
        batch = Collator(tiny.processor(), packing=packing)([dataset[number] for number in range(7)])
        return batch

    return make


def loss_and_gradient(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    batch = {key: value for key, value in batch.items() if key != "sample_ids"}
    items = (batch["labels"][:, 1:] != IGNORE).sum()
    loss = model(**batch, supervised_only=True, num_items_in_batch=items).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), model.model.connector.projector[0].weight.grad.clone()


@pytest.mark.parametrize("longest", [400, 10_000])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.mostly_slow(APART, "llama", "gemma2", "gpt2"))
def test_the_loss_is_that_of_rows_of_their_own(batches, family, attention, longest):
    if family in EAGER_ALONE and attention != "eager":
        pytest.skip("its softcap has no such kernel")
    model = model_of(family, attention, **APART[family])
    check_packing(model)
    model.eval()  # without dropout
    padded, packed = batches(None), batches(Packing(longest, hidden_size=10**9))
    assert "attention_mask" not in packed
    assert sorted(packed["sample_ids"]) == padded["sample_ids"]
    assert len(packed["input_ids"]) < 7
    (loss, gradient), (packed_loss, packed_gradient) = (loss_and_gradient(model, batch) for batch in (padded, packed))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-3, atol=1e-5)


def test_samples_stand_in_the_rows_that_were_chosen_for_them(batches):
    packing = Packing(250, hidden_size=10**9)
    padded, packed = batches(None), batches(packing)
    lengths = padded["attention_mask"].sum(1).tolist()
    rows = packing.rows(lengths)
    assert [number for row in rows for number in row] != [*range(7)], "another order than that of the batch"
    assert packed["sample_ids"] == [str(number) for row in rows for number in row]
    assert packed["input_ids"].shape == (len(rows), max(sum(lengths[number] for number in row) for row in rows))


def test_the_first_token_of_a_sample_is_not_learnt_from_the_sample_before_it():
    items = [{"input_ids": [number, number], "labels": [number, number]} for number in (1, 2, 3)]
    packed = packed_text(items, [2, 1], 0)
    assert packed["labels"].tolist() == [[IGNORE, 1, IGNORE, 2], [IGNORE, 3, IGNORE, IGNORE]]


def test_all_in_one_row_for_a_kernel_of_varying_lengths(batches):
    model = model_of("llama").eval()
    packed = batches(Packing(8, 32, in_one_row=True))
    assert packed["input_ids"].shape == (1, int(batches(None)["attention_mask"].sum()))
    expected = loss_and_gradient(model, batches(None))[0]
    torch.testing.assert_close(loss_and_gradient(model, packed)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", NOT_APART)
def test_a_language_model_that_would_mix_samples_is_refused(family):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    with pytest.raises(UsageError, match=r"^packing: in .* would see the one before it in its row; leave packing out"):
        check_packing(model_of(family, "eager", **NOT_APART[family]))


def test_images_beside_the_sequence_are_refused():
    with pytest.raises(UsageError, match="under fusion gated_cross_attention a sample would see another's images"):
        check_packing(tiny.model(fusion="gated_cross_attention"))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 600), st.integers(1, 4096))
def test_every_sample_is_in_one_row_and_rows_are_not_too_long(lengths, longest, hidden_size):
    rows = Packing(longest, hidden_size).rows(lengths)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    most = max(longest, max(lengths))
    assert all(sum(lengths[number] for number in row) <= most for row in rows)
    assert rows == Packing(longest, hidden_size).rows(lengths)


def test_wide_rows_cost_a_small_model_more():
    lengths = [600 + 20 * number for number in range(16)]
    wide, narrow = Packing(8192, 100_000).rows(lengths), Packing(8192, 64).rows(lengths)
    assert len(wide) < len(narrow)


def test_the_stages_rows_follow_the_kernel():
    model = tiny.model()
    spec = StageSpec(data="", learning_rates={}, packing=True, max_length=99)
    assert stage_packing(spec, model) == Packing(99, 32)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    assert stage_packing(spec, model) == Packing(99, 32, in_one_row=True)
    assert stage_packing(StageSpec(data="", learning_rates={}), model) is None


def losses(folder) -> list[float]:
    return [entry["loss"] for entry in json.loads((folder.parent / "log.json").read_text()) if "loss" in entry]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.slow
def test_a_stage_trains_as_it_would_unpacked(recipe, data, tmp_path, strategy):  # noqa: F811
    records = json.loads((data / "questions.json").read_text())
    for number, record in enumerate(records):
        record["conversations"][1]["value"] += " indeed" * (5 * number % 12)
    (tmp_path / "uneven.json").write_text(json.dumps(records))
    own = [f"finetune.data={tmp_path}/uneven.json", f"finetune.image_root={data}", "stage=finetune", "pretrain=null"]
    own += [f"finetune.training.train_sampling_strategy={strategy}", "finetune.training.gradient_accumulation_steps=2"]
    own += ["finetune.training.per_device_train_batch_size=2"]
    plain = losses(train(recipe(*own, f"output_dir={tmp_path}/plain"), progress=False))
    packed = losses(train(recipe(*own, "finetune.packing=true", f"output_dir={tmp_path}/packed"), progress=False))
    assert packed == pytest.approx(plain, rel=1e-4)


def test_what_does_not_go_with_packing_is_told_before_anything_trains(recipe):  # noqa: F811
    with pytest.raises(UsageError, match=r"finetune\.packing and finetune\.elastic do not go together"):
        recipe("finetune.packing=true", "finetune.elastic=[2, 4]")


def test_a_dry_run_shows_packed_rows(recipe, tmp_path):  # noqa: F811
    shown = dry_run(recipe("stage=finetune", "pretrain=null", "finetune.packing=true"))
    assert "position_ids (" in shown
    assert "attention_mask" not in shown
    assert "row 1, " in shown
    assert "tokens are learned: those in [[ ]]" in shown
