"""`acformer convert`: LLaVA in its two formats and a model of ours, with another connector; what is kept."""

import json

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from test_convert import llava
from test_lora import same
from test_train import data, recipe  # noqa: F401 (fixtures)
from transformers import CLIPImageProcessorPil, CLIPVisionModel

from acformer import cli
from acformer.evaluate.generate import ask
from acformer.hf.checkpoints import load_model, verify_folder
from acformer.training.stages import train

OPTIONS = ["num_anchors=4", "depth=1", "num_heads=2", "head_dim=8"]


@pytest.fixture(scope="module")
def theirs():
    """A tiny LLaVA whose vocabulary is the tiny tokenizer's."""
    config = llava().config
    config.text_config.vocab_size = len(tiny.tokenizer())
    config.image_token_id = tiny.tokenizer().convert_tokens_to_ids("<image>")
    torch.manual_seed(3)
    return type(llava())(config).eval()


@pytest.fixture
def hugging_face(theirs, tmp_path):
    """In transformers' format, as it saves it."""
    folder = tmp_path / "llava-hf"
    theirs.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    _pixels(folder)
    return folder


@pytest.fixture
def original(theirs, tmp_path):
    """In LLaVA's own: the encoder apart, the language model and the projector in one file, its config's own keys."""
    folder, tower = tmp_path / "llava-own", tmp_path / "clip"
    _encoder(theirs, tower)
    folder.mkdir()
    weights = {}
    for name, weight in theirs.state_dict().items():
        if name.startswith("model.language_model."):
            weights["model." + name.removeprefix("model.language_model.")] = weight.clone()
        elif name.startswith("model.multi_modal_projector."):
            number = "0" if "linear_1" in name else "2"
            weights[f"model.mm_projector.{number}.{name.rpartition('.')[2]}"] = weight.clone()
        elif name.startswith("lm_head."):
            weights[name] = weight.clone()
    save_file({n: w for n, w in weights.items() if not n.startswith("model.layers.1.")}, folder / "model-1.safetensors")
    save_file({n: w for n, w in weights.items() if n.startswith("model.layers.1.")}, folder / "model-2.safetensors")
    (folder / "config.json").write_text(json.dumps({**_own_config(theirs), "mm_vision_tower": str(tower)}))
    tiny.tokenizer().save_pretrained(folder)
    return folder


def _own_config(model) -> dict:
    text = model.config.text_config.to_dict()
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings"
    values = {key: text[key] for key in keys.split()}
    own = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    return {**values, **own, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}


def _encoder(model, folder) -> None:
    tower = CLIPVisionModel(model.config.vision_config)
    report = tower.load_state_dict(model.model.vision_tower.state_dict())
    assert not report.missing_keys
    tower.save_pretrained(folder)
    _pixels(folder)


def _pixels(folder) -> None:
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)


@torch.no_grad()
def run_both(theirs, folder):
    """Logits of theirs and of the converted model for a prompt with one image."""
    model, processor = load_model(str(folder))
    inputs = processor(Image.new("RGB", (16, 16), (200, 30, 30)), "USER: <image>\nred ASSISTANT:", return_tensors="pt")
    return model(**inputs).logits, theirs(**inputs).logits


def convert(source, folder, connector, *rest) -> int:
    return cli.main(["convert", str(source), "--connector", connector, "--out", str(folder), "--quiet", *rest])


@pytest.mark.parametrize("form", ["hugging_face", "original"])
def test_with_its_own_projector_it_says_what_it_said(form, theirs, tmp_path, request):
    source = request.getfixturevalue(form)
    assert convert(source, tmp_path / "out", "mlp") == 0
    assert verify_folder(tmp_path / "out") is None
    ours, expected = run_both(theirs, tmp_path / "out")
    known = expected.shape[-1]  # `<image>` may need more rows than their vocabulary has
    torch.testing.assert_close(ours[..., :known], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", ["hugging_face", "original"])
def test_the_projector_stays_and_the_rest_is_new(form, theirs, tmp_path, request, capsys):
    source = request.getfixturevalue(form)
    command = ["convert", str(source), "--connector", "acformer", *OPTIONS, "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    said = capsys.readouterr()
    assert "connector acformer: its projector is LLaVA's, trained; the rest of it is new" in said.err
    model, processor = load_model(str(tmp_path / "out"))
    assert processor.num_placeholders == model.config.num_placeholders == 5
    old = theirs.model.multi_modal_projector
    assert torch.equal(model.model.connector.projector[0].weight, old.linear_1.weight)
    assert torch.equal(model.model.connector.projector[2].bias, old.linear_2.bias)
    text = {n: w for n, w in model.model.language_model.state_dict().items() if "embed" not in n}
    assert same(text, {n: w for n, w in theirs.model.language_model.state_dict().items() if "embed" not in n})
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    assert isinstance(ask(model, processor, Image.new("RGB", (20, 14)), "red?", max_new_tokens=3), str)
    assert convert(source, tmp_path / "again", "acformer", *OPTIONS) == 0
    assert same(load_model(str(tmp_path / "again"))[0].state_dict(), model.state_dict())


def test_a_projector_alone_beside_a_named_language_model(theirs, original, tmp_path):
    """As LLaVA's pre-training leaves it."""
    text, alone = tmp_path / "vicuna", tmp_path / "alone"
    from transformers import LlamaForCausalLM

    language_model = LlamaForCausalLM(theirs.config.text_config)
    language_model.model.load_state_dict(theirs.model.language_model.state_dict())
    language_model.lm_head.load_state_dict(theirs.lm_head.state_dict())
    language_model.save_pretrained(text)
    tiny.tokenizer().save_pretrained(text)
    alone.mkdir()
    projector = theirs.model.multi_modal_projector
    layers = (("0", projector.linear_1), ("2", projector.linear_2))
    weights = {f"model.mm_projector.{n}.{key}": w for n, layer in layers for key, w in layer.state_dict().items()}
    torch.save(weights, alone / "mm_projector.bin")
    config = json.loads((original / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps({**config, "_name_or_path": str(text)}))
    assert convert(alone, tmp_path / "out", "mlp") == 0
    ours, expected = run_both(theirs, tmp_path / "out")
    torch.testing.assert_close(ours[..., : expected.shape[-1]], expected, rtol=0, atol=1e-5)
    (alone / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "_name_or_path"}))
    assert convert(alone, tmp_path / "second", "mlp") == 4
    assert convert(alone, tmp_path / "second", "mlp", "--text", str(text)) == 0


def test_a_model_of_ours_and_a_connector_that_ends_otherwise(tmp_path, capsys):
    tiny.model().save_pretrained(tmp_path / "ours")
    tiny.processor().save_pretrained(tmp_path / "ours")
    assert cli.main(["convert", str(tmp_path / "ours"), "--connector", "linear", "--out", str(tmp_path / "out")]) == 0
    assert "connector linear: it is new" in capsys.readouterr().err
    model, processor = load_model(str(tmp_path / "out"))
    assert processor.num_placeholders == 16
    before = tiny.model().model.language_model.state_dict()
    assert same(model.model.language_model.state_dict(), before)


def test_it_can_be_trained_on(hugging_face, recipe, tmp_path):  # noqa: F811
    assert convert(hugging_face, tmp_path / "out", "acformer", *OPTIONS) == 0
    run = recipe("stage=finetune", "pretrain=null", f"from_model={tmp_path}/out", "finetune.lora={r: 2}")
    assert verify_folder(train(run, progress=False)) is None


@pytest.mark.parametrize(
    ("change", "rest", "message"),
    [
        ({"mm_projector_type": "mlp3x_gelu"}, [], "mm_projector_type='mlp3x_gelu' is unsupported"),
        ({"mm_vision_select_feature": "all"}, [], "mm_vision_select_feature='all' is unsupported"),
        ({"mm_vision_tower": None}, [], "names no encoder and layer"),
        ({"mm_vision_tower": "/no/where"}, [], "/no/where"),
        ({"model_type": "llava_mpt"}, [], "model_type 'llava_mpt' is none of"),
        ({"num_hidden_layers": 3}, [], "weights do not fit its config"),
        ({"model_type": "llama", "mm_vision_tower": ...}, [], "holds a model of type 'llama', neither LLaVA nor ours"),
        ({}, ["--connector", "acfomer"], "unknown connector 'acfomer'; did you mean 'acformer'"),
        ({}, ["num_anchor=3"], "num_anchor"),
        ({}, ["num_anchors"], "is not of the form KEY=VALUE"),
        ({}, ["--template", "vicuna"], "unknown chat template 'vicuna'"),
    ],
)
def test_what_cannot_be_converted_is_one_line(original, tmp_path, capsys, change, rest, message):
    config = json.loads((original / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not ...}
    (original / "config.json").write_text(json.dumps(config))
    command = ["convert", str(original), "--connector", "acformer", "--out", str(tmp_path / "out"), "--quiet", *rest]
    assert cli.main(command) in (2, 4)
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("acformer: error: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(capsys):
    assert cli.main(["convert", "/no/such/folder", "--connector", "acformer", "--out", "/no/out"]) == 4
    assert "there is no such folder" in capsys.readouterr().err
