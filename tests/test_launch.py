"""The files in examples/launch are read by what they are for, and the recipes that they name load."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tiny
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from acformer import cli
from acformer.training.recipe import load_recipe
from acformer.training.sharding import BUCKET, LIVE, named_sharding

FOLDER = Path(__file__).parents[1] / "examples/launch"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
DEEPSPEED = {2: FOLDER / "zero2.json", 3: FOLDER / "zero3.json"}


class DeepSpeedFile(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """What transformers makes of a file; where DeepSpeed is not installed, it leaves accelerate's half of it out."""

    def __init__(self, path: Path):
        HfDeepSpeedConfig.__init__(self, str(path))
        self._dtype, self.mismatches = None, []


def test_accelerate_reads_every_key():
    path = FOLDER / "fsdp2.yaml"
    config = ClusterConfig.from_yaml_file(path)
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= options


def test_the_layers_that_are_wrapped_are_the_recipes():
    """In the model itself: a name that no module has would leave it in one piece."""
    wrapped = ClusterConfig.from_yaml_file(FOLDER / "fsdp2.yaml").fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    assert set(wrapped.split(",")) <= {type(module).__name__ for module in tiny.model().modules()}


@pytest.mark.parametrize("stage", DEEPSPEED)
def test_transformers_fills_the_deepspeed_files(stage, tmp_path):
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        bf16=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    config = DeepSpeedFile(DEEPSPEED[stage])
    config.trainer_config_process(args)
    config.trainer_config_finalize(args, tiny.model(), 100)
    assert not config.mismatches
    assert "auto" not in str(config.config)
    assert config.config["train_batch_size"] == 8
    assert config.config["bf16"]["enabled"] is True
    assert named_sharding({"deepspeed": str(DEEPSPEED[stage])}) == f"zero{stage}"


@pytest.mark.parametrize("stage", DEEPSPEED)
def test_the_plan_counts_the_buckets_of_these_files(stage):
    zero = DeepSpeedFile(DEEPSPEED[stage]).config["zero_optimization"]
    assert zero["reduce_bucket_size"] == BUCKET
    assert zero.get("stage3_max_live_parameters", LIVE) == LIVE


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    text = path.read_text()
    (recipe,) = re.findall(r"RECIPE=\$\{1:-(.*?)\}", text)
    assert load_recipe(recipe)
    for name in re.findall(r"examples/launch/([\w.]+)", text):
        assert (FOLDER / name).is_file()


@pytest.mark.parametrize("path", [*SCRIPTS, FOLDER / "fsdp2.yaml"], ids=lambda path: path.name)
def test_heads_say_what_was_tried(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "hardware", "tested"):
        assert any(line.split()[1:2] == [word] for line in head), word
    assert any("never run by us on GPUs" in line for line in head)


def test_two_machines_make_the_papers_batch():
    text = (FOLDER / "two_nodes.sh").read_text()
    overrides = re.findall(r"\S+\.training\.\S+=\S+", text)
    recipe, paper = load_recipe("llava15-7b-acformer145", overrides), load_recipe("llava15-7b-acformer145")
    for (_, ours), (_, theirs) in zip(recipe.stages(), paper.stages(), strict=True):
        key = "per_device_train_batch_size"
        assert 16 * ours.training[key] == 8 * theirs.training[key]


def test_commands_of_the_table_are_taken():
    found = re.findall(r"`([^`]*acformer\.cli[^`]*)`", (FOLDER / "README.md").read_text())
    assert len(found) == 3
    for command in found:
        words = shlex.split(command)
        arguments = cli._parse(words[words.index("acformer.cli") + 1 :])
        assert load_recipe(arguments.recipe, arguments.overrides)


def test_every_file_is_in_the_table():
    table = (FOLDER / "README.md").read_text()
    assert all(f"`{path.name}`" in table for path in FOLDER.iterdir() if path.name != "README.md")
