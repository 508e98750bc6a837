"""The bench: rooflines against a FLOP counter, memory and turns checked by hand, what each command writes."""

import json
import math
import shlex
import subprocess
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig

from acformer import cli, provenance
from acformer.anchors.search import select_anchors_reference
from acformer.connectors import Geometry, build_connector, list_connectors
from acformer.errors import DataError, UsageError
from acformer.lab.bench import growth, harness, presets, release_baseline, result_page, roofline, timing, train
from acformer.lab.bench import settings as settings_module
from acformer.lab.bench.connector import connector_variants
from acformer.lab.bench.generate import STEPS, generation, parts
from acformer.lab.bench.settings import ARGUMENTS, Settings, given_arguments, resolve
from acformer.lab.bench.timing import MeasuredPeak, Timings, Variant, measure
from acformer.lab.commands import bench as bench_command
from acformer.training.peak_memory import PeakMemory
from acformer.vision.cls_attention import cls_row
from acformer.vision.encoder import VisionEncoder, truncate

CPU = torch.device("cpu")
TEXT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
LLAMA = LlamaConfig(**TEXT, intermediate_size=40, vocab_size=50)
COMMANDS = ("encoder", "selector", "connector", "train", "generate")


@pytest.fixture(autouse=True)
def small_peak_variants(monkeypatch):
    monkeypatch.setattr(timing, "SIDES", {"cpu": 64})
    monkeypatch.setattr(timing, "MEMORY", 1000)
    monkeypatch.setattr(timing, "SHORTEST", 0.0)


@pytest.fixture
def toy() -> Settings:
    """16 patches, two blocks, two layers."""
    options = {"num_anchors": 4, "depth": 1, "num_heads": 2, "head_dim": 8}
    preset = presets.Preset("toy", tiny.config(connector_kwargs=options), tokens=(9, 5), train_batch=2)
    return Settings("encoder", preset, CPU, torch.float32, 2, (1, 2), (5,), ("mlp", "acformer"), patches=(16,))


# Rooflines


@pytest.mark.parametrize("feature_layer", [-1, -2, 1])
@pytest.mark.parametrize("family", ["clip_vision_model", "dinov2", "dinov2_with_registers", "siglip_vision_model"])
def test_roofline_of_the_encoder_is_what_torch_counts(family, make_tower, feature_layer):
    """To the last FLOP; on the meta device, where attention is two products. SigLIP's pooling head is not in it."""
    headless = {"vision_use_head": False} if family == "siglip_vision_model" else {}
    tower = truncate(make_tower(family, **headless), feature_layer).to("meta")
    with FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, 28, 28, device="meta"))
    assert counter.get_total_flops() == roofline.encoder_flops(tower.config, (4, 4), feature_layer)


def test_roofline_of_the_cls_row_is_what_torch_counts(make_tower):
    query, key = torch.ones(1, 4, 17, 8), torch.ones(1, 4, 17, 8)
    with FlopCounterMode(display=False) as counter:
        cls_row(query, key, 1.0)
    assert counter.get_total_flops() == roofline.cls_row_flops(make_tower("clip_vision_model").config, (4, 4))


@pytest.mark.parametrize("length", [1, 7])
def test_roofline_of_the_language_model_is_what_torch_counts_below_the_diagonal(length):
    """torch counts all L^2 pairs of causal attention, the roofline L (L + 1) / 2: the difference is known."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA).requires_grad_(False)
        embeddings = torch.zeros(1, length, LLAMA.hidden_size, requires_grad=True)
    above = LLAMA.num_hidden_layers * 4 * 4 * 8 * length * (length - 1) // 2
    with FlopCounterMode(display=False) as counter:
        logits = model(inputs_embeds=embeddings).logits
    forward = roofline.text_flops(LLAMA, length, logits=length)
    # transformers 5.16 forms the angles of the positions by a product, which the roofline leaves out.
    assert counter.get_total_flops() - above == pytest.approx(forward, rel=3e-4)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert counter.get_total_flops() - 2 * above == roofline.text_backward_flops(LLAMA, length, length)


def test_a_prompt_costs_the_same_in_one_piece_or_token_by_token():
    steps = sum(roofline.text_flops(LLAMA, 1, past, logits=0) for past in range(9))
    assert steps == roofline.text_flops(LLAMA, 9, logits=0)
    assert roofline.text_flops(LLAMA, 4, logits=0) + roofline.text_flops(LLAMA, 5, 4, logits=0) == steps


def test_bytes_of_weights_and_cache_are_those_of_the_tensors():
    model = AutoModelForCausalLM.from_config(LLAMA).eval()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert roofline.text_weights(LLAMA) == sum(p.numel() for p in matrices)
    cache = model(torch.zeros(1, 6, dtype=torch.long)).past_key_values
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert roofline.kv_bytes(LLAMA, 6, torch.float32) == sum(t.numel() * 4 for t in held)
    assert roofline.kv_bytes(LLAMA, 6, torch.bfloat16) * 2 == roofline.kv_bytes(LLAMA, 6, torch.float32)


@pytest.mark.parametrize("name", list_connectors())
def test_gradients_cost_one_to_two_forward_passes(name):
    """Weights' gradients once; gradients that must go on, once more. The features need none."""
    connector = build_connector(name, Geometry(32, 32, (4, 4), 1), **tiny.small_options(name))
    forward, step = roofline.connector_flops(connector), roofline.connector_step_flops(connector)
    assert 2 * forward <= step <= 3 * forward
    assert all(p.grad is None and p.device == CPU for p in connector.parameters())


def test_roofline_of_a_projector_by_hand():
    """(16, 32) x (32, 64), then x (64, 64); of the second Linear also the gradient that the first needs."""
    mlp = build_connector("mlp", Geometry(32, 64, (4, 4), 1))
    first, second = 2 * 16 * 32 * 64, 2 * 16 * 64 * 64
    assert roofline.connector_flops(mlp) == first + second
    assert roofline.connector_step_flops(mlp) == 2 * first + 3 * second


def test_the_slower_of_arithmetic_and_memory_is_the_roofline():
    peak = MeasuredPeak(flops=1e9, nbytes=1e6)
    assert peak.roofline(Variant(int, flops=2e9, nbytes=1e6)) == 2
    assert peak.roofline(Variant(int, flops=2e9, nbytes=5e6)) == 5


# Memory and calls


def test_peak_memory_counts_bytes_that_live_together():
    """x + 1 and its double live together, then the double and its successor: two of 4000 bytes at any time."""
    x = torch.zeros(1000)
    with PeakMemory() as memory:
        y = x + 1
        z = y * 2
        del y
        u = z + 1
        x.mul_(1)
        u[:10].add_(1)
    assert (memory.calls, memory.peak_bytes) == (6, 8000)
    with PeakMemory() as memory:
        for _ in range(9):
            u = u + 1
    assert memory.peak_bytes == 8000


def test_peak_memory_counts_what_a_graph_keeps():
    """Each exp keeps its output for the backward pass; without a graph two live at a time."""
    x = torch.zeros(1000, requires_grad=True)
    with PeakMemory() as memory:
        kept = x.exp().exp().exp().exp()
    assert memory.peak_bytes == 16000
    del kept
    with PeakMemory() as memory, torch.no_grad():
        x.exp().exp().exp().exp()
    assert memory.peak_bytes == 8000


# Timing


def test_variants_take_turns():
    """A watched and an unwatched run of each in order, then one of each a round, forwards and backwards."""
    calls = []
    variants = {name: Variant(lambda name=name: calls.append(name)) for name in "abc"}
    timings = measure(variants, CPU, torch.float32, rounds=3)
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"
    assert {name: len(timings.seconds[name]) for name in variants} == {"a": 3, "b": 3, "c": 3}
    assert timings.peak.flops > 0
    assert timings.peak.nbytes > 0


def test_short_runs_are_repeated_and_steps_divided(monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST", 0.02)
    calls = []
    variants = {"short": Variant(lambda: calls.append(1)), "steps": Variant(lambda: timing.time.sleep(0.02), times=10)}
    timings = measure(variants, CPU, torch.float32, rounds=1)
    assert len(calls) > 100
    assert timings.seconds["short"][0] < 1e-3
    assert 0.002 <= timings.seconds["steps"][0] < 0.02


def test_repeats_are_counted_from_a_warm_run(monkeypatch):
    """The first run, cold and watched, takes as long as two measurements; all later ones a twentieth of one."""
    monkeypatch.setattr(timing, "SHORTEST", 0.02)
    calls = []
    variants = {"warm": Variant(lambda: (timing.time.sleep(0.001 if calls else 0.04), calls.append(1)))}
    measure(variants, CPU, torch.float32, rounds=1)
    assert len(calls) > 3


def test_ratios_are_of_the_same_round():
    variants = {"base": Variant(int, flops=2e6), "slow": Variant(int)}
    seconds = {"base": [1.0, 2.0, 4.0], "slow": [2.0, 4.0, 12.0]}
    timings = Timings(variants, seconds, {}, dict.fromkeys(variants, 3 * 2**20), MeasuredPeak(1e6, 1e6))
    slow, base = timings.row("slow", "base"), timings.row("base")
    assert (slow["ms"], slow["ratio"], slow["ratio_quartiles"], slow["peak_mib"]) == (4000, 2, [2, 2.5], 3)
    assert "x_floor" not in slow
    assert (base["floor_ms"], base["x_floor"], "ratio" in base) == (2000, 1, False)


# The authors' way


def test_the_authors_way_finds_the_same_anchors(make_tower, pixels):
    encoder = VisionEncoder(make_tower("clip_vision_model"), -2)
    eager = make_tower("clip_vision_model", attn_implementation="eager")
    features = encoder(pixels)
    tokens, row = release_baseline.encode(eager, pixels, -2)
    torch.testing.assert_close(row, features.cls_attention, atol=1e-6, rtol=1e-4)  # float32, sums in another order
    torch.testing.assert_close(tokens, features.tokens, atol=1e-4, rtol=1e-4)
    assert release_baseline.select(row, 8).tolist() == select_anchors_reference(row, 8).tolist()
    assert release_baseline.select(row, 7).shape == (2, 4)  # 4 heads, floor(7 / 4) each


# Commands


def written(settings: Settings, what: str, tmp_path) -> tuple[dict, str]:
    printed = harness.bench([replace(settings, what=what)], tmp_path / "new/folder")
    (path,) = (tmp_path / "new/folder").glob("*.json")
    assert printed.splitlines()[-1] == str(path) == str(tmp_path / f"new/folder/{what}-toy-cpu.json")
    return json.loads(path.read_text()), printed


@pytest.mark.parametrize("what", COMMANDS)
def test_json_says_where_and_how(toy, tmp_path, what):
    record, printed = written(toy, what, tmp_path)
    assert {key: record[key] for key in provenance.machine()} == provenance.machine()
    assert record["command"].startswith(f"acformer bench {what} --preset toy --device cpu --dtype float32 --rounds 2")
    assert "random" in record["weights"]
    assert record["rounds"] == 2
    for row in record["rows"]:
        assert row["dtype"] == "float32"
        assert row["ms"] > 0
        assert row["ms_quartiles"][0] <= row["ms"] <= row["ms_quartiles"][1]
        has_roofline = what != "selector" and row.get("part") != "selector"
        assert (row.get("floor_ms", 0) > 0) == (row.get("x_floor", 0) > 0) == has_roofline
        assert row["peak_mib"] >= 0
    head, rule, *lines, _ = printed.splitlines()
    assert {line.count(" | ") for line in (head, rule, *lines)} == {head.count(" | ")}


def test_encoder_rows(toy, tmp_path):
    record, _ = written(replace(toy, variants=("authors", "anchors")), "encoder", tmp_path)
    rows = {(row["batch"], row["variant"]): row for row in record["rows"]}
    assert [*rows] == [(b, name) for b in (1, 2) for name in ("plain", "authors", "anchors")]
    assert rows[1, "plain"]["ratio"] == 1
    assert rows[1, "authors"]["peak_mib"] > rows[1, "plain"]["peak_mib"]
    # 17 tokens of width 32, two blocks of 8 L D^2 + 4 L^2 D + 4 L D F, of which ours runs one; 16 patches of 48 pixels
    block, embedding = 8 * 17 * 32**2 + 4 * 17**2 * 32 + 4 * 17 * 32 * 64, 2 * 16 * 32 * 48
    ratio = rows[1, "authors"]["floor_ms"] / rows[1, "plain"]["floor_ms"]
    assert ratio == pytest.approx((embedding + 2 * block) / (embedding + block), rel=1e-2)


def test_selector_rows(toy, tmp_path):
    record, _ = written(toy, "selector", tmp_path)
    rows = {row["way"]: row for row in record["rows"] if row["batch"] == 2}
    assert {"copy", "authors", "anchors", "grid", "diverse"} <= {*rows}
    assert (rows["copy"]["aten_calls"], rows["copy"]["chosen"]) == (1, 4)
    assert rows["authors"]["aten_calls"] > 2 * rows["copy"]["aten_calls"]
    assert rows["copy"]["ratio"] == 1
    assert rows["authors"]["ratio"] > 1


def test_connector_rows(toy, tmp_path):
    record, printed = written(replace(toy, connectors=("mlp", "top_p", "pooling"), batch=(2,)), "connector", tmp_path)
    rows = {(row["connector"], row["pass"]): row for row in record["rows"]}
    assert {name for name, _ in rows} == {"mlp", "top_p", "pooling"}
    assert rows["mlp", "forward"]["ratio"] == rows["mlp", "forward + backward"]["ratio"] == 1
    assert rows["mlp", "forward"]["tokens"] == 16
    assert rows["top_p", "forward"]["tokens"] == 5
    assert rows["top_p", "forward"]["parameters"] == 32 * 32 + 32 + 32 * 32 + 32
    assert "2.11e+03" not in printed


def test_a_connector_reads_its_weights_and_writes_their_gradients(toy):
    variants = connector_variants(toy, build_connector("mlp", Geometry(32, 32, (4, 4), 1)), 3)
    flops, nbytes = 3 * 2 * 16 * 2 * 32 * 32, 4 * 2 * (32 * 32 + 32)
    assert (variants["forward"].flops, variants["forward"].nbytes) == (flops, nbytes)
    assert variants["forward + backward"].nbytes == 2 * nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_rows(toy, tmp_path, dtype):
    settings = replace(toy, batch=(2,), tokens=(9, 5), dtype=dtype)
    record, _ = written(settings, "train", tmp_path)
    rows = {(row["features"], row["connector"], row["tokens"]): row for row in record["rows"]}
    found = [("mlp", 16), ("acformer", 9), ("acformer", 5)]
    assert {*rows} == {(features, *key) for features in ("cached", "encoded") for key in found}
    for (_, name, _), row in rows.items():
        assert row["speed"] == pytest.approx(1 / row["ratio"], rel=2e-2, abs=1e-3)
        assert row["share"] == pytest.approx(row["speed"] / row["floor_speed"], rel=2e-2, abs=1e-3)
        assert name != "mlp" or row["speed"] == row["floor_speed"] == row["share"] == 1
    assert rows["encoded", "mlp", 16]["floor_ms"] > rows["cached", "mlp", 16]["floor_ms"]
    assert rows["cached", "acformer", 5]["floor_speed"] > rows["cached", "acformer", 9]["floor_speed"]


def test_a_step_moves_the_connector_alone(toy):
    config = toy.preset.config
    model = presets.random_model(config, CPU, torch.float32).train()
    connector = model.model.connector
    train.freeze(model, train.LEARNING_RATES)
    optimizer = train.optimizer_with_states(connector)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = train.caption_inputs([3, 2], connector.num_tokens, config, CPU)
    features = presets.random_features(toy.preset, connector, 2, CPU, torch.float32)
    caches = []
    model.register_forward_hook(lambda module, arguments, output: caches.append(output.past_key_values))
    train.step(model, connector, optimizer, {**inputs, "vision_features": features}, toy)()
    assert caches == [None]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.startswith("model.connector.") for name in moved)


def test_captions_are_about_thirty_tokens_and_learned_alone(toy):
    for batch in (4, 8, 32):
        lengths = train.caption_lengths(batch)
        assert len(lengths) == batch
        assert sum(lengths) / batch == pytest.approx(30, abs=1)
        assert max(lengths) > 2 * min(lengths), "not grouped by length"
    inputs = train.caption_inputs([3, 1], 5, toy.preset.config, CPU)
    image = toy.preset.config.image_token_id
    assert (inputs["input_ids"] == image).sum(1).tolist() == [5, 5]
    assert (inputs["labels"] != -100).tolist() == [[False] * 5 + [True] * 3, [False] * 5 + [True, False, False]]
    assert inputs["attention_mask"].sum(1).tolist() == [8, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_rows(toy, tmp_path, dtype):
    record, printed = written(replace(toy, batch=(1, 3), dtype=dtype), "generate", tmp_path)
    rows = {(row["connector"], row["part"], row["batch"]): row for row in record["rows"]}
    once = ("encoder", "connector", "prefill", "first token")
    parts = [*((part, 1) for part in once), ("token", 1), ("token", 3)]
    wanted = {(name, *part) for name in ("mlp", "acformer") for part in parts}
    assert {*rows} == {*wanted, ("acformer", "selector", 1)}
    # 2 (keys, values) x 2 layers x 2 heads x 8 wide x bytes x tokens
    assert rows["mlp", "token", 1]["kv_mib_image"] == pytest.approx(
        2 * 2 * 2 * 8 * dtype.itemsize * 16 / 2**20, abs=1e-3
    )
    assert "selector @1" in printed
    assert "token @3" in printed


def test_a_prompt_reads_every_weight(toy):
    """Of two layers' matrices and the head, and of the connector; the first token of both."""
    model = presets.random_model(toy.preset.config, CPU, torch.bfloat16)
    with torch.inference_mode():
        found = parts(model, model.model.connector, replace(toy, dtype=torch.bfloat16))
    text = model.model.language_model.layers
    matrices = [model.lm_head.weight, *(p for p in text.parameters() if p.ndim == 2)]
    of_connector = sum(p.nbytes for p in model.model.connector.parameters())
    assert found["connector", 1].nbytes == of_connector
    assert found["first token", 1].nbytes == found["prefill", 1].nbytes + of_connector
    assert found["prefill", 1].nbytes == sum(p.nbytes for p in matrices)


def test_steps_of_generation_leave_the_prompt_as_it_was(toy):
    model = presets.random_model(toy.preset.config, CPU, torch.float32)
    with torch.inference_mode():
        cache = model(torch.full((1, 6), 7), use_cache=True).past_key_values
        variant = generation(model, cache, 6, 3, toy)
        own = next(c.cell_contents for c in variant.run.__closure__ if isinstance(c.cell_contents, DynamicCache))
        before = own.layers[0].keys.clone()
        variant.run()
    assert variant.times == STEPS
    assert own.get_seq_length() == cache.get_seq_length() == 6
    assert own.layers[0].keys.shape == (3, 2, 6, 8)
    assert torch.equal(own.layers[0].keys, before)


# Growth


def test_growth_rows(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "in_child", lambda run, **kwargs: run(**kwargs))
    record, _ = written(replace(toy, batch=(1,), patches=(16, 64)), "growth", tmp_path)
    rows = {(row["patches"], row["way"]): row for row in record["rows"]}
    assert [*rows] == [(n, way) for n in (16, 64) for way in ("ours", "authors")]
    # Two blocks' maps of 4 heads x 65 x 65 scores are kept by the one, none by the other.
    maps = 2 * 4 * 65 * 65 * 4 / 2**20
    assert rows[64, "authors"]["peak_mib"] - rows[64, "ours"]["peak_mib"] > maps


def test_what_does_not_fit_says_so(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "in_child", lambda run, **kwargs: run(**kwargs))
    monkeypatch.setattr(growth, "fits", lambda *args: False)
    record, printed = written(replace(toy, batch=(1,), memory_limit=3), "growth", tmp_path)
    ours, theirs = record["rows"]
    assert ours["ms"] > 0
    assert theirs["error"] == "does not fit in 3 GiB"
    assert "does not fit in 3 GiB" in printed


def test_a_killed_child_is_one_that_did_not_fit(toy, monkeypatch):
    def child(run, *, authors):
        if authors:
            raise BrokenProcessPool
        return [{"way": "ours"}]

    monkeypatch.setattr(growth, "in_child", child)
    ours, theirs = growth.rows(replace(toy, batch=(1,), memory_limit=1))
    assert (ours, theirs["error"]) == ({"way": "ours"}, "does not fit in 1 GiB")


def test_a_child_gives_back_its_rows():
    assert growth.in_child(dict, authors=True) == {"authors": True}


def test_memory_is_limited_while_something_is_tried():
    def hungry() -> torch.Tensor:
        return torch.empty(2**30)

    assert not growth.fits(Variant(hungry), 2**28, CPU)
    assert growth.fits(Variant(hungry), 2**33, CPU)  # never written to, so it takes no memory
    with pytest.raises(RuntimeError, match="shape"):
        growth.fits(Variant(lambda: torch.ones(2).view(3)), 2**30, CPU)
    with pytest.raises(UsageError, match="17 is no square: take 16 or 25"):
        growth.square_config(tiny.config().vision_config, 17)


# Machine, settings, presets, pages


def test_a_file_that_git_does_not_know_is_a_change(tmp_path, monkeypatch):
    for words in ("init -q", "-c user.name=n -c user.email=e commit -q --allow-empty -m m"):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    monkeypatch.setattr(provenance, "SOURCES", tmp_path)
    assert "changes" not in provenance.machine()
    (tmp_path / "new.py").touch()
    assert "not committed" in provenance.machine()["changes"]


def test_a_machine_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Zuse Z4\n\n")
    (tmp_path / "meminfo").write_text("MemTotal:       25165824 kB\nMemFree:  1 kB\n")
    monkeypatch.setattr(provenance, "PROC", tmp_path)
    assert provenance.machine()["machine"].startswith("Zuse Z4, 24 GiB, ")
    monkeypatch.setattr(provenance, "PROC", tmp_path / "none")
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    assert provenance.machine()["machine"].startswith("processor unknown, ")


@pytest.mark.parametrize("what", [*COMMANDS, "growth"])
def test_the_command_in_the_json_makes_the_same_settings(what):
    every = resolve(what, {"dtype": ["float32", "bfloat16"], "preset": "tiny", "device": "cpu"})
    words = cli._parse(shlex.split(every[0].command([settings.dtype for settings in every]))[1:])
    again = resolve(what, {name: getattr(words, name) for name in ARGUMENTS[what]})
    assert words.what == what
    assert [vars(replace(other, preset=every[0].preset)) for other in again] == [vars(one) for one in every]


def test_growth_says_its_limit_in_whole_gib(monkeypatch):
    monkeypatch.setattr(settings_module, "free_memory", lambda device: 11 * 2**30)
    (settings,) = resolve("growth", {"preset": "tiny", "device": "cpu"})
    assert "--memory-limit 5" in settings.command([torch.float32])
    monkeypatch.setattr(settings_module, "free_memory", lambda device: 2**30)
    assert resolve("growth", {"preset": "tiny", "device": "cpu"})[0].memory_limit == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("selector --memory-limit 3", "bench selector takes no --memory-limit"),
        ("encoder --vision other", "bench encoder takes no --vision"),
        ("agreement --preset tiny", "bench agreement takes no --preset"),
        ("summary --device cpu", "bench summary takes no --device"),
        ("encoder --tokens 65 145", "bench encoder takes one number of --tokens, got 2"),
        ("agreement --tokens 65 145", "bench agreement takes one number of --tokens, got 2"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(words, message, capsys):
    assert cli.main(["bench", *words.split()]) != 0
    assert message in capsys.readouterr().err


def test_arguments_of_every_command_are_known():
    assert set(ARGUMENTS) == set(bench_command.COMMANDS)
    assert given_arguments("train", {"tokens": [9, 5], "batch": None}) == {"tokens": (9, 5)}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_have_the_sizes_of_their_recipes(name):
    preset = presets.load_preset(name)
    spec = presets.load_recipe(presets.PRESETS[name][0]).model
    assert preset.geometry.num_patches in (144, 576)
    assert preset.config.feature_layer == spec.feature_layer
    with torch.device("meta"):
        text, vision = (AutoModel.from_config(c) for c in (preset.config.text_config, preset.config.vision_config))
    millions = {"tiny": (1, 22), "smol": (135, 22), "llava15-7b": (6607, 303), "llava15-13b": (12852, 303)}[name]
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (text, vision)]
    assert sizes == pytest.approx(millions, rel=0.02, abs=0.1)


def test_a_fresh_model_is_whole():
    """Also what is not in a checkpoint: frequencies of the positions, numbers of the patches, shared weights."""
    config = tiny.config()
    config.text_config.tie_word_embeddings = True
    model = presets.random_model(config, CPU, torch.bfloat16)
    usual = AutoModel.from_config(LlamaConfig(**config.text_config.to_dict()))
    assert torch.equal(model.model.language_model.rotary_emb.inv_freq, usual.rotary_emb.inv_freq)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(
        p.isfinite().all() and p.abs().max() < 10
        for p in (*model.parameters(), *model.buffers())
        if p.is_floating_point()
    )


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(presets, "free_memory", lambda device: 10 * 2**30)
    with pytest.raises(UsageError, match=r"weights alone take 2[0-9]\.[0-9] GiB and cpu has 10\.0 GiB free"):
        presets.random_model(presets.load_preset("llava15-7b").config, CPU, torch.float32)
    assert (presets.free_memory(CPU) or 0) > 0
    with pytest.raises(UsageError, match="unknown preset 'smoll'; did you mean 'smol'"):
        presets.load_preset("smoll")


def test_a_page_of_all_results(toy, tmp_path):
    with pytest.raises(DataError, match="holds no results"):
        result_page.page(tmp_path)
    (tmp_path / "encoder-cpu-batch-1.json").write_text('{"rows": []}')
    harness.bench([replace(toy, what="selector")], tmp_path)
    harness.bench([replace(toy, variants=("anchors",))], tmp_path)
    assert cli.main(["bench", "summary", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert page.index("## [CLS] row and anchors: toy") < page.index("## Selectors: toy")
    assert page.count("`acformer bench ") == 3  # the summary's own, and one a table
    assert torch.__version__ in page
    assert "| plain | 1 (1 .. 1) |" in page
    assert " nan " not in page


def test_ratios_and_numbers_are_short():
    record = {
        "what": "growth",
        "rows": [{"dtype": "float32", "batch": 1, "patches": 4, "way": "ours", "error": "does not fit"}],
    }
    assert result_page.table(record).splitlines()[2] == "| float32 | 1 | 4 | ours |  |  | does not fit |  |  |"
    assert math.isclose(timing._short(123456), 123500)
