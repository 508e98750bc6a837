"""Adapters and few bits in a recipe's stage: what learns, what is saved, who can load it, what is refused."""

import json
import logging
import shutil

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import data, recipe, weights  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM

from acformer import cli
from acformer.errors import CheckpointError, UsageError
from acformer.evaluate.generate import ask
from acformer.hf.adapters import adapter_base, load_adapter
from acformer.hf.checkpoints import load_model, verify_folder, write_manifest
from acformer.hf.quantize import quantized
from acformer.training.lora import LoraSpec, add_adapters
from acformer.training.recipe import load_recipe
from acformer.training.stages import train
from acformer.training.trainer import AcFormerTrainer

LORA = [
    "finetune.lora={r: 4, alpha: 8, dropout: 0.1}",
    "finetune.learning_rates={connector: 0.01, language_model: 0.02}",
]
ONE = ["stage=finetune", "pretrain=null"]
SAVE = ["finetune.training.save_strategy=steps", "finetune.training.save_steps=2", "finetune.training.max_steps=4"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adapter_weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def logits(model, processor):
    image = Image.new("RGB", (20, 14), (200, 30, 30))
    prompt = processor(image, "USER: <image>\nWhich colour? ASSISTANT:", return_tensors="pt")
    return model(**prompt).logits


def with_adapter(folder):
    """The base with the adapter beside its weights, as it was trained."""
    base, processor = load_model(adapter_base(folder))
    add_adapters(base, LoraSpec(r=4, alpha=8, dropout=0.1))
    load_adapter(base, folder)
    return base.eval(), processor


@pytest.fixture
def text(data, tmp_path):  # noqa: F811
    """A language model with its tokenizer in a folder, and the recipe's override."""
    folder = tmp_path / "text"
    AutoModelForCausalLM.from_config(tiny.config().text_config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return f"model.text={folder}"


@pytest.fixture
def trainers(monkeypatch):
    """The trainers of a run, with their optimizer's groups at the first step."""
    loss, seen = AcFormerTrainer.compute_loss, []

    def watched(self, model, inputs, *args, **kwargs):
        if self not in seen:
            seen.append(self)
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AcFormerTrainer, "compute_loss", watched)
    return seen


def test_adapters_and_connector_learn_and_are_saved(recipe, tmp_path, trainers, caplog):  # noqa: F811
    with caplog.at_level(logging.INFO, logger="acformer"):
        folder = train(recipe(*LORA), progress=False)
    assert verify_folder(folder) is None
    assert not (folder / "model.safetensors").exists()
    assert "lr 0.02 of which" in caplog.text
    names = {name.removeprefix("base_model.model.") for name in adapter_weights(folder)}
    assert not any("vision_tower" in name for name in names)
    assert all("lora_" in name or name.startswith("model.connector.") for name in names)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 8, ["connector"])
    assert config["base_model_name_or_path"] == "../../pretrain/model"
    groups = trainers[-1].optimizer.param_groups
    assert sorted(group["initial_lr"] for group in groups) == [0.01, 0.02]
    model = trainers[-1].model
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {n.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.") for n in names}
    start = weights(tmp_path / "run/pretrain/model")
    assert not torch.equal(
        adapter_weights(folder)["base_model.model.model.connector.projector.0.weight"],
        start["model.connector.projector.0.weight"],
    )
    state = model.state_dict()
    frozen = [name for name in start if not name.startswith("model.connector.")]
    assert all(
        torch.equal(state.get(n, state.get(n.replace(".weight", ".base_layer.weight"))), start[n]) for n in frozen
    )


@pytest.mark.slow
def test_every_command_loads_it_and_merge_makes_an_ordinary_model(recipe, tmp_path, data, capsys, trainers):  # noqa: F811
    folder = train(recipe(*LORA), progress=False)
    trained, (merged, processor) = trainers[-1].model.eval(), load_model(str(tmp_path / "run"))
    expected = logits(trained, processor)
    torch.testing.assert_close(logits(*with_adapter(folder)), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(merged, processor), expected, rtol=0, atol=1e-5)
    assert cli.main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "whole")]) == 0
    assert verify_folder(tmp_path / "whole") is None
    whole, again = load_model(str(tmp_path / "whole"))
    torch.testing.assert_close(logits(whole, again), expected, rtol=0, atol=1e-5)
    assert not [name for name in weights(tmp_path / "whole") if "lora" in name]
    said = ask(whole, again, data / "0.png", "Which colour?", max_new_tokens=4)
    capsys.readouterr()
    for name in ("run", "run/finetune/model", "whole"):
        command = [
            "ask",
            str(tmp_path / name),
            str(data / "0.png"),
            "Which colour?",
            "--max-new-tokens",
            "4",
            "--quiet",
        ]
        assert cli.main([*command, "--device", "cpu"]) == 0
        assert capsys.readouterr().out.strip() == said
    assert cli.main(["merge", str(folder), "--out", str(tmp_path / "whole")]) == 4
    assert "whole is not empty: name a new folder" in capsys.readouterr().err


def test_a_run_can_be_moved_and_a_base_that_is_gone_is_told(recipe, tmp_path):  # noqa: F811
    train(recipe(*LORA), progress=False)
    before = logits(*load_model(str(tmp_path / "run")))
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert torch.equal(logits(*load_model(str(tmp_path / "elsewhere"))), before)
    shutil.rmtree(tmp_path / "elsewhere/pretrain")
    with pytest.raises(CheckpointError, match=r"no model in .*elsewhere/pretrain/model: there is no such folder"):
        load_model(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.slow
def test_resume_is_exact_and_without_stage_one_there_is_a_base(recipe, tmp_path, text, pretrained):  # noqa: F811
    own = [*ONE, *LORA, *SAVE, *([text] if pretrained else [])]
    whole = adapter_weights(train(recipe(*own, f"output_dir={tmp_path}/whole"), progress=False))
    stopped = train(recipe(*own), progress=False)
    base = stopped.parent / "base"
    assert verify_folder(base) is None
    assert (base / "connector.safetensors").exists() is pretrained
    assert (base / "model.safetensors").exists() is not pretrained
    for name in ("model", "checkpoint-4"):
        (stopped.parent / name / "adapter_model.safetensors").unlink()
    checkpoint = stopped.parent / "checkpoint-2"
    assert not (checkpoint / "model.safetensors").exists()
    assert verify_folder(checkpoint) is None
    load_model(str(checkpoint))
    assert same(adapter_weights(train(recipe(*own), progress=False)), whole)


def test_an_adapter_of_other_targets_is_not_gone_on_from(recipe, tmp_path):  # noqa: F811
    own = [*ONE, *LORA, *SAVE]
    stopped = train(recipe(*own), progress=False)
    for name in ("model", "checkpoint-4"):
        (stopped.parent / name / "adapter_model.safetensors").unlink()
    checkpoint = stopped.parent / "checkpoint-2"
    path = checkpoint / "adapter_model.safetensors"
    from safetensors.torch import save_file

    found = adapter_weights(checkpoint)
    save_file({n: w for n, w in found.items() if "self_attn.q_proj" not in n}, path, metadata={"format": "pt"})
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"4 weights do not fit the adapter's config, first: .*q_proj"):
        train(recipe(*own), progress=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["finetune.lora={targets: [q_prj]}"], r"finetune: unknown linear layer .* 'q_prj'; did you mean 'q_proj'"),
        (["finetune.lora={targets: [fc1]}"], "finetune: unknown linear layer .* 'fc1'"),  # the encoder has it
        (["finetune.save=connector"], "finetune.save: connector would lose language_model"),
        (["finetune.save=conector"], "unknown finetune.save 'conector'; did you mean 'connector'"),
        (
            ["finetune.lora={}", "finetune.save=connector"],
            "with lora, adapters and connector are saved; leave save out",
        ),
        (["pretrain.quantize=nf4"], "not worth saving; add pretrain.save=connector"),
        (["pretrain.save=connector"], r"would lose the new language model \(model.text\)"),
        (
            ["pretrain.lora={}", "finetune.lora={}", "pretrain.learning_rates.language_model=0.1"],
            "pretrain has adapters too; run it alone and merge",
        ),
    ],
)
def test_what_cannot_be_is_told_before_anything_trains(recipe, tmp_path, overrides, message):  # noqa: F811
    with pytest.raises(UsageError, match=message):
        train(recipe(*overrides), progress=False)
    assert not list((tmp_path / "run").glob("*"))


def test_packages_that_are_missing_are_told_before_anything_trains(recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="finetune: quantize needs bitsandbytes, which is not installed: pip install"):
        train(recipe(*LORA, "finetune.quantize=nf4"), progress=False)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(
        UsageError, match=r"finetune: lora needs PEFT, which is not installed: pip install 'acformer\[peft"
    ):
        train(recipe(*LORA), progress=False)
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.slow
def test_adapters_on_an_adapter_are_refused(recipe, tmp_path):  # noqa: F811
    folder = train(recipe(*ONE, *LORA), progress=False)
    again = [*ONE, *LORA, f"from_model={folder}", f"output_dir={tmp_path}/second"]
    with pytest.raises(
        CheckpointError, match=r"finetune.lora: .* is an adapter itself: merge it first \(acformer merge\)"
    ):
        train(recipe(*again), progress=False)
    assert cli.main(["merge", str(folder), "--out", str(tmp_path / "merged"), "--quiet"]) == 0
    second = train(recipe(*again[:-2], f"from_model={tmp_path}/merged", again[-1]), progress=False)
    assert adapter_base(second) == str(tmp_path / "merged")


def test_weights_that_do_not_learn_are_in_the_dtype_of_the_arithmetic(recipe, tmp_path, trainers, text):  # noqa: F811
    half = [f"{stage}.training.bf16=true" for stage in ("pretrain", "finetune")]
    folder = train(recipe(text, *LORA, *half), progress=False)
    for trainer in trainers:
        for name, parameter in trainer.model.named_parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    assert json.loads((tmp_path / "run/pretrain/model/config.json").read_text())["dtype"] == "float32"
    assert {p.dtype for p in load_model(str(folder))[0].parameters()} == {torch.float32}
    assert {w.dtype for w in adapter_weights(folder).values()} == {torch.float32}


def test_the_shipped_recipe_is_taken():
    """All that `acformer train` looks at before it builds."""
    shipped = load_recipe("llava15-7b-acformer145-lora")
    assert (shipped.finetune.lora.r, shipped.pretrain.save) == (16, "connector")


@pytest.mark.slow
def test_a_plan_that_starts_from_an_adapter(recipe):  # noqa: F811
    from acformer.training.plan import Hardware, plan

    folder = train(recipe(*ONE, *LORA), progress=False)
    (stage,) = plan(recipe(*ONE, f"from_model={folder}"), Hardware()).stages
    assert stage.trained["language_model"] == sum(
        p.numel() for n, p in load_model(str(folder))[0].named_parameters() if "language_model" in n or "lm_head" in n
    )


# Few bits (bitsandbytes, which runs on a CPU).


def in_few_bits(kind, folder):
    """The base in few bits with the adapter beside its weights, as it was trained."""
    base, processor = load_model(adapter_base(folder))
    model = quantized(base, kind, torch.float32, "cpu")
    add_adapters(model, LoraSpec(r=4, alpha=8, dropout=0.1))
    load_adapter(model, folder)
    return model.eval(), processor


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_over_few_bits(recipe, tmp_path, trainers, kind, data):  # noqa: F811
    own = [*LORA, *SAVE, f"finetune.quantize={kind}", "model.text.hidden_size=64"]
    folder = train(recipe(*own), progress=False)
    trained = trainers[-1].model.eval()
    kinds = {type(m).__name__ for n, m in trained.named_modules() if n.endswith("base_layer")}
    assert kinds == {"Linear4bit" if kind == "nf4" else "Linear8bitLt"}
    others = [m for n, m in trained.named_modules() if "language_model" not in n and isinstance(m, torch.nn.Linear)]
    assert {type(m) for m in others} >= {torch.nn.Linear}
    assert not {type(m).__name__ for m in others} & {"Linear4bit", "Linear8bitLt"}
    model, processor = in_few_bits(kind, folder)
    assert torch.equal(logits(model, processor), logits(trained, processor))
    said = ask(trained, processor, data / "0.png", "Which colour?", max_new_tokens=4)
    assert ask(model, processor, data / "0.png", "Which colour?", max_new_tokens=4) == said
    merged, _ = load_model(str(tmp_path / "run"))  # into the weights as they were
    torch.testing.assert_close(logits(merged, processor), logits(trained, processor), rtol=0, atol=0.2)
    whole = adapter_weights(folder)
    for name in ("model", "checkpoint-4"):
        (folder.parent / name / "adapter_model.safetensors").unlink()
    assert same(adapter_weights(train(recipe(*own), progress=False)), whole)


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore")
def test_stage_one_over_few_bits_saves_the_connector(recipe, tmp_path, text):  # noqa: F811
    folder = train(recipe("stage=pretrain", "pretrain.quantize=nf4", "pretrain.save=connector", text), progress=False)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["connector.safetensors"]
    model, _ = load_model(str(folder))
    assert not getattr(model, "is_quantized", False)


def test_a_peft_that_transformers_finds_too_old_is_told_before_anything_trains(recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    with pytest.raises(UsageError, match=r"finetune: lora, with transformers .* >= 99\.0"):
        train(recipe(*LORA), progress=False)
    assert not (tmp_path / "run/pretrain/model").exists()
