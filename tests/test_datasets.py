"""The contract of data sets with a name: each entry of `DATASETS`, those of installed packages too."""

import pytest
import tiny

from acformer.data.datasets import DATASETS, Dataset, load_samples
from acformer.data.samples import Sample
from acformer.data.skip_log import SkipLog
from acformer.errors import DataError, UsageError

names = pytest.mark.parametrize("name", DATASETS.names())


def first(dataset: Dataset, part: str, limit: int) -> list[Sample]:
    try:
        return list(dataset.samples(part, limit=limit, skipped=SkipLog()))
    except DataError as error:
        if "acformer fetch" not in str(error):
            raise
        pytest.skip(str(error))


@names
def test_no_more_than_asked_for_and_all_are_counted(name):
    dataset = DATASETS[name]
    for part in (dataset.train_part, dataset.test_part):
        samples = first(dataset, part, 3)
        assert len(samples) == 3 or len(samples) == len(first(dataset, part, 4))
        assert all(isinstance(sample, Sample) and sample.messages and sample.file for sample in samples)
        assert len({sample.id for sample in samples}) == len(samples)
        skipped = SkipLog()
        dataset.samples(part, limit=3, skipped=skipped)
        assert skipped.offered - skipped.skipped >= len(samples)
        assert load_samples(f"{name}:{part}", limit=3) == samples


@names
def test_questions_of_the_test_part_have_answers(name):
    for sample in first(DATASETS[name], DATASETS[name].test_part, 3):
        assert sample.answer
        assert sample.prompt[-1]["role"] == "user"


@names
def test_an_unknown_part_is_named(name):
    first(DATASETS[name], DATASETS[name].test_part, 1)
    with pytest.raises(UsageError, match=r"unknown part .*'no-such-part'"):
        DATASETS[name].samples("no-such-part", limit=1, skipped=SkipLog())


@pytest.mark.parametrize("name", tiny.mostly_slow(DATASETS.names(), "openmoji-scenes-small"))
def test_what_is_known_is_not_what_is_asked(name):
    dataset = DATASETS[name]
    asked = {sample.id for sample in first(dataset, dataset.test_part, 50)}
    assert not asked & {sample.id for _, sample in zip(range(2000), dataset.known_samples(), strict=False)}


def test_a_misspelt_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"unknown data set 'easy-vga'; did you mean 'easy-vqa'\?"):
        load_samples("easy-vga:test")
    with pytest.raises(DataError, match=r"cannot read questions.json: No such file"):
        load_samples("questions.json")
