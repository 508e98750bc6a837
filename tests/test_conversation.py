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

from acformer.data.chat_format import PRIVATE_USE, check_template
from acformer.data.conversation import (
    IGNORE,
    check_images,
    encode_conversation,
    encode_prompt,
    end_tokens,
)
from acformer.data.rendering import render
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
    rendered = processor.apply_chat_template(messages[:2], **ask)
    assert rendered["input_ids"][0].tolist() == encode_conversation(processor, messages[:2]).input_ids


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
            "{% for m in messages %}{{ (m.role if m.role == 'user' else m.content) + '</s>' }}{% endfor %}",
            "writes 0 image tokens for one image",
        ),
        (
            "{% for m in messages %}{{ m.content[:3] + '</s>' }}{% endfor %}",
            "changes what the assistant says",
        ),
        ("{% for m in messages %}{{ m.content + '</s>' }}", "is not one: "),
        ("{% for m in messages %}{{ m.content + ends_with }}{% endfor %}", "'ends_with' is undefined"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "TypeError: can only concatenate"),
        ("{% macro all(x) %}{{ all(x) }}{% endmacro %}{{ all(1) }}", "RecursionError"),
        ("", "no chat template"),
    ],
)
def test_a_template_that_does_not_fit_is_a_usage_error(template, what):
    processor = SimpleNamespace(**vars(make_processor("sentencepiece", "plain")))
    processor.chat_template = template
    with pytest.raises(UsageError, match=what) as caught:
        check_template(processor)
    assert "\n" not in str(caught.value)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
    with pytest.raises(UsageError, match=what):
        encode_conversation(processor, [question, {"role": "assistant", "content": "b"}] * 2)


ENDLESS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "what is written": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "one value": "{{ 'x' * 10**10 }}",
    "a list": "{{ ([1] * 10**10) | length }}",
    "a power": "{{ (2**60) ** (2**60) }}",
    "twice itself": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "joined": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "replaced": (
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}"
    ),
    "a block": (
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = x %}{% endfor %}"
    ),
    "a method": "{{ 'x'.ljust(10**10) }}",
    "a filter": "{{ 'x' | center(10**10) }}",
    "a field of %": "{{ '%9999999999d' % 3 }}",
    "a field of format": "{{ '{:>9999999999}'.format('a') }}",
    "a field of the filter": "{{ '%9999999999d' | format(1) }}",
}


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_without_end_is_stopped(template, monkeypatch):
    monkeypatch.setattr("acformer.data.rendering.SECONDS", 0.2)
    processor = SimpleNamespace(**vars(make_processor("bytes", "plain")))
    processor.chat_template = template
    with pytest.raises(UsageError, match=r"takes longer than|makes a text of more than") as caught:
        check_template(processor)
    assert "\n" not in str(caught.value)


@given(st.lists(st.sampled_from(["a", " ", "\n", "<s>"]), max_size=3).map("".join))
def test_the_limits_change_no_text(content):
    """Of a template that uses what they watch: loops, macros, joins, filters, calls, formats, blocks."""
    template = (
        "{% macro say(x) %}{{ x ~ '!' }}{% endmacro %}{% set all = namespace(n=0) %}"
        "{% for m in messages if m.content %}{% set all.n = all.n + 1 %}{{ loop.index }}{{ loop.last }}"
        "{% set block %}{{ m.content | trim }}{% endset %}{{ say(block) | upper }}{{ '%s' % m.role }}"
        "{{ '{:>4}'.format(m.role) }}{{ m.content.split('a') | join('-') }}{{ [1] * 3 }}{{ 2 ** 3 }}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% if loop.index > 3 %}{% break %}{% endif %}"
        "{% endfor %}{{ all.n }}{{ eos_token }}{{ add_generation_prompt }}{{ tools is none }}"
    )
    tokenizer = make_processor("bytes", "plain").tokenizer
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}] * 3
    ours = render(tokenizer, template, chat, for_answer=True)
    assert ours == tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=True
    )


def test_a_template_may_refuse_a_conversation():
    processor = SimpleNamespace(**vars(make_processor("bytes", "plain")))
    processor.chat_template = CHATML.replace(
        "{% for", "{% if messages | length > 3 %}{{ raise_exception('two turns only') }}{% endif %}{% for", 1
    )
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert encode_conversation(processor, turn)
    with pytest.raises(DataError, match="refuses the conversation: two turns only"):
        encode_conversation(processor, turn * 2)
    processor.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UsageError, match="refuses the conversation: never"):
        check_template(processor)


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


HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
THINKING = HEADER + "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
CHATML_START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
FAMILIES = {
    # family: template (between the loop over the messages and the generation prompt), eos_token, ends of the turns
    "llama-2": (
        "{{ ' [INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}",
        "</s>",
    ),
    "llama-3": ("{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot_id|>' }}", "</s>", "<|eot_id|>"),
    "llama-3.1": ("{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + '<|eot_id|>' }}", "<|eot_id|>"),
    "gemma": (
        "{{ '<|h|>' + m.role.replace('assistant', 'model') + '\n' + m.content | trim + '<end_of_turn>\n' }}",
        "</s>",
        "<end_of_turn>",
    ),
    "phi-3": ("{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}", "</s>", "<|end|>"),
    "qwen2.5": (HEADER + "{{ m.content + '<|im_end|>\n' }}", "<|im_end|>"),
    "qwen2.5-base": (HEADER + "{{ m.content + '<|im_end|>\n' }}", "</s>", "<|im_end|>"),
    "qwen3": (THINKING + "{{ m.content + '<|im_end|>\n' }}", "<|im_end|>"),
    "qwen3-thinking": (THINKING + "{{ m.content + '<|im_end|>\n' }}", "<|im_end|>"),
    "qwen3-like": (THINKING + "{{ m.content + '<|im_end|>\n' }}", "</s>", "<|im_end|>"),
    "mistral": ("{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}", "</s>"),
    "deepseek": ("{{ '<|u|>' + m.content if m.role == 'user' else '<|a|>' + m.content + eos_token }}", "</s>"),
    "command-r": ("{{ '<|h|><|' + m.role + '|>' + m.content.strip() + '<|end|>' }}", "<|end|>"),
    "gpt-oss": (
        "{{ '<|h|>' + m.role + ('<|channel|>final' if m.role == 'assistant' else '') + '<|/h|>' + m.content }}"
        "{{ '<|end|>' if add_generation_prompt or not loop.last else '<|return|>' }}",
        "</s>",
        "<|end|>",
        "<|return|>",
    ),
}
PROMPTS = {
    "llama-3": "{{ '<|h|>assistant<|/h|>\n\n' }}",  # whether it is asked for or not
    "llama-3.1": "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}",
    "gemma": "{% if add_generation_prompt %}{{ '<|h|>model\n' }}{% endif %}",
    "phi-3": "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "qwen2.5": CHATML_START + "{% endif %}",
    "qwen2.5-base": CHATML_START + "{% endif %}",
    "qwen3": CHATML_START
    + "{% if enable_thinking is defined and not enable_thinking %}"
    + "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
    "qwen3-thinking": CHATML_START + "{{ '<think>\n' }}{% endif %}",
    "qwen3-like": CHATML_START + "{% endif %}",
    "deepseek": "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}",
    "command-r": "{% if add_generation_prompt %}{{ '<|h|><|assistant|>' }}{% endif %}",
    "gpt-oss": "{% if add_generation_prompt %}{{ '<|h|>assistant' }}{% endif %}",
}
MORE_SPECIALS = ["<|h|>", "<|/h|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|u|>", "<|a|>"]
MORE_SPECIALS += ["<|user|>", "<|assistant|>", "<|channel|>", "[INST]", "[/INST]"]


@cache
def family_processor(family: str, kind: str = "bytes") -> SimpleNamespace:
    backend = {"bytes": byte_level, "sentencepiece": sentencepiece}[kind]()
    backend.add_special_tokens([AddedToken(token, special=True) for token in [*SPECIALS, *MORE_SPECIALS]])
    backend.add_tokens(["<think>", "</think>"])
    loop, eos, *_ = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<pad>")
    tokenizer.chat_template = f"{{% for m in messages %}}{loop}{{% endfor %}}{PROMPTS.get(family, '')}"
    return SimpleNamespace(
        tokenizer=tokenizer,
        image_token="<image>",
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        num_placeholders=T,
        chat_template=resolve_template("tokenizer", tokenizer),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learnt_as_the_end_is_what_generation_stops_at(family):
    """In each turn of a dialogue: the words, then the end token; the prompt of the last holds all before its words."""
    processor = family_processor(family)
    _, eos, *ends = FAMILIES[family]
    check_template(processor)
    assert set(processor.tokenizer.convert_ids_to_tokens(end_tokens(processor))) == {eos, *ends}
    question = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    encoded = encode_conversation(processor, messages)
    first, last = spoken(processor, encoded.labels)
    ends = ends or [eos]
    tail = " " if family == "llama-2" else ""
    assert (first, last) == (f"{tail}Red.{ends[0]}", f"{tail}Yes.{ends[-1]}")
    prompt = encode_prompt(processor, messages[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[len(prompt)] != IGNORE
    alone = encode_conversation(processor, messages[:2])
    assert spoken(processor, alone.labels) == [f"{tail}Red.{ends[-1]}"]


@pytest.mark.parametrize("family", ["qwen3", "qwen3-thinking", "qwen3-like"])
def test_thinking_is_the_templates_to_write(family):
    """The empty block stands in the prompt, also in the one that transformers makes of the saved template."""
    processor = family_processor(family)
    question = {"role": "user", "content": "What?"}
    prompt = processor.tokenizer.decode(encode_prompt(processor, [question]))
    assert prompt == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert by_hand(processor, [question], True) == encode_prompt(processor, [question])
    asked = processor.tokenizer.apply_chat_template(
        [question],
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert asked == prompt


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("family", ["llama-3", "gemma", "phi-3", "qwen3", "qwen3-like", "gpt-oss"])
@settings(max_examples=15)
@given(data=st.data())
def test_templates_that_treat_their_last_turn_in_another_way(family, kind, data):
    """Each answer is learnt as the template writes it, and the last one from its prompt on."""
    processor = family_processor(family, kind)
    messages = data.draw(dialogues(max_turns=3))
    encoded = encode_conversation(processor, messages)
    prompt = encode_prompt(processor, messages[:-1])
    assert encoded.input_ids[: len(prompt)] == prompt
    heard = ["".join(answer.split()) for answer in spoken(processor, encoded.labels)]  # some templates trim
    _, eos, *ends = FAMILIES[family]
    ends = ends or [eos]
    answers = ["".join(m["content"].split()) for m in messages if m["role"] == "assistant"]
    assert heard == [f"{answer}{ends[0]}" for answer in answers[:-1]] + [f"{answers[-1]}{ends[-1]}"]


def test_a_dialogue_costs_what_its_turns_cost():
    """By counts: the chat is rendered three times, the examples aside, and tokenised once or twice."""
    processor, tokenizer = SimpleNamespace(**vars(make_processor("bytes", "tokenizer"))), Counting()
    tokenizer.inner = processor.tokenizer
    processor.tokenizer = tokenizer
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\n\nb"}]
    check_template(processor)
    for times in (1, 50):
        tokenizer.rendered = tokenizer.tokenised = 0
        encode_conversation(processor, turns * times)
        assert (tokenizer.rendered, tokenizer.tokenised) == (1 + 3, 2)


class Counting:
    """A tokenizer that counts how often it is asked for what renderings need, and how often it tokenises."""

    def __len__(self):
        return len(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **kwargs):
        self.tokenised += 1
        return self.inner(*args, **kwargs)

    @property
    def special_tokens_map(self):
        self.rendered += 1
        return self.inner.special_tokens_map


def test_a_text_of_all_private_use_characters():
    """Three of them are needed; a text that leaves them is read as it is."""
    processor = make_processor("bytes", "plain")
    every = "".join(map(chr, PRIVATE_USE))
    answer = {"role": "assistant", "content": "b"}
    with pytest.raises(DataError, match="every private-use character"):
        encode_conversation(processor, [{"role": "user", "content": every}, answer])
    assert encode_conversation(processor, [{"role": "user", "content": every[3:]}, answer])
