"""Folders of strangers: no code of theirs runs, no file outside is read, each is refused in one line.

A canary is a file that any code which comes along with a folder would touch; standard input says `y` to every question.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers
import yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

from acformer.cli import main
from acformer.connectors import Geometry, build_connector
from acformer.data.samples import Sample
from acformer.errors import AcFormerError, CheckpointError, UsageError
from acformer.evaluate.generate import answer, ask
from acformer.hf import AcFormerForConditionalGeneration, AcFormerProcessor
from acformer.hf.build import build_model
from acformer.hf.checkpoints import load_model
from acformer.hf.configuration_acformer import context_length
from acformer.hf.convert import mlp_from_llava
from acformer.vision.encoder import load_vision_encoder

PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "CLIPImageProcessor"}
CODE = """
open({canary!r}, "w").close()
from transformers import CLIPVisionConfig as Config, CLIPVisionModel as Model, PreTrainedTokenizerFast as Tokenizer
from transformers import CLIPImageProcessor as Pixels, ProcessorMixin as Processor
def generate(*args, **kwargs): raise SystemExit
"""
AUTO = {
    "AutoConfig": "evil.Config",
    "AutoModel": "evil.Model",
    "AutoModelForCausalLM": "evil.Model",
    "AutoModelForImageTextToText": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"],
    "AutoImageProcessor": "evil.Pixels",
    "AutoProcessor": "evil.Processor",
}


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """What no one may touch; questions are answered with yes, kernels from a hub with a touch."""
    path = tmp_path / "canary"
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *name, **_: path.touch())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield path
    assert not path.exists(), "code of a stranger has run"


@pytest.fixture
def photo(tmp_path) -> Path:
    tiny.picture().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def model(tmp_path) -> Path:
    """A whole model of ours."""
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def vision(tmp_path) -> Path:
    """An encoder as on the hub."""
    folder = tmp_path / "vision"
    AutoModel.from_config(tiny.config().vision_config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    """A language model as on the hub."""
    folder = tmp_path / "text"
    AutoModelForCausalLM.from_config(tiny.config().text_config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def edit(file: Path, change) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    change(values)
    file.write_text(json.dumps(values))


def with_code(folder: Path, canary: Path, file: str, **fields) -> None:
    """The folder's file names a type that transformers does not know, and where its code is."""
    (folder / "evil.py").write_text(CODE.format(canary=str(canary)))
    edit(folder / file, lambda values: values.update(fields, auto_map=AUTO))


def unknown_config(folder, canary):
    with_code(folder, canary, "config.json", model_type="unheard_of")


def unknown_tokenizer(folder, canary):
    unknown_type = {"tokenizer_class": "UnheardOfTokenizer"}
    with_code(folder, canary, "tokenizer_config.json", **unknown_type)
    edit(folder / "config.json", lambda values: values.update(tokenizer_class=None))


def unknown_part(part):
    def change(folder, canary):
        unknown = {"model_type": "unheard_of", "auto_map": AUTO, "_name_or_path": str(folder)}
        with_code(folder, canary, "config.json")
        edit(folder / "config.json", lambda values: values[part].update(unknown))

    return change


def unknown_image_processor(folder, canary):
    unknown = {"image_processor_type": "UnheardOfImageProcessor", "auto_map": AUTO}
    with_code(folder, canary, "preprocessor_config.json", **unknown)
    edit(folder / "processor_config.json", lambda values: values.update(auto_map=AUTO, image_processor=unknown))


def kernel(*path, value="stranger/kernel"):
    def change(folder, canary):
        def put(values):
            for key in path[:-1]:
                values = values[key]
            values[path[-1]] = value

        edit(folder / "config.json", put)

    return change


def pickled_weights(folder, canary):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(canary)}, folder / "pytorch_model.bin")


def index_outside(name):
    def change(folder, canary):
        weights = folder / "model.safetensors"
        outside = folder.parent / "outside.safetensors"
        shutil.move(weights, outside)
        with safe_open(outside, "pt") as file:
            keys = list(file.keys())
        where = name.format(outside=outside)
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, where)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def weights_outside(folder, canary):
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    edit(folder / "config.json", lambda values: values.update(transformers_weights="../outside.safetensors"))


IN_ANY_MODEL = {
    "config": unknown_config,
    "pickle": pickled_weights,
    "index above": index_outside("../outside.safetensors"),
    "index elsewhere": index_outside("{outside}"),
    "weights above": weights_outside,
    "kernel": kernel("attn_implementation"),
    "kernel inside": kernel("_attn_implementation"),
    "kernel by part": kernel("attn_implementation", value={"": "sdpa", "text_config": "stranger/kernel@v1:run"}),
}
IN_OURS = {
    **IN_ANY_MODEL,
    "tokenizer": unknown_tokenizer,
    "image processor": unknown_image_processor,
    "vision part": unknown_part("vision_config"),
    "text part": unknown_part("text_config"),
    "kernel of the encoder": kernel("vision_config", "attn_implementation"),
    "kernel of the language model": kernel("text_config", "_attn_implementation"),
    "paged kernel": kernel("text_config", "attn_implementation", value="paged|stranger/kernel"),
    "experts": kernel("text_config", "experts_implementation"),
    "endless layers": kernel("text_config", "num_hidden_layers", value=10**12),
}
IN_TEXT = {**IN_ANY_MODEL, "tokenizer": unknown_tokenizer}


def refused(capsys, *arguments) -> str:
    """The one line that a refused command says; exit code 4."""
    code = main([str(argument) for argument in arguments])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("acformer: error: ")]
    assert (code, len(said)) == (4, 1), said
    return said[0]


def recipe(tmp_path: Path, **model) -> Path:
    """A run of one step on one record."""
    tiny.picture().save(tmp_path / "0.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}]))
    stage = {"data": str(tmp_path / "data.json"), "learning_rates": {"connector": 1e-3}, "training": {"max_steps": 1}}
    values = {"finetune": stage, "output_dir": str(tmp_path / "run"), **model}
    values.setdefault("model", {"vision": "x", "text": "y"})["connector_kwargs"] = tiny.CONNECTORS["acformer"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize("kind", IN_OURS)
def test_a_model_of_ours_is_data(kind, model, photo, canary, capsys, tmp_path):
    IN_OURS[kind](model, canary)
    with pytest.raises(CheckpointError) as caught:
        load_model(str(model))
    assert "\n" not in str(caught.value)
    assert str(caught.value) in refused(capsys, "ask", model, photo, "what?", "--device", "cpu", "--quiet")


@pytest.mark.parametrize("kind", ["config", "tokenizer", "pickle", "kernel", "index above"])
def test_every_command_that_loads_refuses(kind, model, canary, capsys, tmp_path):
    IN_OURS[kind](model, canary)
    path = recipe(tmp_path, from_model=str(model))
    data = tmp_path / "data.json"
    refused(capsys, "eval", model, "--data", data, "--device", "cpu", "--quiet")
    refused(capsys, "train", path, "--quiet")


@pytest.mark.parametrize("kind", IN_OURS)
def test_transformers_own_ways_to_our_classes(kind, model, canary):
    """What transformers loads without us it may, but nothing runs."""
    IN_OURS[kind](model, canary)
    for load in (
        AcFormerForConditionalGeneration.from_pretrained,
        AcFormerProcessor.from_pretrained,
        *([] if kind == "config" else [AutoModelForImageTextToText.from_pretrained, AutoProcessor.from_pretrained]),
    ):
        try:
            load(str(model))
        except (AcFormerError, OSError, ValueError, KeyError, TypeError, AttributeError):
            assert not canary.exists()


def test_a_custom_generate_does_not_replace_ours(model, photo, canary):
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(CODE.format(canary=str(canary)))
    assert ask(*load_model(str(model)), photo, "what?", max_new_tokens=2)


@pytest.mark.parametrize("kind", IN_ANY_MODEL)
def test_an_encoder_is_data(kind, vision, text, canary, capsys, tmp_path):
    IN_ANY_MODEL[kind](vision, canary)
    with pytest.raises(CheckpointError):
        load_vision_encoder(str(vision))
    refused(capsys, "train", recipe(tmp_path, model={"vision": str(vision), "text": str(text)}), "--quiet")


@pytest.mark.parametrize("kind", IN_TEXT)
def test_a_language_model_is_data(kind, vision, text, canary, capsys, tmp_path):
    IN_TEXT[kind](text, canary)
    with pytest.raises(CheckpointError):
        build_model(str(vision), str(text))
    refused(capsys, "train", recipe(tmp_path, model={"vision": str(vision), "text": str(text)}), "--quiet")


def test_the_whole_folders_are_taken(vision, text, model, photo, canary, capsys):
    """What the tests above change is all that is wrong with them."""
    built, processor = build_model(str(vision), str(text), connector_kwargs=tiny.CONNECTORS["acformer"])
    assert ask(built.eval(), processor, photo, "what?", max_new_tokens=2) is not None
    assert main(["ask", str(model), str(photo), "what?", "--device", "cpu", "--max-new-tokens", "2"]) == 0
    assert load_vision_encoder(str(vision)).tower.config.model_type == "clip_vision_model"


def test_code_that_is_not_needed_does_not_stand_in_the_way(model, photo, canary):
    """As with many models on the hub: the folder brings code, and transformers knows the type."""
    (model / "evil.py").write_text(CODE.format(canary=str(canary)))
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        edit(model / file, lambda values: values.update(auto_map=AUTO))
    for part in ("vision_config", "text_config"):
        edit(model / "config.json", lambda values, part=part: values[part].update(auto_map=AUTO))
    assert ask(*load_model(str(model)), photo, "what?", max_new_tokens=2)
    assert AutoModelForImageTextToText.from_pretrained(model)
    assert AutoProcessor.from_pretrained(model)


@pytest.mark.slow
def test_without_a_terminal_nothing_waits(model, canary):
    """In a process of its own, with `y` on standard input."""
    unknown_tokenizer(model, canary)
    command = [sys.executable, "-m", "acformer.cli", "ask", str(model), "what?", "--device", "cpu"]
    result = subprocess.run(command, input="y\ny\n", capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr.startswith("acformer: error: cannot load")
    assert "code" in result.stderr


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", '"x"', "[" * 100_000, "\ufeff{}", "<html>", None])
def test_files_that_are_none(file, content, model):
    (model / file).unlink() if content is None else (model / file).write_text(content)
    if (file, content) == ("tokenizer_config.json", None):
        assert load_model(str(model)), "transformers does without it"
        return
    with pytest.raises(CheckpointError) as caught:
        load_model(str(model))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_mean", None),
        ("image_mean", ["a"] * 3),
        ("image_std", None),
        ("image_std", [0, 0.5, 0.5]),
        ("size", {"shortest_edge": 10**6}),
        ("crop_size", {"height": 24, "width": 24}),
        ("rescale_factor", 1e308),
        ("image_processor_type", "Nothing"),
    ],
)
def test_image_processors_that_make_no_pixels(field, value, model, photo, capsys):
    edit(model / "processor_config.json", lambda values: values["image_processor"].update({field: value}))
    refused(capsys, "ask", model, photo, "what?", "--device", "cpu", "--quiet")


@pytest.mark.parametrize("field", ["image_mean", "image_std"])
@pytest.mark.parametrize("value", [None, [0, 0, 0], [0.5], 0.5, ["a"] * 3, [float("nan")] * 3, "absent"])
def test_encoders_without_statistics(field, value, vision, text, capsys, tmp_path):
    def change(values):
        values.pop(field)
        if value != "absent":
            values[field] = value

    edit(vision / "preprocessor_config.json", change)
    path = recipe(tmp_path, model={"vision": str(vision), "text": str(text)})
    if (field, value) == ("image_mean", [0, 0, 0]):
        return  # a mean of nothing is one
    assert "image_mean and image_std" in refused(capsys, "train", path, "--quiet")


# Adapters.


@pytest.fixture
def adapter(model, tmp_path, photo):
    """(folder of a LoRA adapter, the wrapped model, what it says)."""
    torch.manual_seed(0)
    modules = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["connector"]}
    config = LoraConfig(r=2, init_lora_weights=False, **modules)
    base, processor = load_model(str(model))
    wrapped = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                weight.mul_(3)
    said = ask(wrapped, processor, photo, "what?", max_new_tokens=8)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", wrapped, said


def test_a_wrapped_model_answers_with_its_adapter(adapter, model, photo):
    _, wrapped, said = adapter
    _, processor = load_model(str(model))
    with wrapped.disable_adapter():
        assert ask(wrapped, processor, photo, "what?", max_new_tokens=8) != said
    assert list(answer(wrapped, processor, [sample("0", photo)], max_new_tokens=8, progress=False)) == [said]
    prompt = processor.apply_chat_template(list(sample("0", photo).messages), add_generation_prompt=True)
    inputs = processor(photo, prompt, return_tensors="pt")
    ids = wrapped.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert processor.decode(ids[0, len(inputs["input_ids"][0]) :], skip_special_tokens=True).strip() == said


def test_an_adapter_beside_the_model_cannot_be_unwrapped(model, photo):
    base, processor = load_model(str(model))
    wrapped = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
    with pytest.raises(UsageError, match="an adapter of PEFT type PROMPT_TUNING cannot answer here"):
        ask(wrapped, processor, photo, "what?")


def sample(key, *images, words="what?"):
    parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": words}]
    return Sample(key, ({"role": "user", "content": parts},), images)


def test_an_adapters_folder_is_a_model(adapter, model, photo, capsys, tmp_path):
    folder, _, said = adapter
    assert ask(*load_model(str(folder)), photo, "what?", max_new_tokens=8) == said
    command = ["ask", str(folder), str(photo), "what?", "--max-new-tokens", "8", "--device", "cpu", "--quiet"]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == said
    recipe(tmp_path)
    assert main(["eval", str(folder), "--data", str(tmp_path / "data.json"), "--device", "cpu", "--quiet"]) == 0
    assert (folder / "eval/scores.json").exists() or list(folder.glob("eval/**/scores.json"))


def test_adapters_that_cannot_be_used(adapter, model, canary, capsys, tmp_path):
    folder, _, _ = adapter
    whole = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    def config(**fields):
        edit(folder / "adapter_config.json", lambda values: values.update(fields))

    changes = {
        "holds a model and an adapter": lambda: (folder / "config.json").write_text("{}"),
        "without adapter_model.safetensors": lambda: (
            (folder / "adapter_model.safetensors").unlink(),
            torch.save({"x": Touch(canary)}, folder / "adapter_model.bin"),
        ),
        "would import a module": lambda: config(megatron_config={"a": 1}, megatron_core="evil"),
        "does not name its base": lambda: config(base_model_name_or_path=None),
        "there is no such folder": lambda: config(base_model_name_or_path=str(tmp_path / "gone")),
        "an adapter itself": lambda: config(base_model_name_or_path=str(folder)),
        "no config of an adapter": lambda: (folder / "adapter_config.json").write_text("[]"),
        "weights do not fit": lambda: config(target_modules=["q_proj", "k_proj", "v_proj"]),
        "cannot load": lambda: config(r=3),
    }
    for message, change in changes.items():
        change()
        assert message in refused(capsys, "ask", folder, "what?", "--device", "cpu", "--quiet"), message
        for file in folder.iterdir():
            if file.is_file():
                file.unlink()
        for name, content in whole.items():
            (folder / name).write_bytes(content)
    assert load_model(str(folder))


def test_an_adapter_of_a_hostile_base_is_refused(adapter, model, canary, capsys):
    unknown_tokenizer(model, canary)
    assert "never run" in refused(capsys, "ask", adapter[0], "what?", "--device", "cpu", "--quiet")


def test_peft_is_asked_for_in_one_line(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"needs peft: pip install 'acformer\[peft\]'"):
        load_model(str(adapter[0]))


# Weights of LLaVA.


def llava_file(path: Path, geometry: Geometry, prefix="model.mm_projector.") -> dict[str, torch.Tensor]:
    vision, text = geometry.vision_hidden_size, geometry.text_hidden_size
    shapes = {"0.weight": (text, vision), "0.bias": (text,), "2.weight": (text, text), "2.bias": (text,)}
    weights = {prefix + name: torch.randn(shape, dtype=torch.float16) for name, shape in shapes.items()}
    (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    return weights


@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", ""])
def test_llavas_projector_is_our_mlp(name, prefix, tmp_path):
    geometry = tiny.config().geometry
    weights = llava_file(tmp_path / name, geometry, prefix)
    connector = mlp_from_llava(tmp_path / name, geometry).float()
    features = torch.randn(1, 17, geometry.vision_hidden_size)
    expected = features[:, 1:]
    for place in (0, 2):
        layer = (weights[f"{prefix}{place}.{part}"].float() for part in ("weight", "bias"))
        expected = torch.nn.functional.linear(expected, *layer)
        expected = torch.nn.functional.gelu(expected) if place == 0 else expected
    given = connector.zero_features()._replace(tokens=features)
    torch.testing.assert_close(connector(given), expected)
    ours = build_connector("mlp", geometry)
    ours.load_state_dict(connector.state_dict())
    assert all(parameter.requires_grad for parameter in connector.parameters())


def test_llavas_first_projector_is_our_linear(tmp_path):
    geometry = tiny.config().geometry
    shape = geometry.text_hidden_size, geometry.vision_hidden_size
    weights = {"model.mm_projector.weight": torch.randn(shape), "model.mm_projector.bias": torch.zeros(shape[0])}
    torch.save(weights, tmp_path / "a.bin")
    projector = mlp_from_llava(tmp_path / "a.bin", geometry).projector
    assert torch.equal(projector.weight, weights["model.mm_projector.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!doctype html>", "a page or JSON, not weights"),
        (b"", "is empty, not weights"),
        (b"nothing", "cannot read|more than weights"),
        ({"0.layers.0.0.to_q.weight": torch.zeros(2, 2)}, r"holds 1 weights \(0\.layers\.0\.0\.to_q\.weight \(2, 2\)"),
        ({"model.mm_projector.0.weight": torch.zeros(2, 2)}, r"where LLaVA's projector is 0\.weight"),
        ({"optimizer": {"step": 3}}, "no dict of weights"),
        ([1, 2], "no dict of weights"),
        ({"a": Path("x")}, "could run code"),
        (None, "No such file"),
    ],
)
def test_what_is_no_projector_is_named(content, message, tmp_path):
    path = tmp_path / "mm_projector.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        mlp_from_llava(path, tiny.config().geometry)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_projector_that_is_a_program_is_refused(tmp_path, canary):
    torch.save({"model.mm_projector.0.weight": Touch(canary)}, tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match="could run code"):
        mlp_from_llava(tmp_path / "mm_projector.bin", tiny.config().geometry)


# The context of a language model.


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("llama", {"max_position_embeddings": 100}, 100),
        ("gpt2", {"n_positions": 100}, 100),
        ("bloom", {}, None),
        ("llama", {"max_position_embeddings": 100, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 400),
        (
            "qwen2",
            {
                "max_position_embeddings": 100,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50},
            },
            200,
        ),
        (
            "llama",
            {
                "max_position_embeddings": 1000,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
            1000,
        ),
    ],
)
def test_context_length(kind, fields, expected):
    config: PreTrainedConfig = transformers.CONFIG_MAPPING[kind](**fields)
    assert context_length(config) == expected


def test_context_length_of_a_whole_model():
    assert context_length(tiny.config()) == 1024


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("config.json", ("text_config", "output_hidden_states"), "x", "output_hidden_states of its text_config is 'x'"),
        ("config.json", ("vision_config", "output_hidden_states"), 0.5, "of its vision_config is 0.5, not true or"),
        ("config.json", ("text_config", "return_dict"), {}, "return_dict of its text_config is {}, not true or false"),
        ("config.json", ("vision_config", "num_attention_heads"), -1, "num_attention_heads of its vision_config is -1"),
        ("generation_config.json", ("output_hidden_states",), {"a": 1}, "of its generation_config is {'a': 1}"),
        ("generation_config.json", ("bos_token_id",), {}, "bos_token_id of its generation_config is {}, not the id"),
        ("generation_config.json", ("eos_token_id",), [1, "x"], "eos_token_id of its generation_config is [1, 'x']"),
    ],
)
def test_fields_of_a_saved_model_that_are_none(tmp_path, file, path, value, message):
    tiny.model().save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / file).read_text())
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / file).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_model(str(tmp_path))


def test_outputs_are_read_by_name_whatever_a_config_says(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.processor().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["text_config"]["return_dict"] = None
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert ask(*load_model(str(tmp_path)), tiny.picture(), "hi", max_new_tokens=2) is not None
