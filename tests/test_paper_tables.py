"""Scores of models beside the paper's numbers."""

import json

import pytest

from acformer.cli import main
from acformer.errors import DataError
from acformer.lab import paper
from acformer.lab.reproduce.paper_tables import TABLES, beside_the_paper, read_models


def put(path, benchmark, score, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, "protocol": "llava", "score": score, **more}))


def cells(table):
    """By model, the cells of its row under their columns."""
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_the_tables_hold_the_papers_numbers():
    assert {name: len(table.rows) for name, table in TABLES.items()} == {
        "table1": 4,
        "table2": 4,
        "table3": 18,
        "table4": 3,
        "table5": 4,
    }
    assert TABLES["table1"].rows["vicuna-7b", "acformer", 145]["POPE"] == 86.4
    assert TABLES["table3"].rows["vicuna-13b", "perceiver", 145] == paper.TABLE3_13B["perceiver", 145]
    for table in TABLES.values():
        for column in table.columns:
            assert any(column in row for row in table.rows.values()), column
    for name, tokens in (("table1", 145), ("table2", 257)):  # our rows have all columns of the table
        assert set(TABLES[name].columns) <= TABLES[name].rows["vicuna-7b", "acformer", tokens].keys()


def test_ours_the_papers_and_the_difference(tmp_path, capsys):
    put(tmp_path / "llava-7b/pope.json", "pope", 85.95)
    put(tmp_path / "llava-7b/mme.json", "mme", 1800.0, protocol="lmms-eval")
    (tmp_path / "llava-7b/other.json").write_text('{"benchmark": "no score"}')
    assert main(["reproduce", "table1", "--scores", str(tmp_path)]) == 0
    (row,) = cells(capsys.readouterr().out.strip()).values()
    assert row == {
        "beside the paper's": "vicuna-7b acformer 145",
        "POPE": "85.95 / 86.4 (-0.45)",
        "MME": "1800.00 (lmms-eval) / 1846.1 (-46.10)",
        "MMB": "missing / 68.4",
        "MM-Vet": "missing / 30.3",
        "TextVQA": "missing / 58",
        "GQA": "missing / 61.3",
    }


def test_a_model_stands_beside_its_own_row(tmp_path):
    put(tmp_path / "vicuna-13b-mlp-577/gqa.json", "gqa", 63.0)
    put(
        tmp_path / "a/eval/gqa/65-tokens/scores.json",
        "gqa",
        59.0,
        model="runs/a",
        visual_tokens=65,
        connector="perceiver",
    )
    put(tmp_path / "a/eval/gqa/250-tokens/scores.json", "gqa", 60.0, model="runs/a", visual_tokens=250, connector="new")
    beside = {model: row["beside the paper's"] for model, row in cells(beside_the_paper("table3", tmp_path)).items()}
    assert beside == {
        "runs/a at 250": "vicuna-7b acformer 257",
        "runs/a at 65": "vicuna-7b perceiver 65",
        "vicuna-13b-mlp-577": "vicuna-7b acformer 65",  # a row of Table 1, not of this one
    }
    found = cells(beside_the_paper("table1", tmp_path))["vicuna-13b-mlp-577"]
    assert found["beside the paper's"] == "vicuna-13b mlp 577"
    assert found["GQA"] == "63.00 / 63.3 (-0.30)"


def test_what_the_paper_does_not_have_says_so(tmp_path):
    put(tmp_path / "llama/okvqa.json", "okvqa", 50.0)
    assert cells(beside_the_paper("table5", tmp_path))["llama"]["OKVQA"] == "50.00 / 55.15 (-5.15)"
    put(tmp_path / "vicuna-7b acformer 257/vizwiz.json", "vizwiz", 50.0)
    row = cells(beside_the_paper("table2", tmp_path))["vicuna-7b acformer 257"]
    assert row["VizWiz"] == "50.00 / 52.8 (-2.80)"
    assert row["SQA-img"] == "missing / 69.4"


def test_refusals(tmp_path, capsys):
    with pytest.raises(DataError, match="holds no scores"):
        read_models(tmp_path)
    put(tmp_path / "m/first.json", "gqa", 10.0, limit=5)
    put(tmp_path / "m/unpublished.json", "vizwiz", None)
    with pytest.raises(DataError, match="holds no scores"):  # of a part of the questions, or of none
        read_models(tmp_path)
    put(tmp_path / "m/one.json", "gqa", 10.0)
    put(tmp_path / "m/two.json", "gqa", 11.0)
    with pytest.raises(DataError, match=r"two scores of m in GQA: .*one\.json and .*two\.json"):
        read_models(tmp_path)
    assert main(["reproduce", "tabel1", "--scores", str(tmp_path)]) == 2
    assert "did you mean 'table1'" in capsys.readouterr().err
    assert main(["reproduce", "table1"]) == 2
    assert "--scores" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert main(["reproduce", "table1", "--scores", str(tmp_path)]) == 3
    assert "broken.json" in capsys.readouterr().err
