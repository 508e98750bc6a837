"""What a generation costs, by counts, and the ways to make it cheaper: image tokens given, static cache, compiled.

And the ways to start one: a batch as it comes from the processor, embeddings, a cache that holds the pictures.
"""

import pytest
import tiny
import torch
import transformers
from packaging.version import Version
from test_fusion import GATED, opened
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, pipeline

ONE = "USER: <image>\nWhat? ASSISTANT:"
TWO = "USER: <image> and <image>\nWhich is it? ASSISTANT:"
NONE = "USER: Who? ASSISTANT:"
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


@pytest.fixture(params=["concat", GATED])
def model(request):
    return tiny.model() if request.param == "concat" else opened()


def prompts(model):
    """Three rows with one, two and no images, padded on the left."""
    processor = tiny.processor(model.config.num_placeholders, fusion=model.config.fusion)
    images = [[tiny.picture(0)], tiny.pictures([1, 2]), []]
    return processor(images, [ONE, TWO, NONE], return_tensors="pt", padding=True, padding_side="left")


def test_the_batch_does_not_change_the_answer(model):
    """With nothing said about padding: of a call, and of transformers' pipeline."""
    processor = tiny.processor(model.config.num_placeholders, fusion=model.config.fusion)
    texts, images = [ONE, TWO, NONE], [[tiny.picture(0)], tiny.pictures([1, 2]), []]
    inputs = processor(images, texts, return_tensors="pt", padding=True)
    together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    for text, pictures, said in zip(texts, images, together, strict=True):
        alone = processor(pictures or None, text, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :], said)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": tiny.picture()}, {"type": "text", "text": text}]}]
        for text in ("What?", "Which colour is the thing on the left?")
    ]
    answers = pipeline("image-text-to-text", model=model, processor=processor)
    one_by_one, in_pairs = (
        answers(text=chats, batch_size=size, return_full_text=False, generate_kwargs=GREEDY) for size in (1, 2)
    )
    assert in_pairs == one_by_one
    assert in_pairs[0] != in_pairs[1]


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_stand_in_for_ids(model, beams):
    inputs, options = prompts(model), {**GREEDY, "num_beams": beams}
    length = inputs["input_ids"].shape[1]
    said = model.generate(**inputs, **options)[:, length:]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **inputs, **options), said)
    without = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with pytest.raises(ValueError, match="the images give 0"):
        model.generate(**without, **options)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_dialogue_goes_on_from_the_cache(name):
    """The pictures that it holds are not needed again; a new one is. Either name, whatever transformers calls it."""
    model = tiny.model()
    inputs, cache = tiny.inputs(TWO, tiny.pictures([1, 2])), DynamicCache()
    first = model.generate(**inputs, **GREEDY, **{name: cache})
    ids = torch.cat([first, tiny.tokenizer()("And?", return_tensors="pt")["input_ids"]], 1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    said = model.generate(**longer, pixel_values=inputs["pixel_values"], **GREEDY)
    ids = torch.cat([ids, torch.tensor([[model.config.image_token_id]])], 1)
    with pytest.raises(ValueError, match="hold 1 image tokens but the images give 0"):
        model.generate(ids, attention_mask=torch.ones_like(ids), **{name: cache}, **GREEDY)
    assert torch.equal(model.generate(**longer, **{name: cache}, **GREEDY), said)


def test_a_gated_model_needs_the_pictures_beside_the_cache():
    model, cache = opened(), DynamicCache()
    inputs = tiny.processor(1, fusion=GATED)(tiny.pictures([1, 2]), TWO, return_tensors="pt")
    ids = model.generate(**inputs, **GREEDY, past_key_values=cache)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match="hold 2 image tokens but the images give 0"):
        model.generate(**longer, past_key_values=cache, **GREEDY)
    said = model.generate(**longer, pixel_values=inputs["pixel_values"], **GREEDY)
    again = model.generate(**longer, pixel_values=inputs["pixel_values"], past_key_values=cache, **GREEDY)
    assert torch.equal(again, said)


def tokens_for(model, inputs) -> list[torch.Tensor]:
    with torch.no_grad():
        return model.get_image_features(inputs.pop("pixel_values")).pooler_output


def test_image_tokens_stand_in_for_pixels(model):
    inputs = prompts(model)
    said = model.generate(**inputs, **GREEDY)
    tokens = tokens_for(model, inputs)
    assert torch.equal(model.generate(**inputs, visual_tokens=tokens, **GREEDY), said)
    stacked = torch.stack(tokens)
    assert torch.equal(model.generate(**inputs, visual_tokens=stacked, **GREEDY), said)
    with pytest.raises(ValueError, match="the images give"):
        model.generate(**inputs, visual_tokens=tokens[:2], **GREEDY)
    with pytest.raises(ValueError, match="the images give 0"):
        model.generate(**inputs, visual_tokens=[], **GREEDY)


def test_beams_read_the_image_tokens_of_their_row(model):
    if model.config.fusion == "concat" and Version(transformers.__version__) < Version("5.19"):
        pytest.skip("transformers does not repeat them for its beams before 5.19 (the counts are refused)")
    inputs, beams = prompts(model), {"num_beams": 2, "num_return_sequences": 2, **GREEDY}
    said = model.generate(**inputs, **beams)
    assert torch.equal(model.generate(**inputs, visual_tokens=tokens_for(model, inputs), **beams), said)


def test_no_images_are_an_empty_list(model):
    inputs = tiny.inputs(NONE)
    assert torch.equal(model.generate(**inputs, visual_tokens=[], **GREEDY), model.generate(**inputs, **GREEDY))


def test_images_cost_one_encoder_pass_and_t_places_of_the_prompt(model):
    """Then each further token is a step of one position, whatever the images were."""
    inputs, ran = prompts(model), {"encoder": [], "connector": [], "language model": []}
    parts = model.model
    parts.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: ran["encoder"].append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    parts.connector.register_forward_hook(lambda module, args, output: ran["connector"].append(output.shape[1]))
    parts.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: ran["language model"].append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate(**inputs, **GREEDY)
    text = tiny.tokenizer()(TWO.replace("<image>", ""))["input_ids"]
    places = 2 * (5 if model.config.fusion == "concat" else 1)
    assert ran == {"encoder": [3], "connector": [5], "language model": [inputs["input_ids"].shape[1], *[1] * 7]}
    assert abs(inputs["input_ids"].shape[1] - places - len(text)) <= 2  # spaces around an image may join


def test_a_static_cache_changes_no_token(model):
    inputs = prompts(model)
    said = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, cache_implementation="static", **GREEDY), said)
    tokens = tokens_for(model, inputs)
    assert torch.equal(model.generate(**inputs, visual_tokens=tokens, cache_implementation="static", **GREEDY), said)
    assert len(said[:, -8:].unique()) > 3


def test_the_decoding_step_is_one_graph_for_all_steps(model):
    """Without a break, and not compiled anew as the answer grows."""
    inputs = prompts(model)
    said = model.generate(**inputs, **GREEDY)
    compiled = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compiled._compile_all_devices = True  # generate compiles on accelerators alone, unless told
    torch.compiler.reset()
    counters.clear()
    again = model.generate(**inputs, cache_implementation="static", compile_config=compiled, **GREEDY)
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(again, said)
