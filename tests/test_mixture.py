"""Several sources with weights: what an epoch holds, in which order, also after a resume."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_train import data, recipe, weights  # noqa: F401 (fixtures)

from acformer.data.datasets import load_samples, open_samples
from acformer.data.entries import Entry, data_entries, data_title
from acformer.data.mixture import MixtureSampler, weighted_order, weighted_size
from acformer.errors import DataError, UsageError
from acformer.training.stages import train

ONE = ["stage=finetune", "pretrain=null"]
SOURCES = st.lists(st.tuples(st.integers(0, 40), st.floats(0.01, 3)), min_size=1, max_size=4)


@given(SOURCES, st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_takes_each_record_as_often_as_its_weight_says(sources, seed, epoch):
    counts, given_weights = map(list, zip(*sources, strict=True))
    order = weighted_order(counts, given_weights, seed, epoch)
    assert order == weighted_order(counts, given_weights, seed, epoch)
    assert len(order) == weighted_size(counts, given_weights)
    start = 0
    for count, weight in sources:
        times = Counter(number for number in order if start <= number < start + count)
        assert sum(times.values()) == pytest.approx(count * weight, abs=1)
        assert all(abs(times[number] - weight) <= 1 for number in range(start, start + count))
        start += count


def test_the_others_come_in_the_next_epochs():
    seen = [weighted_order([100], [0.25], 0, epoch) for epoch in range(4)]
    assert sorted(number for order in seen for number in order) == list(range(100))
    assert weighted_order([100], [0.25], 1, 0) != seen[0]


def test_a_sampler_mixes_and_groups_by_length():
    lengths = [10] * 30 + [500] * 30
    plain = MixtureSampler([30, 30], [1.0, 0.5], 0, lambda: 0)
    assert len(plain) == len([*plain]) == 45
    assert [*plain] == [*plain]
    assert any(number >= 30 for number in [*plain][:20]), "the second source does not wait for the first one's end"
    grouped = [*MixtureSampler([30, 30], [1.0, 0.5], 0, lambda: 0, lengths, rows=5)]
    assert sorted(grouped) == sorted(plain)
    mixed = [start for start in range(0, 45, 5) if len({lengths[i] for i in grouped[start : start + 5]}) > 1]
    assert len(mixed) <= 4


@pytest.fixture
def files(data, tmp_path):  # noqa: F811
    """Two files: eight red ones, four that are said to be blue."""
    records = json.loads((data / "questions.json").read_text())
    for record in records:
        record["image"] = str(data / record["image"])
    for name, chosen in (("a", records[:8]), ("b", records[8:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(chosen))
    return tmp_path


def mixed(files, data, *, first=1.0, second=0.5, **fields) -> str:  # noqa: F811
    entries = [{"path": f"{files}/a.json", "weight": first}, {"path": f"{files}/b.json", "weight": second, **fields}]
    return json.dumps([{"image_root": str(data), **entry} for entry in entries])


def test_names_paths_and_mappings_together(files, data):  # noqa: F811
    samples = open_samples([f"{files}/a.json", {"path": f"{files}/b.json", "weight": 3}], image_root=data)
    assert (len(samples), samples.counts, samples.weights) == (12, [8, 4], [1.0, 3])
    assert samples.sample(9).id == "9"
    assert samples.where(9) == (f"{files}/b.json", 2)
    assert [sample.id for sample in samples] == [str(n) for n in range(12)]
    assert len(load_samples([f"{files}/a.json", f"{files}/b.json"], image_root=data, limit=10)) == 10
    assert open_samples([f"{files}/a.json"], image_root=data, limit=3).counts == [3]
    with pytest.raises(IndexError):
        samples.sample(12)
    assert data_title([f"{files}/a.json", "x"]) == f"{files}/a.json and 1 more"


def test_lengths_are_of_the_records_that_are_taken(files, data):  # noqa: F811
    paths = [f"{files}/a.json", f"{files}/b.json"]
    whole = open_samples(paths, image_root=data).lengths(9)
    assert open_samples(paths, image_root=data, limit=3).lengths(9).tolist() == [*whole[:3], *whole[8:11]]


def test_the_fingerprint_follows_weights_limits_and_files(files, data):  # noqa: F811
    def of(*entries, **kwargs) -> str:
        return open_samples([*entries], image_root=data, **kwargs).fingerprint()

    a, b = f"{files}/a.json", f"{files}/b.json"
    made = [of(a), of(a, limit=3), of(b), of(a, b), of(b, a), of(a, {"path": b, "weight": 2})]
    assert len(set(made)) == len(made)
    assert of(a) == of(a)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"finetune\.data is empty"),
        ([{"path": "a", "weight": "much"}], r"finetune\.data\[0\]\.weight must be a positive number, got 'much'"),
        (["a", {"path": "a", "weight": 0}], r"finetune\.data\[1\]\.weight must be a positive number, got 0"),
        ([{"path": "a", "weight": float("nan")}], "weight must be a positive number"),
        ([{"path": "a", "wieght": 1}], r"unknown key of finetune\.data\[0\] 'wieght'; did you mean 'weight'"),
        ([{"weight": 1}], r"finetune\.data\[0\]\.path must be a file"),
        ({"path": "a", "streaming": "yes"}, r"finetune\.data\.streaming must be true or false"),
        ({"path": "a", "split": 3}, r"finetune\.data\.split must be text"),
        ([3], r"finetune\.data\[0\] must be a file"),
        ([{"path": "a", "streaming": True}, "b"], "streams and other sources cannot be mixed"),
    ],
)
def test_a_mistake_in_the_list_is_told_with_its_place(recipe, given, message):  # noqa: F811
    with pytest.raises(UsageError, match=message):
        recipe(*ONE, f"finetune.data={json.dumps(given)}")


def test_keys_of_an_entry_win_over_the_stages():
    entries = data_entries(["a", {"path": "b", "image_root": "own", "weight": 2}], "stage")
    assert entries == [Entry("a", image_root="stage"), Entry("b", 2, "own")]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.slow
def test_resume_in_a_mixture_goes_on_in_its_order(recipe, files, data, tmp_path, strategy):  # noqa: F811
    """Ten samples an epoch in batches of four: three steps; stopped after the fifth of seven."""
    own = [*ONE, f"finetune.data={mixed(files, data)}", f"finetune.training.train_sampling_strategy={strategy}"]
    own += ["finetune.training.max_steps=7", "finetune.training.save_strategy=steps", "finetune.training.save_steps=5"]
    whole = weights(train(recipe(*own, f"output_dir={tmp_path}/whole"), progress=False))
    stopped = train(recipe(*own, f"output_dir={tmp_path}/stopped"), progress=False)
    for name in ("model", "checkpoint-7"):
        (stopped.parent / name / "model.safetensors").unlink(missing_ok=True)
    train(recipe(*own, f"output_dir={tmp_path}/stopped"), progress=False)
    after = weights(stopped)
    assert all(torch.equal(after[name], value) for name, value in whole.items())


def test_a_weight_that_has_changed_is_another_run(recipe, files, data, tmp_path):  # noqa: F811
    own = ["finetune.training.save_strategy=steps", "finetune.training.save_steps=2"]
    folder = train(recipe(*ONE, f"finetune.data={mixed(files, data)}", *own), progress=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds a run of another recipe.*finetune"):
        train(recipe(*ONE, f"finetune.data={mixed(files, data, second=0.25)}", *own), progress=False)


def test_the_bad_of_a_mixture_are_named_by_their_file(recipe, files, data, tmp_path):  # noqa: F811
    records = json.loads((files / "b.json").read_text())
    records[2]["image"] = "gone.png"
    (files / "b.json").write_text(json.dumps(records))
    own = [*ONE, f"finetune.data={mixed(files, data, second=1.0)}"]
    with pytest.raises(DataError, match=rf"1 of 12 records are bad.*{files}/b\.json:3: image 'gone\.png'"):
        train(recipe(*own), progress=False)
    train(recipe(*own, "finetune.max_bad_fraction=0.1", "resume=false"), progress=False)
    (entry,) = [json.loads(line) for line in (tmp_path / "run/finetune/skipped.jsonl").read_text().splitlines()]
    assert (entry["file"], entry["record"]) == (f"{files}/b.json", 3)


def test_groups_stay_within_their_source(files, data):  # noqa: F811
    from acformer.data.collate import ConversationDataset

    records = json.loads((files / "a.json").read_text())
    (files / "b.json").write_text(json.dumps(records[:4] + records[:4]))
    samples = open_samples([f"{files}/a.json", {"path": f"{files}/b.json", "weight": 0.5}], image_root=data)
    dataset = ConversationDataset(samples, None, group=2)
    assert dataset.mixture() == ([8, 4], [1.0, 0.5])
    assert [len(group) for group in dataset.groups] == [1] * 8 + [2] * 4


def test_a_file_that_is_read_where_it_lies_needs_no_stream(files):
    stream = [{"path": f"{files}/a.json", "streaming": True}]
    with pytest.raises(UsageError, match=r"a\.json is read where it lies, a record at a time: leave streaming out"):
        open_samples(stream, num_rows=3)


@pytest.mark.slow
def test_two_processes_mix_and_pack_as_one(recipe, files, data, tmp_path):  # noqa: F811
    """Two processes with half of the batch each: the losses of one, packed, of a mixture, by like length."""
    whole_steps = mixed(files, data, first=1.25)  # 12 samples: of a last step that is not full accelerate repeats some
    own = [*ONE, f"finetune.data={whole_steps}", "finetune.packing=true", "finetune.training.max_steps=4"]
    own += ["finetune.training.train_sampling_strategy=group_by_length"]
    one = train(recipe(*own, f"output_dir={tmp_path}/one"), progress=False)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*program, "-m", "acformer.cli", "train", str(tmp_path / "two.yaml"), "--quiet", *own]
    command += [f"output_dir={tmp_path}/pair", "finetune.training.per_device_train_batch_size=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr
    losses = [
        [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
        for folder in (one.parent, tmp_path / "pair/finetune")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
