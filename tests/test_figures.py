"""The paper's figures: colours that keep their meaning, maps of what the model did, panels that do not collide."""

import json
from itertools import chain, combinations
from xml.etree import ElementTree

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from transformers import BitImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from acformer import cli
from acformer.anchors.search import select_anchors
from acformer.connectors.blocks import CrossAttention
from acformer.errors import UsageError
from acformer.evaluate.generate import ask
from acformer.hf.build import square_image_processor
from acformer.lab.figures.answer_attention import AnswerAttention, attend_to_answer, middle
from acformer.lab.figures.layers import EncoderLayers, LayerExtractor, draw_contact_sheet, draw_layers, ten_depths
from acformer.lab.figures.panels import within_image
from acformer.lab.figures.pca import pca_colours
from acformer.lab.figures.plot_attention import plot_attention
from acformer.lab.figures.sheet import save
from acformer.viz import Anchors
from acformer.viz.sources import attention_weights, token_sources

DIRECT = ("mlp", "linear", "pooling", "direct", "e_vit")
STACKS = ("acformer", "perceiver", "pooling_pr", "random_pr")
QUESTION = "red green?"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(dim, seed):
    return torch.linalg.qr(random(dim, dim, seed=seed))[0]


# --- colours


@given(depths=st.integers(1, 4), patches=st.integers(1, 40), dim=st.integers(1, 9), seed=st.integers(0, 99))
def test_colours_do_not_hang_on_the_axes_of_the_features(depths, patches, dim, seed):
    """Another basis of the feature space, each depth its own, signs included, changes no colour by more than 1."""
    features = random(depths, patches, dim, seed=seed)
    turned = torch.stack([x @ orthogonal(dim, seed + k) + 3.0 for k, x in enumerate(features)])
    colours = pca_colours(features)
    assert colours.shape == (depths, patches, 3)
    if patches > dim:  # else two components of no variance may be told apart by rounding alone
        assert (pca_colours(turned).int() - colours.int()).abs().max() <= 1  # rounding at a half


def test_a_colour_keeps_its_meaning_where_components_change_places():
    base = random(60, 3)
    sharp = base @ torch.diag(torch.tensor([9.0, 3.0, 1.0], dtype=torch.float64))
    swapped = base @ torch.diag(torch.tensor([-1.0, 3.0, 9.0], dtype=torch.float64))
    first, second = pca_colours(torch.stack([sharp, swapped])).double()
    for channel in range(3):
        assert np.corrcoef(first[:, channel], second[:, channel])[0, 1] > 0.95
    alone = pca_colours(swapped.unsqueeze(0))[0].double()
    assert np.corrcoef(first[:, 0], alone[:, 0])[0, 1] < 0.5  # what would happen without the turn


def test_the_few_that_stand_out_are_bright():
    features = 0.01 * random(1, 100, 5)
    features[0, [7, 70], 2] = -4.0
    red = pca_colours(features)[0, :, 0]
    assert set(red.topk(2).indices.tolist()) == {7, 70}
    assert red.median() < 20


def test_padding_takes_no_part_in_the_scale():
    features = random(2, 36, 6)
    within = within_image((60, 40), (6, 6))
    assert within.reshape(6, 6).any(1).tolist() == [False, True, True, True, True, False]
    padded = features.clone()
    padded[:, ~within] = 50.0
    assert torch.equal(pca_colours(padded, within)[:, within], pca_colours(features[:, within]))


def test_features_without_variance_are_black():
    assert not pca_colours(torch.ones(2, 5, 4)).any()
    flat = torch.zeros(1, 6, 4)
    flat[0, :, 0] = torch.arange(6.0)
    assert pca_colours(flat)[0, :, 1:].max() == 0
    assert pca_colours(flat)[0, :, 0].unique().numel() == 6


# --- layers


@given(heads=st.integers(1, 7), num=st.integers(1, 30), seed=st.integers(0, 99))
def test_heads_share_out_the_anchors(heads, num, seed):
    """As the paper's loop takes them: each head the best of what is left."""
    scores = random(heads, 30, seed=seed).softmax(-1)
    found = Anchors(tuple(select_anchors(scores[None], num)[0].tolist()), (5, 6), scores)
    left = set(range(30))
    for head, taken in enumerate(found.by_head):
        quota = num // heads + (head < num % heads)
        assert set(taken) == set(sorted(left, key=lambda patch: -scores[head, patch])[:quota])
        left -= set(taken)
    assert set(range(30)) - left == set(found.indices)


def test_ten_depths_are_the_papers():
    assert ten_depths(24) == (0, 3, 6, 9, 12, 15, 18, 21, 23, 24)
    assert ten_depths(12) == (0, 1, 3, 4, 6, 7, 9, 10, 11, 12)
    assert ten_depths(3) == (0, 1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP of 3 blocks with its image processor."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=8))
    for parameter in tower.parameters():  # the initial weights are so small that all scores are alike
        torch.nn.init.normal_(parameter, std=0.3)
    tower.save_pretrained(path)
    BitImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(path)
    return str(path)


def test_layers_are_what_the_encoder_computes(folder):
    image = tiny.picture(size=(60, 40))
    processor = square_image_processor(folder, 48)
    layers = LayerExtractor(folder, 48)(image, "noise", 5)
    tower = CLIPVisionModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        output = tower(
            processor(image, return_tensors="pt")["pixel_values"], output_hidden_states=True, output_attentions=True
        )
    assert layers.depths == (0, 1, 2, 3)
    assert (layers.feature_layer, layers.num_blocks) == (2, 3)
    expected = torch.stack([state[0, 1:] for state in output.hidden_states])
    colours = pca_colours(expected, within_image((60, 40), (6, 6)))
    assert (layers.colours.int() - colours.int()).abs().max() <= 2  # eager and sdpa differ by 1e-6, rounded to 0..255
    torch.testing.assert_close(layers.last, output.attentions[2][0, :, 0, 1:])
    torch.testing.assert_close(layers.anchors.scores, output.attentions[1][0, :, 0, 1:])
    assert list(layers.anchors.indices) == select_anchors(output.attentions[1][:, :, 0, 1:], 5)[0].tolist()
    assert len(LayerExtractor(folder, 48)(image, "noise").anchors.indices) == 36 // 9


def test_a_square_of_less_than_a_patch_is_refused(folder):
    with pytest.raises(UsageError, match="not a whole number of patches"):
        LayerExtractor(folder, 7)


def made(num_heads, size, name="image.png", num_blocks=24):
    scores = random(num_heads, 576, seed=num_heads).softmax(-1).float()
    anchors = Anchors(tuple(select_anchors(scores[None], 64)[0].tolist()), (24, 24), scores)
    depths = ten_depths(num_blocks)
    colours = torch.arange(len(depths) * 576 * 3).reshape(len(depths), 576, 3).remainder(256).to(torch.uint8)
    return EncoderLayers(name, tiny.picture(size=size), anchors, scores, depths, colours, num_blocks - 1, num_blocks)


def assert_nothing_collides(figure):
    """Panels and words lie inside the figure and apart from each other."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in (*figure.texts, *(axes.title for axes in figure.axes))]
    boxes += [axes.get_window_extent(renderer) for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1
    for first, second in combinations(boxes, 2):
        wide = min(first.x1, second.x1) - max(first.x0, second.x0)
        high = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert wide < 1e-6 or high < 1e-6, f"{first} and {second}"


LONG = "a name of a photograph that is much longer than its panel is wide, as cameras and people give them.jpeg"


@pytest.mark.parametrize(
    ("num_heads", "size"),
    tiny.mostly_slow([(3, (30, 60)), (6, (64, 48)), (12, (300, 20)), (16, (64, 48))], (12, (300, 20))),
)
def test_figures_have_room_for_any_encoder_and_image(num_heads, size):
    layers = made(num_heads, size, LONG, num_blocks=24 if num_heads == 16 else 12)
    assert_nothing_collides(draw_layers(layers))
    assert_nothing_collides(draw_contact_sheet([layers, made(num_heads, (48, 48), num_blocks=2)]))


def test_panels_show_what_they_say():
    layers = made(6, (64, 48))
    figure = draw_layers(layers)
    assert len(figure.axes) == 2 + 10 + 6 + 6
    labels = [axes.get_title() for axes in figure.axes]
    assert labels.count("head 6") == 2
    assert {"image", "64 anchors", "embedding", "layer 21", "layer 24"} <= set(labels)
    (embedding,) = figure.axes[2].images
    assert np.array_equal(embedding.get_array(), layers.colours[0].reshape(24, 24, 3))
    (head,) = figure.axes[12].images
    assert np.allclose(np.asarray(head.get_array()) ** 2, layers.anchors.scores[0].reshape(24, 24))
    _, ring = figure.axes[12].lines
    assert len(ring.get_xdata()) == len(layers.anchors.by_head[0])
    x, y = ring.get_xdata()[0], ring.get_ydata()[0]
    left, right, bottom, top = head.get_extent()
    row, column = divmod(layers.anchors.by_head[0][0], 24)
    assert (x - left) / (right - left) * 24 == pytest.approx(column + 0.5)
    assert (y - top) / (bottom - top) * 24 == pytest.approx(row + 0.5)
    assert not any(len(line.get_xdata()) for axes in figure.axes[-6:] for line in axes.lines)


@pytest.mark.slow
def test_files_are_the_same_every_time_and_small(tmp_path):
    layers = made(6, (400, 300))
    files = [save(draw_layers(layers), tmp_path / name) for name in ("first", "second")]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size < 2_000_000
    assert ElementTree.parse(files[0][1]).getroot().tag.endswith("svg")
    with Image.open(files[0][0]) as image:
        assert image.width == 1600


def test_a_sheet_of_more_images_shows_smaller_ones():
    """Or its SVG would grow to many megabytes."""
    layers = made(3, (480, 300))
    alone, four = (draw_contact_sheet([layers] * number).axes[0].images[0].get_array().shape for number in (1, 4))
    assert (alone[:2], four[:2]) == ((300, 480), (150, 240))


def test_words_that_the_font_does_not_have():
    figure = draw_layers(made(1, (40, 40), "猫\x01\n a_$x$.png", num_blocks=2))
    assert "□□ a_$x$.png" in [text.get_text() for text in figure.texts]
    assert_nothing_collides(figure)


# --- sources


@pytest.mark.parametrize("name", DIRECT)
def test_direct_tokens_are_their_shares_of_the_patches(name):
    """The table of shares times the encoder's tokens is what the projector is given."""
    model = tiny.model(name)
    features = model.get_vision_features(torch.randn(2, 3, 16, 16))
    given = []
    hook = model.model.connector.projector.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model.model.connector(features)
    hook.remove()
    shares = token_sources(model.model.connector, features)
    torch.testing.assert_close(shares @ features.tokens[0], given[0][0])
    torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))


@pytest.mark.parametrize("name", STACKS)
def test_shares_of_a_stack_are_its_cross_attention(name):
    """With values in place of keys' shares: the weights give the fused kernel's output."""
    model = tiny.model(name)
    features = model.get_vision_features(torch.randn(1, 3, 16, 16))
    (attention,) = (m for m in model.model.connector.modules() if isinstance(m, CrossAttention))
    calls = []
    hook = attention.register_forward_hook(lambda module, args, output: calls.append((args, output)))
    model.model.connector(features)
    hook.remove()
    (((queries, keys), output),) = calls
    weights = attention_weights(attention, queries, keys)
    values = attention.kv_proj(attention.norm_features(keys)).chunk(2, dim=-1)[1].unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(attention.o_proj((weights @ values).transpose(1, 2).flatten(2)), output)
    torch.testing.assert_close(token_sources(model.model.connector, features), weights[0].mean(0))


def test_the_anchors_are_the_sources_of_direct():
    connector = tiny.model("direct").model.connector
    features = tiny.model("direct").get_vision_features(torch.randn(1, 3, 16, 16))
    (chosen,) = select_anchors(features.cls_attention, 4).tolist()
    expected = F.one_hot(torch.tensor([0, *(1 + patch for patch in chosen)]), 17).float()
    assert torch.equal(token_sources(connector, features), expected)
    assert token_sources(connector, features, 3).shape == (3, 17)


def test_a_convolution_is_refused():
    model = tiny.model("c_abstractor")
    with pytest.raises(UsageError, match="cannot be mapped back"):
        token_sources(model.model.connector, model.get_vision_features(torch.randn(1, 3, 16, 16)))


# --- the attention of an answer


@pytest.fixture
def photo(tmp_path):
    tiny.picture().save(path := tmp_path / "photo.png")
    return path


def attend(name, photo, **kwargs):
    model = tiny.model(name)
    return attend_to_answer(
        model, tiny.processor(model.config.num_placeholders), photo, QUESTION, num_anchors=4, **kwargs
    )


@pytest.mark.parametrize("name", [*DIRECT, *STACKS])
def test_what_is_read_is_all_of_the_image(name, photo):
    found = attend(name, photo)
    assert found.maps.shape == (2, 16)
    assert (found.maps >= 0).all()
    assert (found.maps.sum(1) <= 1 + 1e-6).all()
    assert ((found.image_share > 0) & (found.image_share < 1)).all()
    if name in ("mlp", "linear"):  # no [CLS] among their tokens
        torch.testing.assert_close(found.maps.sum(1), torch.ones(2))
        torch.testing.assert_close(found.uniform, torch.full((16,), 1 / 16))
    json.dumps(found.record())


def test_the_map_is_the_attention_of_the_answers_words(photo):
    """With `mlp`, where visual token n is patch n: recomputed from a pass of the whole model over prompt and answer."""
    model, processor = tiny.model("mlp"), tiny.processor(16)
    kernel = model.model.language_model.config._attn_implementation
    found = attend_to_answer(model, processor, photo, QUESTION, max_new_tokens=6)
    assert model.model.language_model.config._attn_implementation == kernel
    assert found.answer == ask(model, processor, photo, QUESTION, max_new_tokens=6)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(Image.open(photo), prompt, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=6)
    length = inputs["input_ids"].shape[1]
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        output = model(input_ids=answer, pixel_values=inputs["pixel_values"], output_attentions=True)
    places = (answer[0] == model.config.image_token_id).nonzero()[:, 0]
    words = range(length - 1, answer.shape[1] - 1)
    for layer, shares, share in zip(output.attentions, found.maps, found.image_share, strict=True):
        rows = layer[0].mean(0)[list(words)][:, places].mean(0)
        torch.testing.assert_close(share, rows.sum())
        torch.testing.assert_close(shares, rows / rows.sum())


def test_another_number_of_tokens(photo):
    assert attend("acformer", photo, num_visual_tokens=3).num_tokens == 3
    assert attend("acformer", photo).num_tokens == 5


def test_overlap_by_hand():
    anchors = Anchors((0, 3), (2, 2), torch.ones(1, 4))
    maps = torch.tensor([[0.2, 0.1, 0.1, 0.4], [0.4, 0.3, 0.1, 0.0]])
    alike = torch.tensor([0.25, 0.0, 0.5, 0.25])
    found = AnswerAttention("q", "a", tiny.picture(), anchors, 3, (2, 3), 4, maps, torch.ones(2), alike)
    assert found.overlap() == pytest.approx({"on_anchors": 0.5 / 0.8, "alike": 0.5, "chance": 0.5, "most_read": 0.5})
    assert found.record()["prefix_share"] == pytest.approx(0.2)


def test_middle_third():
    assert list(middle(32)) == list(range(10, 22))
    assert [list(middle(n)) for n in (1, 2, 3)] == [[0], [0, 1], [1]]


def test_answers_that_cannot_be_shown(photo):
    gated = tiny.model(fusion="gated_cross_attention")
    with pytest.raises(UsageError, match="fusion concat alone"):
        attend_to_answer(gated, tiny.processor(1, fusion="gated_cross_attention"), photo, QUESTION)
    silent, processor = tiny.model(), tiny.processor()
    with torch.no_grad():
        silent.lm_head.weight.zero_()  # all logits alike: the first token, <pad>, wins
    with pytest.raises(UsageError, match="without a word"):
        attend_to_answer(silent, processor, photo, QUESTION)


@pytest.mark.parametrize("num_layers", [1, 11, 13])
def test_the_figure_of_an_answer_has_room(num_layers):
    anchors = Anchors((0, 3), (2, 2), torch.ones(1, 4))
    maps = torch.tensor([[0.2, 0.1, 0.1, 0.4]]).expand(num_layers, 4)
    found = AnswerAttention(
        LONG,
        LONG,
        tiny.picture(),
        anchors,
        3,
        tuple(range(5, 5 + num_layers)),
        40,
        maps,
        torch.ones(num_layers),
        maps[0],
    )
    figure = plot_attention(found)
    assert_nothing_collides(figure)
    assert len(figure.axes) == 4 + num_layers
    (shown,) = figure.axes[2].images
    assert np.allclose(np.asarray(shown.get_array()) ** 2, found.mean_map.reshape(2, 2))


# --- the command


def command(*words):
    """What `acformer visualize` returns to be printed."""
    arguments = cli._parse(["visualize", "--quiet", *map(str, words)])
    return arguments.run(arguments)


def test_figures_of_an_encoder(folder, photo, tmp_path):
    (tmp_path / "other").mkdir()
    tiny.picture(seed=1).save(other := tmp_path / "other/photo.jpg")
    before = photo.read_bytes()
    printed = command(photo, other, "--vision", folder, "--image-size", 48, "--num-anchors", 5, "--out", tmp_path)
    names = [
        f"{stem}.{kind}" for stem in ("photo-layers", "photo-2-layers", "contact-sheet") for kind in ("png", "svg")
    ]
    assert printed.splitlines() == [str(tmp_path / name) for name in (*names, "layers.json")]
    assert all((tmp_path / name).stat().st_size for name in names)
    assert photo.read_bytes() == before
    record = json.loads((tmp_path / "layers.json").read_text())
    assert record["vision"] == folder
    assert {"machine", "torch", "commit"} <= record.keys()
    assert [len(image["anchors"]) for image in record["pictures"]] == [5, 5]
    assert sorted(chain(*record["pictures"][0]["anchors_by_head"])) == record["pictures"][0]["anchors"]


def test_figure_of_an_answer(photo, tmp_path):
    model, folder = tiny.model(), tmp_path / "model"
    model.save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    printed = command(photo, "--model", folder, "--question", QUESTION, "--out", tmp_path / "out", "--num-anchors", 4)
    record = json.loads((tmp_path / "out/photo-reading.json").read_text())
    assert record["overlap"]["chance"] == 4 / 16
    assert record["connector"] == "acformer"
    assert record["answer"] in printed
    assert f"on_anchors {100 * record['overlap']['on_anchors']:.1f} %" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"photo-reading.{k}" for k in ("png", "svg", "json")
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "m"], "go together"),
        (["--question", "q"], "go together"),
        (["--model", "m", "--question", "q", "--vision", "v"], "--vision belongs"),
        (["--model", "m", "--question", "q", "--feature-layer", "-1"], "--feature-layer belongs"),
        (["again.png"] * 40, "holds 32 images"),
    ],
)
def test_wrong_arguments_are_told(photo, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    tiny.picture().save("again.png")
    with pytest.raises(UsageError, match=message):
        command(photo, *words, "--out", tmp_path / "out")
