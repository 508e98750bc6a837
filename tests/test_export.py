"""Exports equal the model: code beside the weights where this package is not, graphs of torch and of ONNX."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from test_model_folder import run, save, texts
from transformers import AutoModelForImageTextToText, AutoProcessor

from acformer.cli import main
from acformer.connectors import CONNECTORS
from acformer.export.self_contained import LEFT_OUT, export_self_contained, flat_modules
from acformer.hf.auto_map import CLASSES
from acformer.hf.checkpoints import load_model, verify_folder

ASK = "USER: <image>\nWhat? ASSISTANT:"
WITHOUT_US = """
import json, sys, torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, budget = sys.argv[1], {budget}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
options = {{}} if budget is None else {{"num_visual_tokens": budget}}
inputs = processor(images=Image.open("photo.png"), text={prompt!r}, return_tensors="pt", **options)
with torch.no_grad():
    logits = model(**inputs).logits
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(**inputs).last_hidden_state
ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
question = [{{"type": "image", "image": "photo.png"}}, {{"type": "text", "text": "What?"}}]
ask = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
said = ask(text=[{{"role": "user", "content": question}}], max_new_tokens=6)[0]["generated_text"][-1]["content"]
torch.save({{"logits": logits, "hidden": hidden, "ids": ids, "said": said, "type": type(model).__module__}}, "out.pt")
if "again" in sys.argv:
    model.save_pretrained("again")
    processor.save_pretrained("again")
"""


@pytest.fixture
def photo(tmp_path) -> Path:
    tiny.picture().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def without_us(folder: Path, budget: int | None = None, *arguments: str) -> dict:
    """What the model in a folder gives in a process that has neither this package nor jaxtyping."""
    code = f"import sys\nsys.argv = ['', {str(folder)!r}, *{arguments!r}]\n"
    code += WITHOUT_US.format(budget=budget, prompt=ASK)
    result = run(code, folder.parent, "acformer", "jaxtyping", "triton")
    assert result.returncode == 0, result.stderr
    return torch.load(folder.parent / "out.pt", weights_only=True)


def expected(model, processor, photo, budget=None) -> dict:
    options = {} if budget is None else {"num_visual_tokens": budget}
    inputs = processor(images=str(photo), text=ASK, return_tensors="pt", **options)
    with torch.no_grad():
        logits, hidden = model(**inputs).logits, model.model(**inputs).last_hidden_state
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return {"logits": logits, "hidden": hidden, "ids": ids}


MODELS = {
    "elastic": ({}, 3),
    "gated": ({"fusion": "gated_cross_attention"}, None),
    "siglip, downsampled": ({"connector": "downsample", "vision": "siglip_vision_model"}, None),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_a_model_runs_where_this_package_is_not(name, tmp_path, photo):
    options, budget = MODELS[name]
    model = tiny.model(**options)
    model.save_pretrained(tmp_path / "model")
    processor = tiny.processor(model.config.num_placeholders, fusion=model.config.fusion)
    processor.save_pretrained(tmp_path / "model")
    out = tmp_path / "exported"
    assert main(["export", str(tmp_path / "model"), "--format", "self-contained", "--out", str(out)]) == 0
    found, wanted = without_us(out, budget), expected(model, processor, photo, budget)
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key
    assert found["type"].startswith("transformers_modules.")
    assert isinstance(found["said"], str)


@pytest.mark.slow
def test_what_it_saves_is_self_contained_again(tmp_path, photo):
    model = tiny.model()
    out = export_self_contained(str(save(model, tmp_path / "model")), tmp_path / "exported")
    without_us(out, None, "again")
    assert {path.name for path in out.glob("*.py")} == {path.name for path in (tmp_path / "again").glob("*.py")}
    shutil.rmtree(tmp_path / "modules")
    found = without_us(tmp_path / "again")
    assert torch.equal(found["logits"], expected(model, tiny.processor(), photo)["logits"])


def test_the_folder_is_a_model_of_ours_as_well(tmp_path):
    save(tiny.model(), tmp_path / "model")
    out = export_self_contained(str(tmp_path / "model"), tmp_path / "exported")
    assert verify_folder(out) is None
    assert "class AcFormerModel" in (out / "modeling_acformer.py").read_text()
    assert str(tmp_path) not in texts(out)
    assert "nothing but transformers and torch" in (out / "README.md").read_text()
    assert "pip install acformer" not in (out / "README.md").read_text()
    model, processor = load_model(str(out))
    assert type(model).__module__ == "acformer.hf.modeling_acformer"
    model.save_pretrained(tmp_path / "again")
    assert "from acformer.hf import" in (tmp_path / "again/modeling_acformer.py").read_text()
    assert type(AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)) is type(model)
    assert type(AutoProcessor.from_pretrained(out, trust_remote_code=True)) is type(processor)


@pytest.mark.slow
def test_an_adapter_is_exported_merged(tmp_path, photo):
    from peft import LoraConfig, get_peft_model

    base = save(tiny.model(), tmp_path / "base")
    model = get_peft_model(load_model(str(base))[0], LoraConfig(target_modules=r".*language_model\..*q_proj", r=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 if "lora" in name else 0)
    model.save_pretrained(tmp_path / "adapter")
    out = export_self_contained(str(tmp_path / "adapter"), tmp_path / "exported")
    merged, processor = load_model(str(tmp_path / "adapter"))
    assert torch.equal(without_us(out)["logits"], expected(merged, processor, photo)["logits"])


def test_the_modules_need_one_another_and_nothing_of_ours():
    modules = flat_modules()
    assert {*CLASSES} <= {*modules}
    assert not [name for name in modules if name.startswith(("acformer_fetch", "acformer_data", "acformer_training"))]
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {one.partition(".")[0] for one in names} & {"acformer", "jaxtyping", "triton"}, name
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in modules, name
        # as transformers finds them
        assert {*re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)} <= {*modules}
    shipped = {f"acformer_connectors_{connector.__module__.rpartition('.')[2]}" for connector in CONNECTORS.values()}
    assert shipped <= {*modules}
    assert all(out.replace(".", "_") not in modules for out in LEFT_OUT)


def test_refusals(tmp_path, capsys):
    folder = save(tiny.model(), tmp_path / "model")
    assert main(["export", str(folder), "--out", str(folder)]) == 2
    assert main(["export", str(folder), "--out", str(tmp_path / "x"), "--tokens", "3"]) == 2
    assert main(["export", str(tmp_path / "no/such/model"), "--out", str(tmp_path / "x")]) == 4
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    assert main(["export", str(folder), "--out", str(tmp_path / "x")]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "error" in line] == [
        line for line in lines if line.startswith("acformer: error:")
    ]
    assert not (tmp_path / "x").exists()


def test_parts_of_other_packages_are_refused(tmp_path, monkeypatch):
    class Elsewhere(CONNECTORS["mlp"]):
        """Not ours."""

    Elsewhere.__module__ = "another_package.connector"
    monkeypatch.setitem(CONNECTORS, "elsewhere", Elsewhere)
    folder = save(tiny.model("elsewhere", connector_kwargs={}), tmp_path / "model")
    assert main(["export", str(folder), "--out", str(tmp_path / "x")]) == 2


# Graphs


def exported(tmp_path, *options: str, model=None) -> Path:
    model = tiny.model() if model is None else model
    model.save_pretrained(tmp_path / "model")
    tiny.processor(model.config.num_placeholders, fusion=model.config.fusion).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "graphs"), *options]) == 0
    return tmp_path / "graphs"


def runner(path: Path):
    """A graph as a function of tensors."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_inputs()]
    return lambda *inputs: torch.from_numpy(
        session.run(None, dict(zip(names, [i.numpy() for i in inputs], strict=True)))[0]
    )


def assert_answers_alike(folder: Path, suffix: str, model, prompt: str, images: list, num_tokens: int) -> None:
    """Vision, embedding and language model one after the other, as docs/export.md says."""
    inputs = tiny.processor(num_tokens)(images, prompt, return_tensors="pt")
    tokens = runner(folder / f"vision.{suffix}")(inputs["pixel_values"])
    embeds = runner(folder / f"embed_tokens.{suffix}")(inputs["input_ids"]).clone()
    places = inputs["input_ids"] == json.loads((folder / "graphs.json").read_text())["image_token_id"]
    embeds[places] = tokens.flatten(0, 1)
    logits = runner(folder / f"language_model.{suffix}")(embeds, inputs["attention_mask"])
    with torch.no_grad():
        wanted = model(**inputs, num_visual_tokens=num_tokens).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.slow
def test_a_graph_of_torch(tokens, tmp_path):
    model = tiny.model()
    chosen = [] if tokens is None else ["--tokens", str(tokens)]
    folder = exported(tmp_path, "--format", "torch", "--part", "all", *chosen, model=model)
    assert verify_folder(folder) is None
    described = json.loads((folder / "graphs.json").read_text())
    assert (described["num_visual_tokens"], described["num_vision_tokens"]) == (tokens or 5, 17)
    two = "USER: <image> and <image>\nWhich? ASSISTANT:"
    assert_answers_alike(folder, "pt2", model, two, tiny.pictures([3, 4]), tokens or 5)


def test_what_no_graph_can_be_made_of(tmp_path, capsys):
    folder = save(tiny.model("mlp"), tmp_path / "model")
    out = str(tmp_path / "x")
    assert main(["export", str(folder), "--format", "torch", "--out", out, "--tokens", "3"]) == 2
    assert "always gives 16 tokens" in capsys.readouterr().err
    gated = tiny.model(fusion="gated_cross_attention")
    gated.save_pretrained(tmp_path / "gated")
    tiny.processor(1, fusion="gated_cross_attention").save_pretrained(tmp_path / "gated")
    assert main(["export", str(tmp_path / "gated"), "--format", "torch", "--part", "all", "--out", out]) == 2
    assert "export --part vision" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    folder = save(tiny.model(), tmp_path / "model")
    monkeypatch.setattr("acformer.export.graph.find_spec", lambda name: None)
    assert main(["export", str(folder), "--format", "onnx", "--out", str(tmp_path / "x")]) == 2
    assert "pip install 'acformer[export]'" in capsys.readouterr().err


def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("acformer.export.graph._read_torch", lambda graph, path: lambda *x: graph.module(*x) + 0.01)
    folder = save(tiny.model(), tmp_path / "model")
    assert main(["export", str(folder), "--format", "torch", "--out", str(tmp_path / "x")]) == 2
    assert "differs from the model by" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


ONNX = pytest.mark.filterwarnings("ignore:.*")


@pytest.mark.extras
@ONNX
@pytest.mark.parametrize("name", tiny.CONNECTORS)
def test_onnx_of_every_connector(name, tmp_path):
    """Compared with the model by the export itself, at two other batches."""
    pytest.importorskip("onnxruntime")
    folder = exported(tmp_path, "--format", "onnx", model=tiny.model(name))
    assert (folder / "vision.onnx").exists()


@pytest.mark.extras
@ONNX
def test_onnx_of_a_whole_model_at_another_budget(tmp_path):
    pytest.importorskip("onnxruntime")
    model = tiny.model(vision="siglip_vision_model", connector_kwargs=tiny.small_options("acformer"))
    folder = exported(tmp_path, "--format", "onnx", "--part", "all", "--tokens", "7", model=model)
    assert_answers_alike(folder, "onnx", model, ASK, [tiny.picture(5)], 7)


@pytest.mark.extras
@ONNX
@pytest.mark.parametrize("selector", ["anchors", "cls_topk", "diverse", "grid", "norm", "spaced"])
def test_onnx_chooses_the_same_patches(selector, tmp_path):
    """Also where many scores are equal: the lower index goes first there, too."""
    pytest.importorskip("onnxruntime")
    from acformer.anchors.selectors import SELECTORS
    from acformer.vision.features import VisionFeatures

    class Choice(torch.nn.Module):
        def forward(self, tokens, row):
            return SELECTORS[selector](VisionFeatures(tokens, row, (4, 4), 1), 6)

    batch = torch.export.Dim("batch")
    example = torch.randn(2, 17, 8), torch.rand(2, 4, 16).softmax(-1)
    made = torch.onnx.export(
        Choice(), example, dynamo=True, dynamic_shapes={"tokens": {0: batch}, "row": {0: batch}}, verbose=False
    )
    made.save(tmp_path / "choice.onnx")
    tied = torch.randint(3, (5, 4, 16), generator=torch.Generator().manual_seed(1)).float() / 4
    for tokens, row in ((torch.randn(5, 17, 8), torch.rand(5, 4, 16)), (torch.randn(5, 17, 8), tied)):
        assert torch.equal(runner(tmp_path / "choice.onnx")(tokens, row), Choice()(tokens, row))
