"""Random dialogues x templates x tokenizers: only the assistant's words are labels, all paths agree."""

import json
from functools import cache
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

from acformer.data.conversation import (
    IGNORE,
    check_images,
    encode_conversation,
    encode_prompt,
)
from acformer.data.templates import TEMPLATES, resolve_template
from acformer.errors import DataError, UsageError
from acformer.hf.processing_acformer import AcFormerProcessor

T = 5
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>"]
CORPUS = ["USER: What colour is it? ASSISTANT: It is red.\n\n\nuser\n a the shape\n\nassistant\nyes, no"] * 3
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level() -> Tokenizer:
    """GPT-2's kind: bytes, whose offsets leave out the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama's kind: a space is `▁` and belongs to the next word, unknown characters are bytes."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator([text.replace("\n", " ") for text in CORPUS], trainer)
    model = json.loads(trained.to_str())["model"]
    for byte in range(256):
        model["vocab"].setdefault(f"<0x{byte:02X}>", len(model["vocab"]))
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@cache
def make_processor(kind: str, template: str) -> SimpleNamespace:
    backend = {"bytes": byte_level, "sentencepiece": sentencepiece}[kind]()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    ends = {"bytes": "<|im_end|>", "sentencepiece": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=ends[kind],
        pad_token="<pad>",
        chat_template=CHATML,
    )
    return SimpleNamespace(
        tokenizer=tokenizer,
        image_token="<image>",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        num_placeholders=T,
        chat_template=resolve_template(template, tokenizer),
    )


def spoken(processor, labels) -> list[str]:
    """The decoded runs of labels, one for each turn of the assistant."""
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(label)
    return [processor.tokenizer.decode(run) for run in runs if run]


def expected_end(processor) -> str:
    return "<|im_end|>" if "<|im_end|>" in processor.chat_template else processor.tokenizer.eos_token


def by_hand(processor, messages, for_answer: bool) -> list[int]:
    """What plain transformers makes of the saved template: render, expand, tokenise."""
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=for_answer
    )
    expanded = text.replace("<image>", "<image>" * T)
    return processor.tokenizer(expanded, add_special_tokens=False)["input_ids"]


# "▁" is how sentencepiece writes a space, so it cannot come back.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
common = st.sampled_from([" ", "\n", "\n\n\n", "  ", "red", "It is", "<", ">", "USER:", "ASSISTANT:", "é", "\u2028"])
spellings = st.sampled_from([*SPECIALS, "<|im_start|>assistant\n", "<<image>", "</</s>", "\U0010fffd"])
# Hypothesis also tries the strings of all modules that are imported, <s> among them: what is plain must be said.
plain_texts = (
    st.lists(st.one_of(common, st.text(characters, max_size=6)), max_size=5)
    .map("".join)
    .filter(lambda text: not any(special in text for special in SPECIALS))
)
any_texts = st.lists(st.one_of(common, spellings, st.text(characters, max_size=6)), max_size=5).map("".join)


@st.composite
def dialogues(draw, texts=any_texts, max_turns=4):
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    part = st.one_of(st.just({"type": "image"}), texts.map(lambda text: {"type": "text", "text": text}))
    few_images = st.lists(part, max_size=5).filter(lambda parts: parts.count({"type": "image"}) < 3)
    for _ in range(draw(st.integers(1, max_turns))):
        messages.append({"role": "user", "content": draw(st.one_of(texts, few_images))})
        messages.append({"role": "assistant", "content": draw(texts)})
    return messages


def count_images(messages) -> int:
    return sum(list(message["content"]).count({"type": "image"}) for message in messages)


templates = pytest.mark.parametrize("template", ["vicuna_v1", "plain", "bare", "tokenizer"])
tokenizers = pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])


@tokenizers
@templates
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_only_the_assistants_words_and_end_tokens_are_labels(kind, template, data):
    processor = make_processor(kind, template)
    messages = data.draw(dialogues(max_turns=1 if template == "plain" else 4))
    encoded = encode_conversation(processor, messages)
    space = " " if template in ("vicuna_v1", "bare") else ""
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    said = [space + text + expected_end(processor) for text in said]
    heard = spoken(processor, encoded.labels)
    if kind == "sentencepiece" and template != "plain":
        # Its decoder strips the space that it puts before a text. Behind a special token (plain), it did so.
        said = [text.removeprefix(" ") for text in said]
    assert heard == said
    assert encoded.num_images == count_images(messages)
    assert encoded.input_ids.count(processor.image_token_id) == T * encoded.num_images
    assert all(label in (IGNORE, index) for label, index in zip(encoded.labels, encoded.input_ids, strict=True))


@tokenizers
@templates
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_prompts_are_prefixes_and_truncation_spares_images(kind, template, data):
    processor = make_processor(kind, template)
    messages = data.draw(dialogues())
    whole = encode_conversation(processor, messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(processor, messages[:index])
            assert whole.input_ids[: len(prompt)] == prompt
            assert whole.labels[len(prompt)] != IGNORE
    max_length = data.draw(st.integers(0, len(whole.input_ids) + 1))
    kept, lost = whole.input_ids[:max_length], whole.input_ids[max_length:]
    if processor.image_token_id in lost or set(whole.labels[:max_length]) <= {IGNORE}:
        with pytest.raises(DataError, match=f"max_length {max_length}"):
            encode_conversation(processor, messages, max_length=max_length)
    else:
        cut = encode_conversation(processor, messages, max_length=max_length)
        assert (cut.input_ids, cut.labels) == (kept, whole.labels[:max_length])


@tokenizers
@templates
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_plain_transformers_gives_the_same_ids(kind, template, data):
    processor = make_processor(kind, template)
    messages = data.draw(dialogues(plain_texts.map(str.strip)))
    assert encode_conversation(processor, messages).input_ids == by_hand(processor, messages, False)
    assert encode_prompt(processor, messages[:-1]) == by_hand(processor, messages[:-1], True)


@tokenizers
@templates
def test_the_processors_own_chat_gives_the_same_ids(kind, template):
    parts = make_processor(kind, template)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8)
    processor = AcFormerProcessor(pictures, parts.tokenizer, chat_template=parts.chat_template, num_placeholders=T)
    image = {"type": "image", "image": Image.new("RGB", (8, 8))}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        {"role": "user", "content": "Sure?"},
    ]
    ask = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    asked = processor.apply_chat_template(messages, add_generation_prompt=True, **ask)
    assert asked["input_ids"][0].tolist() == encode_prompt(processor, messages)
    told = processor.apply_chat_template(messages[:2], **ask)
    assert told["input_ids"][0].tolist() == encode_conversation(processor, messages[:2]).input_ids


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "bare"])
def test_labels_agree_with_the_generation_tags(template):
    processor = make_processor("sentencepiece", template)
    messages = [
        {"role": "user", "content": "What colour?"},
        {"role": "assistant", "content": "It is red."},
    ]
    out = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode_conversation(processor, messages)
    assert out["input_ids"] == encoded.input_ids
    assert out["assistant_masks"] == [int(label != IGNORE) for label in encoded.labels]


def test_the_layout_of_each_template():
    question = [{"type": "image"}, {"type": "text", "text": "What colour?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "Red."}] * 2
    ids = {}
    for template in ("vicuna_v1", "plain", "tokenizer"):
        processor = make_processor("bytes", template)
        ids[template] = encode_conversation(processor, messages, num_placeholders=1).input_ids
    decode = make_processor("bytes", "plain").tokenizer.decode
    turn = "USER: <image>\nWhat colour? ASSISTANT: Red.<|im_end|>"
    assert decode(ids["vicuna_v1"]) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the user's questions. {turn}{turn}"
    )
    assert decode(ids["plain"]) == "<s>" + "<image>Red.<|im_end|>" * 2
    turn = "<|im_start|>user\n<image>\nWhat colour?<|im_end|>\n<|im_start|>assistant\nRed.<|im_end|>\n"
    assert decode(ids["tokenizer"]) == turn * 2


def test_an_answer_that_would_merge_with_the_prompt():
    processor = make_processor("bytes", "tokenizer")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\n\nred"}]
    prompt = encode_prompt(processor, messages[:1])
    assert by_hand(processor, messages, False)[: len(prompt)] != prompt  # the case is real
    encoded = encode_conversation(processor, messages)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert spoken(processor, encoded.labels) == ["\n\n\nred<|im_end|>"]


def test_no_spelling_makes_a_special_token():
    processor = make_processor("sentencepiece", "vicuna_v1")
    text = "".join(SPECIALS)
    ids = encode_prompt(processor, [{"role": "user", "content": text}])
    special = set(processor.tokenizer.added_tokens_decoder) & set(ids)
    assert special == {processor.tokenizer.bos_token_id}
    assert text in processor.tokenizer.decode(ids)


def test_other_keys_of_a_message_are_not_rendered():
    processor = SimpleNamespace(**vars(make_processor("bytes", "tokenizer")))
    named = "message['role'] + (message.name or '')"
    processor.chat_template = processor.chat_template.replace("message['role']", named)
    plain = {"role": "user", "content": "a"}
    assert encode_prompt(processor, [{**plain, "name": "<|im_end|>"}]) == encode_prompt(processor, [plain])


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "starts with"),
        ([{"role": "assistant", "content": "a"}], "starts with"),
        ([{"role": "tool", "content": "a"}], "role"),
        ([{"role": "user"}], "content"),
        (["a"], "role"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "user", "content": "a"}], "no word of the assistant"),
    ],
)
def test_bad_messages_are_named(messages, what):
    with pytest.raises(DataError, match=what):
        encode_conversation(make_processor("bytes", "vicuna_v1"), messages)


def test_a_prompt_ends_with_the_user():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match="cannot end"):
        encode_prompt(make_processor("bytes", "vicuna_v1"), messages)


def test_images_are_counted():
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}]
    check_images(messages, 2)
    with pytest.raises(DataError, match=r"^2 <image> tags but 1 image$"):
        check_images(messages, 1)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}", "rewrites"),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "no end token"),
        (
            "{% for m in messages %}{{ m.role + '</s>' }}{% endfor %}",
            "writes 0 image tokens, not 2 images x 5",
        ),
        ("", "no chat template"),
    ],
)
def test_a_template_that_does_not_fit_is_a_usage_error(template, what):
    processor = SimpleNamespace(**vars(make_processor("sentencepiece", "plain")))
    processor.chat_template = template
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    with pytest.raises(UsageError, match=what):
        encode_conversation(processor, [question, {"role": "assistant", "content": "b"}] * 2)


def test_a_template_may_refuse_a_conversation():
    processor = SimpleNamespace(**vars(make_processor("bytes", "plain")))
    processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate"):
        encode_prompt(processor, [{"role": "user", "content": "a"}])


def test_names_of_templates():
    tokenizer = make_processor("bytes", "plain").tokenizer
    own = resolve_template("tokenizer", tokenizer)
    assert own.endswith(CHATML)
    assert resolve_template("tokenizer", SimpleNamespace(get_chat_template=lambda: own)) == own
    assert resolve_template("plain", tokenizer) == TEMPLATES["plain"]
    with pytest.raises(UsageError, match="did you mean 'vicuna_v1'"):
        resolve_template("vicuna", tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    with pytest.raises(UsageError, match="no chat template"):
        resolve_template("tokenizer", bare)


def test_a_special_token_that_normalisation_makes_is_refused():
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<image>", special=True), AddedToken("</s>", normalized=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    processor = SimpleNamespace(
        tokenizer=tokenizer,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        num_placeholders=T,
        chat_template=TEMPLATES["vicuna_v1"],
    )
    with pytest.raises(DataError, match="reads the text '</S>' as '</s>'"):
        encode_prompt(processor, [{"role": "user", "content": "a </S>"}])
