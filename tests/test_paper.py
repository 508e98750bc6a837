"""The paper's numbers: whole, consistent with one another and with the defaults that follow them."""

import pytest

from acformer.connectors import connector_options
from acformer.data.templates import TEMPLATES
from acformer.lab import paper
from acformer.training.recipe import MODULES

SCORES = {
    "Tables 1 and 2": paper.TABLES_1_2,
    "Table 3": paper.TABLE3,
    "Table 3, 13B": paper.TABLE3_13B,
    "Table 4": paper.TABLE4,
    "Table 5": paper.TABLE5,
}


def test_one_number_can_be_asked_for():
    assert paper.TABLE3[("acformer", 145)]["MME"] == 1846.1


def test_tables_are_whole():
    assert {name: len(table) for name, table in SCORES.items()} == {
        "Tables 1 and 2": 6,
        "Table 3": 15,
        "Table 3, 13B": 3,
        "Table 4": 3,
        "Table 5": 4,
    }
    assert sum(len(row) for row in paper.TABLES_1_2.values()) == 6 * 10 - 3 - 2 - 3 - 4  # empty cells
    assert (len(paper.TABLE6), len(paper.TOKENPACKER)) == (4, 13)


@pytest.mark.parametrize("name", SCORES)
def test_scores_have_the_range_of_their_metric(name):
    for row in SCORES[name].values():
        for benchmark, score in row.items():
            low, high = {"MME": (1500, 2800), "speed": (1, 3)}.get(benchmark, (25, 100))
            assert low <= score <= high, (benchmark, score)


def test_every_benchmark_but_okvqa_has_a_metric():
    used = {column for table in SCORES.values() for row in table.values() for column in row}
    assert used - {"speed"} == {*paper.METRICS, "OKVQA"}


def test_tokens_are_cls_and_the_anchors_of_whole_heads():
    grid = paper.ENCODER["grid"]
    assert grid[0] == grid[1] == paper.ENCODER["image_size"] // paper.ENCODER["patch_size"]
    num_patches = grid[0] * grid[1]
    counts = {tokens for _, tokens in paper.TABLE3} | {tokens for _, tokens in paper.TABLE6}
    for tokens in counts:
        assert (tokens - 1) % paper.ENCODER["num_heads"] == 0
        assert 1 <= tokens - 1 < num_patches
    assert {*counts, num_patches + 1} == {*paper.FIGURE1_TOKENS}


def test_tables_repeat_the_same_numbers():
    for key in paper.TABLE3.keys() & paper.TABLE4.keys():
        assert paper.TABLE3[key] == paper.TABLE4[key]
    for (lm, connector, tokens), row in paper.TABLES_1_2.items():
        again = paper.TABLE3.get((connector, tokens), {}) if lm == "vicuna-7b" else {}
        assert {name: row[name] for name in again} == again


def test_fewer_tokens_train_faster():
    for (_, connector, tokens), row in paper.TABLES_1_2.items():
        if "speed" in row:
            assert (row["speed"] > 1) == (tokens < 577) == (connector != "mlp")
    for lm in ("vicuna-7b", "vicuna-13b"):
        assert paper.TABLES_1_2[lm, "acformer", 145]["speed"] > paper.TABLES_1_2[lm, "acformer", 257]["speed"]
    times = [paper.TABLE6["vicuna-7b", tokens] for tokens in (65, 145, 257)]
    for stage in ("pretrain", "finetune"):
        minutes = [row[stage] for row in times]
        assert minutes == sorted(minutes)


def test_anchors_beat_learned_queries_wherever_both_were_tried():
    for table in (paper.TABLE3, paper.TABLE3_13B):
        for tokens in {tokens for _, tokens in table}:
            learned, anchors = table["perceiver", tokens], table["acformer", tokens]
            assert all(anchors[name] > learned[name] for name in learned)
    for data in ("llava-665k", "cauldron"):
        learned, anchors = paper.TABLE5[data, "perceiver"], paper.TABLE5[data, "acformer"]
        assert all(anchors[name] > learned[name] for name in learned)


def test_tokenpacker_leads_its_own_table_at_both_budgets():
    for budget in (144, 64):
        rows = {name: mean for (name, tokens), mean in paper.TOKENPACKER.items() if tokens == budget}
        assert len(rows) == 6
        assert max(rows, key=rows.__getitem__) == "tokenpacker"


def test_our_names_and_defaults_follow_the_paper():
    for name, count in (("acformer", "num_anchors"), ("perceiver", "num_queries")):
        options = connector_options(name)
        assert options[count] in (144, 145)
        assert {key: options[key] for key in paper.STACK} == paper.STACK
        assert options["ff_mult"] * paper.ENCODER["hidden_size"] == paper.FEED_FORWARD_WIDTH["release"]
    for stage in paper.RECIPE.values():
        assert {*stage.trained} <= {*MODULES}
        assert stage.template in TEMPLATES
    assert paper.RECIPE["pretrain"].learning_rate < paper.RECIPE["pretrain"].llava15_learning_rate
