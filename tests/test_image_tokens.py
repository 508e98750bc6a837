"""Kept image tokens: the same answers as without, each picture encoded once, and what a key must tell apart."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from test_fusion import GATED, opened

from acformer.commands.ask import split_words
from acformer.data.samples import Sample
from acformer.errors import DataError, ImageError, UsageError
from acformer.evaluate.generate import answer, ask, converse, prompt_inputs
from acformer.hf.visual_token_cache import VisualTokenCache
from acformer.images import load_image

GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


@dataclass(frozen=True)
class Pins:
    """An edit: these patches come before all others."""

    patches: tuple[int, ...]

    def __call__(self, features):
        scores = features.cls_attention.clone()
        scores[..., list(self.patches)] += 2
        return features._replace(cls_attention=scores)


@pytest.fixture(params=["concat", GATED])
def parts(request):
    if request.param == "concat":
        return tiny.model(), tiny.processor()
    return opened(), tiny.processor(1, fusion=GATED)


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(4)]
    for seed, path in enumerate(paths):
        tiny.picture(seed).save(path)
    return paths


@pytest.fixture
def runs(parts):
    """How many pictures each pass of encoder and connector had."""
    counts = {"encoder": [], "connector": []}
    model = parts[0].model
    model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: counts["encoder"].append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    model.connector.register_forward_hook(lambda module, args, output: counts["connector"].append(len(output)))
    return counts


def question(key, *images, words="what?"):
    parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": words}]
    return Sample(key, ({"role": "user", "content": parts},), images)


def without(parts, messages, images, budget=None, tokens=8) -> str:
    """An answer of the model alone, from pixels."""
    model, processor = parts
    inputs = prompt_inputs(processor, [messages], images, num_visual_tokens=budget)
    ids = model.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=processor.tokenizer.eos_token_id
    )
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("budget", [None, 3])
def test_answers_are_those_of_the_model_alone_and_each_picture_runs_once(parts, pictures, runs, budget):
    a, b, c, _ = pictures
    samples = [
        question("0", a),
        question("1", b, words="how many?"),
        question("2", a, b, words="which?"),
        question("3", words="who?"),
        question("4", c, a),
        question("5", a, words="where?"),
    ]
    options = {"num_visual_tokens": budget, "max_new_tokens": 8, "progress": False}
    for batch_size in (1, 2, 6):
        for counts in runs.values():
            counts.clear()
        said = list(answer(*parts, samples, batch_size=batch_size, **options))
        assert sum(runs["encoder"]) == sum(runs["connector"]) == 3
        assert said == [without(parts, sample.messages, sample.images, budget) for sample in samples]
    assert len(set(said)) > 2


def test_turns_of_a_dialogue_run_the_picture_once(parts, pictures, runs):
    kept, questions = VisualTokenCache(*parts), ["what?", "which colour is it?", "and where?"]
    said = list(converse(*parts, pictures[0], questions, tokens=kept, max_new_tokens=8))
    assert ask(*parts, pictures[0], questions[0], tokens=kept, max_new_tokens=8) == said[0]
    assert runs == {"encoder": [1], "connector": [1]}
    messages = []
    for number, words in enumerate(questions):
        parts_of_turn = [{"type": "image"}] * (number == 0) + [{"type": "text", "text": words}]
        messages.append({"role": "user", "content": parts_of_turn})
        assert without(parts, messages, pictures[:1]) == said[number]
        messages.append({"role": "assistant", "content": said[number]})


def test_several_images_or_none(parts, pictures):
    words = "which?"
    for images in (pictures[:2], [], pictures[:1]):
        sample = question("0", *images, words=words)
        assert ask(*parts, images, words, max_new_tokens=8) == without(parts, sample.messages, images)
    assert ask(*parts, pictures[0], words, max_new_tokens=8) == ask(*parts, pictures[:1], words, max_new_tokens=8)
    opened = [Image.open(path) for path in pictures[:2]]
    assert ask(*parts, opened, words, max_new_tokens=8) == ask(*parts, pictures[:2], words, max_new_tokens=8)


def short(model, length):
    """The same model with another context."""
    model.config.text_config.max_position_embeddings = length
    return model


def prompt_length(parts, *samples):
    return [int(prompt_inputs(parts[1], [sample.messages])["attention_mask"].sum()) for sample in samples]


def test_a_prompt_longer_than_the_context_is_refused(parts, pictures):
    long = question("long", pictures[0], words="what " * 20)
    (length,) = prompt_length(parts, long)
    model = short(parts[0], length)
    message = rf"a prompt of {length} tokens .* does not fit into the model's context of {length}"
    with pytest.raises(UsageError, match=message):
        ask(model, parts[1], pictures[0], "what " * 20)
    with pytest.raises(DataError, match=f"among short, long: {message}"):
        list(answer(model, parts[1], [question("short"), long], progress=False))
    assert ask(model, parts[1], pictures[0], "what?", max_new_tokens=4)


def test_an_answer_ends_with_the_context_and_cuts_no_other(parts, pictures):
    samples = [question("0", pictures[0], words="what " * 20), question("1", pictures[1])]
    model, processor = parts
    model.generation_config.eos_token_id = None
    lengths = prompt_length(parts, *samples)
    options = {"max_new_tokens": 8, "progress": False}
    before = list(answer(model, processor, samples, **options))
    model = short(model, max(lengths) + 3)
    after = list(answer(model, processor, samples, **options))
    assert after[1] == before[1], "the batch does not change the answer"
    assert before[0].startswith(after[0])
    assert len(after[0]) < len(before[0])
    assert ask(model, processor, pictures[0], "what " * 20, max_new_tokens=8) == after[0]


def test_a_dialogue_is_refused_when_it_outgrows_the_context(parts, pictures):
    model = short(parts[0], 100)
    turns = converse(model, parts[1], pictures[0], ["what?"] * 99, max_new_tokens=8)
    with pytest.raises(UsageError, match="the model's context of 100"):
        list(turns)


def test_what_pil_has_opened_is_known_by_its_pixels(parts, tmp_path, runs):
    exif = Image.Exif()
    exif[274] = 6
    path, kept = tmp_path / "turned.png", VisualTokenCache(*parts)
    tiny.picture(size=(20, 14)).save(path, exif=exif)
    by_path, opened, again, other = kept([path, Image.open(path), Image.open(path), tiny.picture(size=(20, 14))])
    torch.testing.assert_close(by_path, opened, rtol=1e-4, atol=1e-4)  # batches of two sizes
    assert opened is again
    assert not torch.allclose(other, opened), "that one is not turned"
    assert torch.equal(kept([str(path)])[0], by_path)
    assert runs["encoder"] == [3]


def test_files_that_never_end_are_refused(parts, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        with pytest.raises(ImageError, match="a directory or device"):
            VisualTokenCache(*parts)([path])


def test_the_command_takes_several_questions(tmp_path, pictures, capsys):
    from acformer.cli import main

    tiny.model().save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    command = ["ask", str(tmp_path / "model"), str(pictures[0]), "what?", "where?", "--max-new-tokens", "4"]
    assert main([*command, "--device", "cpu", "--quiet"]) == 0
    said = list(converse(tiny.model(), tiny.processor(), pictures[0], ["what?", "where?"], max_new_tokens=4))
    assert capsys.readouterr().out.splitlines() == said


def test_the_command_takes_several_images_or_none(tmp_path, pictures, capsys):
    from acformer.cli import main

    tiny.model().save_pretrained(tmp_path / "model")
    tiny.processor().save_pretrained(tmp_path / "model")
    options = ["--max-new-tokens", "4", "--device", "cpu", "--quiet"]
    for images in (pictures[:2], []):
        assert main(["ask", str(tmp_path / "model"), *map(str, images), "compare", "sure?", *options]) == 0
        said = list(converse(tiny.model(), tiny.processor(), images, ["compare", "sure?"], max_new_tokens=4))
        assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize(
    ("words", "images", "questions"),
    [
        ("a.png|what?", 1, 1),
        ("a.png|b.png|compare", 2, 1),
        ("a.png|b.png|compare|and now?", 2, 2),
        ("what?", 0, 1),
        ("what is in a.png", 0, 1),
        ("gone.jpeg|what?", 1, 1),
        ("my gone photo.JPG|what?", 1, 1),
        ("no_suffix|what?", 1, 1),
        ("https://h/a|what?", 1, 1),
        ("x" * 5000, 0, 1),
        ("", 0, 1),
    ],
)
def test_words_are_images_and_then_questions(words, images, questions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png", "no_suffix"):
        (tmp_path / name).touch()
    found = split_words(words.split("|"))
    assert [len(part) for part in found] == [images, questions]
    assert [*found[0], *found[1]] == words.split("|")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.png", "there is no question behind a.png"),
        ("a.png|b.png", "there is no question behind b.png"),
        ("what?|a.png", "a.png stands behind 'what?': images come before the first question"),
        ("a.png|what?|b.png|compare", "b.png stands behind 'what?'"),
    ],
)
def test_words_that_are_no_images_and_then_questions(words, message, capsys):
    from acformer.cli import main

    assert main(["ask", "model", *words.split("|")]) == 2
    assert message in capsys.readouterr().err


def test_a_question_is_asked_for_when_the_one_before_is_answered(parts, pictures):
    asked = []

    def typing():
        for words in ("what?", "where?"):
            asked.append(words)
            yield words

    turns = converse(*parts, pictures[0], typing(), max_new_tokens=2)
    assert asked == []
    next(turns)
    assert asked == ["what?"]


def test_a_picture_is_known_by_its_content(parts, pictures, runs, tmp_path):
    kept = VisualTokenCache(*parts)
    twin = tmp_path / "twin.png"
    twin.write_bytes(pictures[0].read_bytes())
    first, second, third = kept([pictures[0], twin, pictures[0].read_bytes()])
    assert first is second is third
    assert runs["encoder"] == [1]
    tiny.picture(3).save(pictures[0])  # another picture under the old name
    (other,) = kept(pictures[:1])
    assert not torch.allclose(other, first)
    assert torch.equal(other, kept([pictures[3]])[0])


def test_another_t_or_edit_runs_the_connector_alone(parts, pictures, runs):
    kept = VisualTokenCache(*parts)
    model, processor = parts
    of = {}
    for budget in (None, 3, 9, 5, None):
        for edit in (None, Pins((2, 7)), Pins((7,)), Pins((2, 7))):
            of[budget or 5, edit] = kept(pictures[:1], budget, edit=edit)[0]
    assert runs["encoder"] == [1]
    assert runs["connector"] == [1] * 9
    pixels = processor.image_processor([load_image(pictures[0])], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_vision_features(pixels)
        for (budget, edit), tokens in of.items():
            seen = features if edit is None else edit(features)
            expected = model.get_image_features(vision_features=seen, num_visual_tokens=budget).pooler_output[0]
            torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    assert not torch.equal(of[5, None], of[5, Pins((7,))])


@pytest.fixture
def known(parts, pictures):
    """What the encoder makes of each picture."""
    model, processor = parts
    pixels = processor.image_processor([load_image(path) for path in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        arrays = model.get_vision_features(pixels).arrays
    return {path: {name: rows[row] for name, rows in arrays.items()} for row, path in enumerate(pictures)}


def test_features_known_beforehand_are_taken(parts, pictures, known, runs):
    kept = VisualTokenCache(*parts, features=known.__getitem__)
    torch.testing.assert_close(kept(pictures), VisualTokenCache(*parts)(pictures))
    assert runs["encoder"] == [4], "of the second alone"


def test_the_least_recently_used_makes_room(parts, pictures, known, runs):
    kept = VisualTokenCache(*parts, features=known.__getitem__)
    kept(pictures)
    kept.max_bytes = 3 * kept.size // 4  # three pictures
    kept.clear()
    runs["connector"].clear()
    for number in (0, 1, 2, 0, 3, 0, 2):  # 3 takes the room of 1
        kept([pictures[number]])
        assert kept.size <= kept.max_bytes
    assert len(runs["connector"]) == 4
    kept([pictures[1]])
    assert len(runs["connector"]) == 5
    assert len(VisualTokenCache(*parts, max_bytes=0)(pictures)) == 4, "nothing is kept, everything is given"


def test_the_encoders_output_goes_before_the_tokens_that_are_in_use(parts, pictures, runs):
    kept = VisualTokenCache(*parts)
    kept(pictures[:1])
    kept.max_bytes = kept.size * 3 // 2
    for number in (0, 1, 0, 2, 0):
        kept([pictures[number]])
    assert len(runs["encoder"]) == 3


def test_nothing_is_shared_with_what_is_kept_of_others(parts, pictures):
    tokens = VisualTokenCache(*parts)(pictures)
    assert len({token.untyped_storage().data_ptr() for token in tokens}) == 4
    assert all(token.untyped_storage().nbytes() == token.nbytes for token in tokens)


def test_what_cannot_be_given(parts, pictures, tmp_path):
    kept = VisualTokenCache(*parts)
    pictures[0].write_bytes(b"no picture")
    for bad, reason in ((pictures[0], "not a"), (tmp_path / "gone.png", "cannot be read"), (b"", "empty")):
        with pytest.raises(ImageError, match=reason):
            kept([pictures[1], bad])
    with pytest.raises(UsageError, match="num_anchors"):
        kept(pictures[1:], 99)
    parts[0].train()
    with pytest.raises(UsageError, match=r"call model\.eval"):
        kept(pictures[1:])


def test_weights_that_changed_want_a_clear(parts, pictures):
    kept = VisualTokenCache(*parts)
    (before,) = kept(pictures[:1])
    with torch.no_grad():
        for weight in parts[0].model.connector.parameters():
            weight.mul_(1.1)
    assert torch.equal(kept(pictures[:1])[0], before)
    kept.clear()
    assert not torch.allclose(kept(pictures[:1])[0], before)


def test_the_pages_python_runs(tmp_path, monkeypatch, capsys):
    """`docs/answering.md`, with a tiny model for the trained one."""
    page = (Path(__file__).parents[1] / "docs/answering.md").read_text()
    tiny.model().save_pretrained(tmp_path / "runs/tiny")
    tiny.processor().save_pretrained(tmp_path / "runs/tiny")
    tiny.picture().save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    assert len(capsys.readouterr().out.splitlines()) >= 3
