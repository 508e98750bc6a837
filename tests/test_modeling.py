"""The model on tiny random configs: loss, generation, budgets, cached features, checkpoints, encoders, connectors."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

from acformer.connectors import build_connector
from acformer.errors import CheckpointError, UsageError
from acformer.hf import AcFormerConfig, AcFormerForConditionalGeneration, AcFormerModel, AcFormerProcessor
from acformer.hf.cache_name import CACHE

ONE = "USER: <image>\nWhat? ASSISTANT:"
TWO = "USER: <image> and <image>\nWhich is it? ASSISTANT:"
NONE = "USER: Who? ASSISTANT:"


@pytest.fixture
def model():
    return tiny.model()


@pytest.fixture
def batch():
    """Rows with one, two and no images; 3 images of 5 tokens."""
    return tiny.inputs([ONE, TWO, NONE], [[tiny.picture(0)], tiny.pictures([1, 2]), []], padding_side="right")


@pytest.fixture
def folder(model, tmp_path):
    return save(model, tmp_path / "checkpoint")


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.processor(model.config.num_placeholders, model.config.image_size).save_pretrained(folder)
    return folder


def labels_of(batch) -> torch.Tensor:
    """The last few tokens of every row, a different number in each."""
    labels = torch.full_like(batch["input_ids"], -100)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        labels[row, length - 2 - 2 * row : length] = batch["input_ids"][row, length - 2 - 2 * row : length]
    return labels


def greedy(model, inputs, tokens: int = 8, **kwargs) -> torch.Tensor:
    """(B, tokens) new ids; the end token is not allowed to end it."""
    kwargs = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, **kwargs}
    return model.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


# Loss and gradients


def test_loss_is_the_mean_over_the_labels(model, batch):
    labels = labels_of(batch)
    output = model(**batch, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_step_goes_on_from_the_cache(model, name):
    inputs = tiny.inputs(ONE, tiny.picture())
    whole = model(**inputs)
    start = {**inputs, "input_ids": inputs["input_ids"][:, :-2], "attention_mask": inputs["attention_mask"][:, :-2]}
    rest = model(input_ids=inputs["input_ids"][:, -2:], **{name: model(**start)[CACHE]})
    torch.testing.assert_close(rest.logits, whole.logits[:, -2:])
    assert rest[CACHE].get_seq_length() == inputs["input_ids"].shape[1]


def test_gradient_accumulation_gives_the_loss_of_the_whole_batch(model, batch):
    labels = labels_of(batch)
    whole = model(**batch, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    rows = zip(batch["input_ids"], batch["attention_mask"], labels, batch["pixel_values"].split([1, 2, 0]), strict=True)
    parts = [
        model(
            input_ids=ids[None],
            attention_mask=mask[None],
            labels=label[None],
            pixel_values=pixels if len(pixels) else None,
            num_items_in_batch=items,
        ).loss
        for ids, mask, label, pixels in rows
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("connector", tiny.CONNECTORS)
def test_all_weights_but_the_encoders_last_norm_learn(connector, batch):
    model = tiny.model(connector)
    with torch.no_grad():  # behind a matrix that starts at zero nothing learns in the first step
        for weight in model.model.connector.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.1)
    inputs = tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=model.config.num_placeholders)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    still = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    # What comes after the feature layer does not run; the bias of keys shifts every score of a query alike.
    still = {name for name in still if not name.endswith("k_proj.bias")}
    assert still == {f"model.vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # renamed after 5.19
@pytest.mark.parametrize("vision", tiny.WITH_ROW)
def test_gradient_checkpointing_changes_no_gradient(vision):
    model = tiny.model(vision=vision).train()
    inputs = tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=model.config.num_placeholders)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)  # DINOv3 draws where its patches are said to be, while it trains
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)


# What a batch may hold


def test_the_picture_is_seen(model):
    first, second = (model(**tiny.inputs(ONE, [tiny.picture(seed)])).logits for seed in (0, 1))
    assert (first - second)[:, -1].abs().max() > 0.01


def test_rows_of_a_batch_do_not_meet(model, batch):
    logits = model(**batch).logits
    alone = [(ONE, [tiny.picture(0)]), (TWO, tiny.pictures([1, 2])), (NONE, None)]
    for row, (text, images) in enumerate(alone):
        expected = model(**tiny.inputs(text, images)).logits[0]
        torch.testing.assert_close(logits[row, : len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_images_go_to_the_prompts_in_their_order(model):
    there, back = (model(**tiny.inputs(TWO, tiny.pictures(seeds))) for seeds in ([1, 2], [2, 1]))
    swapped = back.image_hidden_states.roll(5, dims=0)
    # The same up to the order in which a product of another row sums up (threads, 1e-5 of values up to 15).
    torch.testing.assert_close(there.image_hidden_states, swapped, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(there.logits, back.logits)


def test_text_alone_needs_no_pixels(model):
    inputs = tiny.inputs([NONE, "USER: Where was it? ASSISTANT:"])
    assert "pixel_values" not in inputs
    assert model(**inputs).image_hidden_states is None
    assert greedy(model, inputs, 3).shape == (2, 3)


def test_embeddings_stand_in_for_ids(model, batch):
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    rest = {"attention_mask": batch["attention_mask"], "pixel_values": batch["pixel_values"]}
    assert torch.equal(model(inputs_embeds=embeddings, **rest).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**rest)


def test_only_the_logits_asked_for_are_made(model, batch):
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, expected[:, -2:])
    torch.testing.assert_close(model(**batch, logits_to_keep=torch.tensor([0, 3])).logits, expected[:, [0, 3]])


def test_the_head_reads_hidden_states_in_one_piece(model, batch, monkeypatch):
    """A slice of them is not, and then a matrix product copies the head's weights once a row."""
    seen, head = [], model.head
    monkeypatch.setattr(model, "head", lambda owner, hidden: (seen.append(hidden), head(owner, hidden))[1])
    model(**batch, logits_to_keep=1)
    assert len(batch["input_ids"]) > 1
    assert seen[0].is_contiguous()


@pytest.mark.parametrize(("prompt_tokens", "images"), [(3, 1), (5, 2)])
def test_image_tokens_that_do_not_fit_are_counted(model, prompt_tokens, images):
    inputs = tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=prompt_tokens)
    inputs["pixel_values"] = inputs["pixel_values"].repeat(images, 1, 1, 1)
    with pytest.raises(ValueError, match=f"hold {prompt_tokens} image tokens but the images give {5 * images} "):
        model(**inputs)


# Generation


def test_the_cache_changes_no_token(model):
    inputs = tiny.inputs([ONE, TWO, NONE], [[tiny.picture(0)], tiny.pictures([1, 2]), []], padding_side="left")
    assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))


def test_left_padding_changes_no_token(model):
    prompts = [(ONE, [tiny.picture(0)]), (TWO, tiny.pictures([1, 2])), (NONE, [])]
    texts, images = map(list, zip(*prompts, strict=True))
    together = greedy(model, tiny.inputs(texts, images, padding_side="left"))
    alone = [greedy(model, tiny.inputs(text, pictures or None)) for text, pictures in prompts]
    assert torch.equal(together, torch.cat(alone))
    assert len(together.unique()) > 3


def test_beams_and_several_answers(model):
    inputs = tiny.inputs([ONE, TWO], [[tiny.picture(0)], tiny.pictures([1, 2])], padding_side="left")
    beams = greedy(model, inputs, 4, num_beams=2, num_return_sequences=2)
    assert beams.shape == (4, 4)


# The budget


@pytest.mark.parametrize("tokens", [2, 5, 12])
def test_one_checkpoint_serves_any_budget(model, tokens):
    images = [tiny.picture(0), tiny.picture(1)]
    inputs = tiny.processor()(images, TWO, return_tensors="pt", num_visual_tokens=tokens)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2 * tokens
    assert model(**inputs).image_hidden_states.shape == (2 * tokens, model.config.text_config.hidden_size)
    own = tiny.model(connector_kwargs={**tiny.CONNECTORS["acformer"], "num_anchors": tokens - 1})
    own.load_state_dict(model.state_dict())
    own_inputs = tiny.inputs(TWO, images, num_visual_tokens=tokens)
    assert torch.equal(greedy(model, inputs), greedy(own, own_inputs))


@pytest.mark.parametrize("connector", ["mlp", "perceiver"])
def test_a_fixed_connector_refuses_another_budget(connector):
    model = tiny.model(connector)
    always = model.config.num_placeholders
    assert model(**tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=always)).image_hidden_states.shape[0] == always
    inputs = tiny.processor(always)([tiny.picture()], ONE, return_tensors="pt", num_visual_tokens=2)
    with pytest.raises(UsageError, match=f"always gives {always} tokens; it cannot give 2"):
        model(**inputs)


# Cached features, kernels, dtypes, copies, graphs


def test_features_stand_in_for_pixels(model, batch):
    expected = model(**batch).logits
    features = model.get_vision_features(batch.pop("pixel_values"))
    as_dict = {"tokens": features.tokens, "cls_attention": features.cls_attention}
    assert torch.equal(model(**batch, vision_features=features).logits, expected)
    assert torch.equal(model(**batch, vision_features=as_dict).logits, expected)
    as_dict["tokens"] = as_dict["tokens"].double()
    assert torch.equal(model(**batch, vision_features=as_dict).logits, expected)


def test_the_model_does_what_its_parts_do(model, batch):
    """eq. 3 and 6 by hand: encode, connect, put in place, read on."""
    ids, parts = batch["input_ids"], model.model
    tokens = parts.connector(model.get_vision_features(batch["pixel_values"]))
    embeddings = parts.language_model.embed_tokens(ids)
    embeddings[ids == model.config.image_token_id] = tokens.flatten(0, 1)
    states = parts.language_model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])
    assert torch.equal(model.lm_head(states.last_hidden_state), model(**batch).logits)


def test_attention_kernels_agree(model, batch, folder):
    expected = model(**batch).logits
    kernels = {"vision_config": "eager", "text_config": "eager"}
    eager = AcFormerForConditionalGeneration.from_pretrained(folder, attn_implementation=kernels)
    torch.testing.assert_close(eager(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert eager(**batch, output_attentions=True).attentions[0].shape[1] == 4
    eager.set_attn_implementation("sdpa")
    assert torch.equal(eager(**batch).logits, expected)


def test_bfloat16(model, batch, folder):
    expected = model(**batch).logits
    half = AcFormerForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    logits = half(**batch).logits
    assert logits.dtype == torch.bfloat16
    likeness = F.cosine_similarity(logits.float(), expected, dim=-1)[batch["attention_mask"].bool()]
    assert likeness.mean() > 0.98
    assert greedy(half, batch, 3).shape == (3, 3)


def test_a_copy_is_independent(model, batch):
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.model.vision_tower.parameters():
            weight.mul_(1.5)
    assert torch.equal(twin(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_compiles_into_one_graph(model, batch):
    expected = model(**batch).logits
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


# Encoders and sizes


# Every connector with an encoder of each kind (registers, no [CLS], several inputs), every encoder with one connector.
PAIRS = [("dinov2_with_registers", connector) for connector in tiny.CONNECTORS]
PAIRS += [("siglip2_vision_model", connector) for connector in tiny.CONNECTORS]
PAIRS += [(vision, "token_packer") for vision in tiny.ENCODERS]


QUICK = [("dinov2_with_registers", "acformer"), ("siglip2_vision_model", "c_abstractor"), ("vit", "token_packer")]


@pytest.mark.parametrize(("vision", "connector"), tiny.mostly_slow(sorted({*PAIRS}), *QUICK))
def test_every_encoder_and_every_connector(vision, connector, tmp_path):
    model = tiny.model(connector, vision=vision)
    config, tokens = model.config, model.config.num_placeholders
    rows, columns = model.model.connector.input_grid
    inputs = tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=tokens)
    features = model.get_vision_features(inputs["pixel_values"])
    assert features.tokens.shape == (1, config.num_vision_tokens, config.vision_config.hidden_size)
    if vision in tiny.WITH_ROW:
        assert features.cls_attention.shape == (1, 4, rows * columns)
    again = AcFormerForConditionalGeneration.from_pretrained(save(model, tmp_path))
    # Measured 0, but for `c_abstractor`: a convolution sums in an order that depends on how its weight lies in memory
    # (2.2e-6 of logits up to 2.5).
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=2e-5)
    assert torch.equal(greedy(again, inputs, 4), greedy(model, inputs, 4))


@pytest.mark.parametrize(("feature_layer", "blocks"), [(-2, 1), (-1, 2), (1, 1), (2, 2)])
def test_blocks_after_the_feature_layer_are_not_there(feature_layer, blocks):
    model = tiny.model(feature_layer=feature_layer)
    kept = {key.split("layers.")[1][0] for key in model.state_dict() if "vision_tower.encoder.layers" in key}
    assert kept == {str(block) for block in range(blocks)}
    assert model.config.vision_config.num_hidden_layers == 2


@pytest.mark.parametrize("vision", tiny.OF_ANY_SIZE)
def test_images_larger_than_the_encoder_was_trained_on(vision):
    model = tiny.model("mlp", vision=vision, image_size=24)
    assert model.config.num_placeholders == 36
    inputs = tiny.processor(36, image_size=24)([tiny.picture()], ONE, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    assert model(**inputs).image_hidden_states.shape[0] == 36


# What a connector asks of the encoder


def test_downsample_encodes_a_smaller_image():
    model = tiny.model("downsample", connector_kwargs={"num_tokens": 8})
    inputs = tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=8)
    assert model.config.num_vision_tokens == 9
    small = F.interpolate(inputs["pixel_values"], (8, 16), mode="bicubic", antialias=True)
    tower = model.model.vision_tower
    expected = tower(small, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[1]
    features = model.get_vision_features(inputs["pixel_values"])
    assert features.grid == (2, 4)
    assert torch.equal(features.tokens, expected)
    visual = model(**inputs).image_hidden_states
    assert torch.equal(visual, model.model.connector.projector(expected[:, 1:])[0])
    stored = {"tokens": features.tokens, "cls_attention": features.cls_attention}
    del inputs["pixel_values"]
    assert torch.equal(model(**inputs, vision_features=stored).image_hidden_states, visual)


def test_downsample_refuses_features_of_the_whole_image():
    model = tiny.model("downsample")
    tokens = tiny.model().get_vision_features(tiny.inputs(ONE, [tiny.picture()])["pixel_values"])
    with pytest.raises(UsageError, match=r"reads an image of 2 x 2 patches, not one of 4 x 4"):
        model.model.connector(tokens)
    with pytest.raises(UsageError, match=r"5 tokens cannot be laid out .*nearest: 4 and 6"):
        tiny.model("downsample", connector_kwargs={"num_tokens": 5})


@pytest.mark.parametrize("connector", tiny.CONNECTORS)
def test_a_blank_image_is_what_the_encoder_makes(connector):
    model = tiny.model(connector)
    inputs = tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=model.config.num_placeholders)
    made, blank = model.get_vision_features(inputs["pixel_values"]), model.model.connector.zero_features()
    assert (made.grid, made.num_prefix_tokens) == (blank.grid, blank.num_prefix_tokens)
    assert made.tokens.shape == blank.tokens.shape
    assert (made.hidden_layers is None) == (blank.hidden_layers is None)
    assert made.hidden_layers is None or made.hidden_layers.shape == blank.hidden_layers.shape
    rest = model.model.connector.zero_loss()
    assert rest == 0
    rest.backward()
    assert all(weight.grad is not None for weight in model.model.connector.parameters())


def test_levels_above_the_feature_layer_are_told_when_the_model_is_built():
    with pytest.raises(UsageError, match=r"hidden layer 2 is block 2 of the encoder, which ends at block 1"):
        tiny.model("token_packer", connector_kwargs={**tiny.CONNECTORS["token_packer"], "hidden_layers": [2]})


def test_the_bare_model_leaves_the_head_out(folder, batch, model):
    bare = AcFormerModel.from_pretrained(folder)
    assert torch.equal(model.lm_head(bare(**batch).last_hidden_state), model(**batch).logits)


# Checkpoints


IN_A_FRESH_PROCESS = """
import sys, torch
from acformer.hf import AcFormerForConditionalGeneration
for folder in sys.argv[1:]:
    model = AcFormerForConditionalGeneration.from_pretrained(folder)
    torch.save(model(**torch.load(f"{folder}/inputs.pt")).logits.detach(), f"{folder}/logits.pt")
"""


@pytest.mark.slow
def test_a_checkpoint_means_the_same_in_another_process(tmp_path):
    expected = {}
    for connector in tiny.CONNECTORS:
        model = tiny.model(connector)
        inputs = tiny.inputs(ONE, [tiny.picture()], num_visual_tokens=model.config.num_placeholders)
        torch.save(dict(inputs), save(model, tmp_path / connector) / "inputs.pt")
        expected[connector] = model(**inputs).logits.detach()
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS, *(str(tmp_path / name) for name in tiny.CONNECTORS)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command, capture_output=True, check=True, env={**os.environ, **threads})
    for connector, logits in expected.items():
        found = torch.load(tmp_path / connector / "logits.pt")
        # A mapped file's weights lie at other addresses, where a depth-wise convolution takes another kernel: 3e-6.
        torch.testing.assert_close(found, logits, rtol=0, atol=2e-5)


def spoil(folder: Path, how: str) -> str:
    """Damage a checkpoint; the key that an error must name."""
    weights = load_file(folder / "model.safetensors")
    key = "model.connector.stack.norm.weight"
    match how:
        case "missing":
            del weights[key]
        case "unexpected":
            key = "model.connector.stack.norm.weights"
            weights[key] = torch.zeros(3)
        case "of another shape":
            weights[key] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return key


@pytest.mark.parametrize("how", ["missing", "unexpected", "of another shape"])
def test_weights_that_do_not_fit_the_config_are_refused(folder, how):
    key = spoil(folder, how)
    with pytest.raises(CheckpointError, match=rf"1 weights {how} \(first: .*{key}"):
        AcFormerForConditionalGeneration.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=key):
        AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("how", ["missing", "unexpected"])
def test_wrong_weights_load_when_asked_to(folder, how, batch):
    spoil(folder, how)
    model = AcFormerForConditionalGeneration.from_pretrained(folder, strict=False)
    assert model(**batch).logits.isfinite().all()


def test_weights_of_another_shape_load_when_asked_to(folder, batch):
    spoil(folder, "of another shape")
    model = AcFormerForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("connector", tiny.CONNECTORS)
def test_new_weights_are_initialised(connector):
    """What `build_model` leans on: a connector that no checkpoint holds starts as if built from its config."""
    torch.manual_seed(0)
    model = AcFormerForConditionalGeneration.from_pretrained(
        None, config=tiny.config(connector), state_dict={}, strict=False
    )
    torch.manual_seed(1)
    built = build_connector(connector, model.config.geometry, **model.config.connector_kwargs).state_dict()
    assert model.model.connector.state_dict().keys() == built.keys()
    for name, value in model.model.connector.state_dict().items():
        if len(built[name].unique()) == 1:
            assert torch.equal(value, built[name]), name
        elif value.numel() >= 256:  # of so many samples, standard deviations of two draws differ by 6 % at 1 sigma
            assert value.std().item() == pytest.approx(built[name].std().item(), rel=0.25), name


def test_auto_classes(folder, batch, model):
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, AcFormerConfig)
    assert {**config.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    again = AutoModelForImageTextToText.from_pretrained(folder)
    assert isinstance(again, AcFormerForConditionalGeneration)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor, AcFormerProcessor)
    assert processor.num_placeholders == config.num_placeholders


def test_pipeline(folder, model):
    content = [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    ask = pipeline("image-text-to-text", model=str(folder))
    said = ask(text=messages, max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"]
    inputs = tiny.processor().apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said == tiny.tokenizer().decode(expected, skip_special_tokens=True)


def test_tied_embeddings_are_written_once(tmp_path, batch):
    config = tiny.config()
    config.text_config.tie_word_embeddings = True
    config = AcFormerConfig.from_dict(config.to_dict())
    torch.manual_seed(0)
    model = AcFormerForConditionalGeneration(config).eval()
    assert "lm_head.weight" not in load_file(save(model, tmp_path) / "model.safetensors")
    again = AcFormerForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert torch.equal(again(**batch).logits, model(**batch).logits)
