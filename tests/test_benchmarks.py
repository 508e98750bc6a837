"""Published formats -> scores, for all ten benchmarks on made-up files; what is refused; what is submitted."""

import gzip
import json
import re
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from benchmark_files import MMBENCH_HEAD, WRITERS, lines, mmbench_rows, write
from openpyxl import Workbook, load_workbook

from acformer.benchmarks import BENCHMARKS
from acformer.benchmarks.answers import Answer, Question, asks, match
from acformer.benchmarks.benchmark import PROTOCOLS
from acformer.benchmarks.hub import open_folder
from acformer.benchmarks.records import Folder
from acformer.benchmarks.score import compare, read_answered, score_answers, two_sided_p
from acformer.benchmarks.score_text import score_text
from acformer.cli import main
from acformer.errors import DataError

FULL = {"mme": 2800.0}
"""The most there is, where it is not 100."""
NAMES = [*WRITERS]


@pytest.fixture
def files(tmp_path):
    """name -> the folder of a benchmark and LLaVA's answers to it, all right."""

    def make(name):
        answers = write(name, tmp_path / name)
        return tmp_path / name, lines(tmp_path / "answers" / f"{name}.jsonl", as_grades(name, answers))

    return make


def as_grades(name, answers):
    """Answers of MM-Vet are scored once they are graded."""
    if name != "mm_vet":
        return answers
    return [{f"v1_{one['question_id']}": {"model": ["gpt-4"], "score": [1.0, 1.0]} for one in answers}]


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *arguments):
    """The one line of a data error."""
    code, out, err = run(capsys, *arguments)
    assert (code, out, err.count("\n")) == (3, "", 1), (out, err)
    return err.removeprefix("acformer: error: ").strip()


def score(name, answers, truth, protocol="llava"):
    return score_answers(read_answered(name, answers, truth, protocol))


def scored(name, texts, folder, protocol="llava"):
    """Of answers in the order of the questions."""
    questions = BENCHMARKS[name].questions(Folder(folder))
    measure = BENCHMARKS[name].measure(questions, texts, protocol)
    return float(measure.score(measure.counts.sum(axis=0))), measure


def test_all_ten_are_there():
    assert sorted(NAMES) == sorted(BENCHMARKS)
    assert sorted(BENCHMARKS) == sorted(
        ["pope", "mme", "mmbench", "mm_vet", "textvqa", "gqa", "vqav2", "vizwiz", "scienceqa", "okvqa"]
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_everything(name, protocol, files):
    folder, answers = files(name)
    if (name, protocol) == ("gqa", "official"):
        converted = [{"questionId": f"20{n}", "prediction": said} for n, said in enumerate(("dog", "left", "no"))]
        answers.write_text(json.dumps(converted))
    result = score(name, answers, folder, protocol)
    assert result["score"] == pytest.approx(FULL.get(name, 100.0))
    assert result["unparsed"] == result["unreadable_images"] == 0
    assert result["protocol"] == protocol
    assert 0 <= result["interval"][0] <= result["interval"][1] <= 2800


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "mm_vet"])
def test_an_image_that_cannot_be_read_is_wrong(name, protocol, files):
    folder, _ = files(name)
    questions = BENCHMARKS[name].questions(Folder(folder))
    found, measure = scored(name, [None] * len(questions), folder, protocol)
    assert found == 0.0
    assert measure.points.sum() == 0


@pytest.mark.parametrize("name", NAMES)
def test_json_and_text(name, files, capsys):
    folder, answers = files(name)
    code, out, _ = run(capsys, "score", name, "--answers", answers, "--truth", folder, "--json")
    result = json.loads(out)
    assert code == 0
    assert {"benchmark", "protocol", "score", "parts", "num_questions", "unparsed", "interval", "blind"} <= {*result}
    code, out, _ = run(capsys, "score", name, "--answers", answers, "--truth", folder)
    assert (code, out.strip()) == (0, score_text(result))
    assert f"{name} {result['score']:.2f} [" in out
    assert "protocol llava: " in out


@pytest.mark.parametrize("name", NAMES)
def test_missing_double_unknown(name, files, capsys):
    """Each is an error that names the ids; nothing is scored."""
    folder, answers = files(name)
    original = answers.read_text()
    arguments = ("score", name, "--answers", answers, "--truth", folder)
    if name == "mm_vet":
        grades = json.loads(original)
        answers.write_text(json.dumps({key: value for key, value in grades.items() if key != "v1_1"}))
        assert "1 of 3 questions without an answer (1)" in refused(capsys, *arguments)
        answers.write_text(json.dumps({**grades, "v1_9": {"score": [1, 1]}}))
        assert "1 answers to questions that there are not (v1_9)" in refused(capsys, *arguments)
        return
    records = [json.loads(line) for line in original.splitlines()]
    lines(answers, records[:-1])
    assert f"1 of {len(records)} questions without an answer" in refused(capsys, *arguments)
    lines(answers, [*records, records[0]])
    assert f"1 second answers ({records[0]['question_id']})" in refused(capsys, *arguments)
    lines(answers, [*records[:-1], {**records[-1], "question_id": "elsewhere/99"}])
    message = refused(capsys, *arguments)
    assert "1 answers to questions that there are not (elsewhere/99)" in message
    assert "questions without an answer" in message
    lines(answers, [*records[:-1], {**records[-1], "prompt": "Who won the battle of Hastings?"}])
    assert "prompt that is not their question's" in refused(capsys, *arguments)


@pytest.mark.parametrize("name", NAMES)
def test_broken_files(name, files, capsys, tmp_path):
    folder, answers = files(name)
    arguments = ("score", name, "--answers", answers)
    empty = tmp_path / "empty"
    empty.mkdir()
    if name != "mm_vet":  # whose grades can be added up without questions
        assert str(empty) in refused(capsys, *arguments, "--truth", empty)
    assert "gone" in refused(capsys, *arguments, "--truth", tmp_path / "gone")
    assert "gone.jsonl" in refused(capsys, "score", name, "--answers", tmp_path / "gone.jsonl", "--truth", folder)
    answers.write_text('{"text": 1}\n{"text": \n')
    assert "answers" in refused(capsys, *arguments, "--truth", folder)
    answers.write_bytes(b"\xff\xfe\x00")
    assert str(answers) in refused(capsys, *arguments, "--truth", folder)
    for path in (path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl", ".tsv", ".txt")):
        path.write_text("[1]" if path.suffix != ".tsv" else "a\tb\n1\t2\n")
    lines(answers, [{"question_id": 1, "prompt": "", "text": "x"}])
    assert str(folder) in refused(capsys, *arguments, "--truth", folder)


def test_a_broken_line_is_named(files, capsys):
    folder, answers = files("gqa")
    answers.write_text(answers.read_text().replace('{"question_id": "201"', '{"question_id": "201'))
    assert "gqa.jsonl, line 2: not JSON" in refused(capsys, "score", "gqa", "--answers", answers, "--truth", folder)


def test_usage(files, capsys):
    folder, answers = files("gqa")
    code, _, err = run(capsys, "score", "pop", "--answers", answers, "--truth", folder)
    assert (code, "did you mean 'pope'" in err) == (2, True)
    code, _, err = run(capsys, "score", "gqa", "--answers", answers, "--truth", folder, "--protocol", "lava")
    assert (code, "unknown protocol 'lava'; did you mean 'llava'" in err) == (2, True)
    submission = folder / "out.json"
    code, _, err = run(capsys, "score", "pope", "--answers", *pope_files(folder), "--submission", submission)
    assert (code, "pope has no test server" in err, submission.exists()) == (2, True, False)


def pope_files(folder):
    answers = write("pope", folder / "pope")
    return lines(folder / "pope.jsonl", answers), "--truth", folder / "pope"


# Layouts: the same answers however they are written, and wherever the files lie.


def layouts(name, records):
    """File name -> what a file of the same answers holds."""
    ours = [{"id": one["question_id"], "question": one["prompt"], "prediction": one["text"]} for one in records]
    logged = [
        {"doc_id": n, "input": one["prompt"], "target": "x", "filtered_resps": [f"{one['text']} "], "doc_hash": "0"}
        for n, one in enumerate(records)
    ]
    ids = {"textvqa": "submission", "mmbench": "gpt_eval_score", "mme": "mme_perception_score"}.get(
        name, "pope_accuracy"
    )
    field = "index" if name == "mmbench" else "question_id"
    with_ids = [{**line, ids: {field: one["question_id"]}} for line, one in zip(logged, records, strict=True)]
    return {
        "predictions.jsonl": ours,
        "samples_with_ids.jsonl": with_ids,
        "samples.jsonl": list(reversed(logged)),
    }


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mm_vet"])
def test_layouts_of_answers(name, files, tmp_path):
    folder, answers = files(name)
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    if name == "mme":  # in the order of the release's folders, which is where lmms-eval's table has them from
        order = [question.id for question in BENCHMARKS["mme"].questions(Folder(folder))]
        records.sort(key=lambda one: order.index(one["question_id"].replace("images/", "").removesuffix(".png")))
    records[0]["text"] = "No"
    lines(answers, records)
    expected = score(name, answers, folder)
    assert expected["score"] < FULL.get(name, 100.0)
    for file, content in layouts(name, records).items():
        assert score(name, lines(tmp_path / file, content), folder)["score"] == expected["score"], file
    zipped = tmp_path / "answers.jsonl.gz"
    zipped.write_bytes(gzip.compress(answers.read_bytes()))
    assert score(name, zipped, folder) == expected


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mm_vet"])
def test_truth_in_a_zip(name, files, tmp_path):
    folder, answers = files(name)
    with zipfile.ZipFile(tmp_path / "truth.zip", "w") as archive:
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in (".jpg", ".png"):
                archive.write(path, path.relative_to(folder))
    expected = score(name, answers, folder)
    assert score(name, answers, tmp_path / "truth.zip") == expected
    inner = tmp_path / "folder"
    inner.mkdir()
    (tmp_path / "truth.zip").rename(inner / "truth.zip")
    assert score(name, answers, inner) == expected


def test_a_truth_file_may_be_named(files, tmp_path):
    folder, answers = files("textvqa")
    assert score("textvqa", answers, folder / "TextVQA_0.5.1_val.json")["score"] == 100.0
    (folder / "TextVQA_0.5.1_val.json").rename(tmp_path / "mine.json")
    assert score("textvqa", answers, tmp_path / "mine.json")["score"] == 100.0


def test_two_files_of_one_name_are_refused(files, capsys):
    folder, answers = files("gqa")
    (folder / "other").mkdir()
    (folder / "other/testdev_balanced_questions.json").write_text("{}")
    message = refused(capsys, "score", "gqa", "--answers", answers, "--truth", folder)
    assert "are both testdev_balanced_questions.json" in message


def test_an_id_of_an_image_goes_by_what_was_asked():
    questions = [
        Question("a", "What is it?", "a.jpg"),
        Question("a", "Who is it?", "a.jpg"),
        Question("b", "?", "b.jpg"),
    ]
    answers = [Answer("b.jpg", "1"), Answer("a", "2", "WHO is it\n?"), Answer("a", "3", "Look. What is it? Say.")]
    assert match(questions, answers, "f") == [2, 1, 0]
    assert asks("", "anything")
    assert not asks("anything", "else")
    with pytest.raises(DataError, match=r"f has 1 second answers \(a\); 1 of 3 questions without an answer \(a\)"):
        match(questions, [answers[0], answers[1], answers[1]], "f")
    with pytest.raises(DataError, match="2 answers without ids to 3 questions"):
        match(questions, [Answer(None, "1"), Answer(None, "2")], "f")
    with pytest.raises(DataError, match="answer 1 is to 'who', not to 'What is it\\?'"):
        match(questions, [Answer(None, "1", "who?"), Answer(None, "2"), Answer(None, "3")], "f")


# One benchmark after the other: parsers, parts, traps.


def test_pope_by_hand(files):
    folder, _ = files("pope")
    questions = BENCHMARKS["pope"].questions(Folder(folder))
    assert [question.id for question in questions[:2]] == ["1", "2"]
    said = {"yes": "Yes, there is.", "no": "Yes"}  # always yes
    texts = [said[question.answers[0]] for question in questions]
    found, measure = scored("pope", texts, folder)
    parts = measure.parts()
    assert parts["popular"] == pytest.approx(
        {"accuracy": 50, "precision": 50, "recall": 100, "f1": 200 / 3, "yes_ratio": 100}
    )
    assert parts["random"]["precision"] == pytest.approx(100 * 4 / 7)
    f1_random = 100 * 2 * (4 / 7) / (1 + 4 / 7)
    assert found == pytest.approx((2 * 200 / 3 + f1_random) / 3)
    assert parts["pooled"]["f1"] == pytest.approx(100 * 2 * (12 / 23) / (1 + 12 / 23))
    strict, measure = scored("pope", texts, folder, "lmms-eval")
    assert len(measure.unparsed) == 12  # "Yes, there is." is neither
    assert strict == 0.0


def test_pope_parsers():
    questions = [Question(str(n), "?", "i", ("yes",), "random") for n in range(6)]
    texts = ["No, it is not", "nothing", "There is not. Yes", "Yes. No", "NO", " no "]
    measure = BENCHMARKS["pope"].measure(questions, texts, "llava")
    assert measure.points.tolist() == [0, 1, 0, 1, 1, 0]
    assert [*measure.unparsed] == [1, 4]  # NO is not one of the script's words, and counts as a yes
    measure = BENCHMARKS["pope"].measure(questions, texts, "lmms-eval")
    assert measure.points.tolist() == [0] * 6
    assert [*measure.unparsed] == [0, 1, 2, 3]


def test_popes_labels_of_another_release(files, capsys):
    """One more row in the labels than in the questions: an error, not another score."""
    folder, answers = files("pope")
    path = folder / "coco/coco_pope_random.json"
    row = {"question_id": 8, "image": "COCO_val2014_000000000001.jpg", "text": "Is there a new one?", "label": "no"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    message = refused(capsys, "score", "pope", "--answers", answers, "--truth", folder)
    said = "coco_pope_random.json is of another release than the questions: 8 labels to 7 questions, 1 without"
    assert said in message
    path.write_text(path.read_text().replace('"yes"', '"maybe"'))
    assert "a label is yes or no, not 'maybe'" in refused(
        capsys, "score", "pope", "--answers", answers, "--truth", folder
    )


def test_popes_labels_need_not_lie_in_the_order_of_the_questions(files):
    folder, answers = files("pope")
    path = folder / "coco/coco_pope_popular.json"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert score("pope", answers, folder)["score"] == 100.0


def test_mme_by_hand(files):
    folder, _ = files("mme")
    questions = BENCHMARKS["mme"].questions(Folder(folder))
    texts = ["yes"] * len(questions)  # half of the questions, no image with both
    found, measure = scored("mme", texts, folder)
    assert found == 14 * 50
    texts = [question.answers[0] for question in questions]
    texts[[question.category for question in questions].index("OCR")] = "no"
    found, measure = scored("mme", texts, folder)
    assert found == 2800 - 25 - 50
    parts = measure.parts()
    assert (parts["perception"], parts["cognition"], parts["sum"]) == (1925, 800, 2725)
    assert parts["categories"]["OCR"] == {"score": 125.0, "accuracy": 75.0, "accuracy_plus": 50.0}


def test_mme_parsers():
    texts = ["Yes", " NO.", "Not at all", "I don't know", "y", "n.", "Oh yes", "", "no yes", "A. yes"]
    for protocol, found in (
        ("llava", ["yes", "no", "no", "other", "other", "other", "other", "other", "no", "other"]),
        ("lmms-eval", ["yes", "no", "no", "other", "yes", "no", "other", "other", "no", "other"]),
    ):
        for text, word in zip(texts, found, strict=True):
            for truth in ("yes", "no"):
                question = Question("OCR/1", "?", "OCR/1", (truth,), "OCR")
                measure = BENCHMARKS["mme"].measure([question], [text], protocol)
                assert measure.points.tolist() == [word == truth], (text, protocol)
                assert bool(measure.unparsed) == (word == "other")


def test_mmes_own_results(files, tmp_path):
    """Its script's folder of text files holds answers and truth alike; an image has two questions."""
    folder, answers = files("mme")
    results = tmp_path / "results"
    results.mkdir()
    for question in BENCHMARKS["mme"].questions(Folder(folder)):
        with (results / f"{question.category}.txt").open("a") as file:
            name = question.id.partition("/")[2]
            file.write(
                f"{name}.png\t{question.text} Please answer yes or no.\t{question.answers[0].capitalize()}\tYes\n"
            )
    assert score("mme", results, None)["score"] == 700
    assert score("mme", results, folder)["score"] == 700
    assert score("mme", answers, results)["score"] == 2800
    (results / "OCR.txt").write_text("0001.png\tIs it? Please answer yes or no.\tYes\tNo\n")
    with pytest.raises(DataError, match="two questions about an image, but 1 about OCR/0001"):
        score("mme", results, None)
    (results / "OCR.txt").write_text("0001.png\tIs it?\tPerhaps\tNo\n")
    with pytest.raises(DataError, match=r"OCR\.txt, line 1: not image, question, yes or no, answer"):
        score("mme", results, None)


def test_mmbench_is_circular(files):
    folder, _ = files("mmbench")
    questions = BENCHMARKS["mmbench"].questions(Folder(folder))
    texts = [question.answers[0] for question in questions]
    texts[1] = "C"  # the second rotation of the first question
    found, measure = scored("mmbench", texts, folder)
    assert found == pytest.approx(100 * 2 / 3)
    parts = measure.parts()
    assert parts["one_round"] == 100.0
    assert parts["circular"] == pytest.approx(found)
    assert parts["categories"] == {"category 0": 50.0, "category 1": 100.0}
    assert measure.points.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert questions[2].prompt.startswith(
        'Look\ncloser.\nWhat is "1"?\nA. option a1\nB. option b1\nC. option c1\nAnswer'
    )


@pytest.mark.parametrize(
    ("text", "rules", "likely"),
    [
        ("B", "B", "B"),
        ("B. blue", "B", "B"),
        ("(C)", "C", "C"),
        ("The answer is D.", "D", "D"),
        ("a red one", "A", "A"),  # the text of the option, not the article
        ("A dog is on it", None, "A"),
        ("A or B", None, "A"),
        ("red or blue", None, None),
        ("D is wrong, I choose B!", "D", "D"),
        ("B! or D?", None, "B"),
        ("", None, None),
    ],
)
def test_option_letters(text, rules, likely):
    options = dict(zip("ABCD", ("red", "blue", "green", "pink"), strict=True))
    question = Question("1", "?", "1", ("A",), extra={"options": options, "l2": "", "row": {}})
    for letter in "ABCD":
        question = Question("1", "?", "1", (letter,), extra=question.extra)
        for protocol, found in (("llava", rules), ("lmms-eval", rules or likely)):
            measure = BENCHMARKS["mmbench"].measure([question], [text], protocol)
            assert measure.points.tolist() == [letter == found]
            assert bool(measure.unparsed) == (found is None)


def test_mm_vet_adds_up_grades(files, tmp_path, capsys):
    folder, answers = files("mm_vet")
    grades = {"v1_0": {"score": [0.5, 0.7]}, "v1_1": {"score": [1.0, 1.0]}, "v1_2": {"score": [0.0, 0.1]}}
    answers.write_text(json.dumps(grades))
    result = score("mm_vet", answers, folder)
    assert result["score"] == pytest.approx(100 * (0.6 + 1.0 + 0.05) / 3)
    assert result["blind"] is None
    assert result["parts"]["runs"] == pytest.approx([50.0, 60.0])
    assert result["parts"]["standard_deviation"] == pytest.approx(5.0)
    assert result["parts"]["capabilities"] == pytest.approx({"math": 100.0, "ocr": 52.5, "rec": 32.5})
    assert result["parts"]["combinations"] == pytest.approx({"math+ocr": 100.0, "ocr+rec": 5.0, "rec": 60.0})
    (folder / "mm-vet.json").unlink()
    assert "capabilities" not in score("mm_vet", answers, folder)["parts"]
    assert "215 of 218 questions without an answer" in refused(
        capsys, "score", "mm_vet", "--answers", answers, "--truth", answers.parent
    )
    answers.write_text(json.dumps({**grades, "v1_0": {"score": [1.5, 0]}}))
    assert "the grades of v1_0 are not from 0 to 1" in refused(
        capsys, "score", "mm_vet", "--answers", answers, "--truth", folder
    )
    plain = lines(tmp_path / "plain.jsonl", write("mm_vet", folder))
    message = refused(capsys, "score", "mm_vet", "--answers", plain, "--truth", folder)
    assert "MM-Vet's judge must grade these answers" in message


def test_textvqa_tells_of_the_hint(files):
    folder, answers = files("textvqa")
    assert score("textvqa", answers, folder)["note"] == "4 of 4 prompts held OCR tokens"
    bare = [{"question_id": 34602 + n, "answer": "Red!"} for n in range(4)]
    answers.write_text(json.dumps(bare))
    result = score("textvqa", answers, folder)
    assert "does not tell whether the prompts held OCR tokens" in result["note"]
    assert result["score"] == 100.0


def test_gqa_protocols(files):
    folder, _ = files("gqa")
    texts = ["Dog.", "left!", "no"]
    assert scored("gqa", texts, folder)[0] == pytest.approx(200 / 3)
    assert scored("gqa", texts, folder, "lmms-eval")[0] == pytest.approx(100)
    assert scored("gqa", texts, folder, "official")[0] == pytest.approx(100 / 3)
    parts = scored("gqa", texts, folder)[1].parts()
    assert parts["type"] == {"binary": 50.0, "open": 100.0}
    assert parts["structural"] == {"choose": 0.0, "query": 100.0, "verify": 100.0}


def test_vqa_by_hand(files):
    folder, _ = files("vqav2")
    found, measure = scored("vqav2", ["crimson", "no", "the three"], folder)
    crimson, three = (3 * 2 / 3 + 7) / 10, (3 * 2 / 3 + 7) / 10
    assert measure.points.tolist() == pytest.approx([crimson, 0, three])
    assert found == pytest.approx(100 * (crimson + three) / 3)
    parts = measure.parts()
    assert parts["answer_type"] == pytest.approx({"number": 90.0, "other": 90.0, "yes/no": 0.0})
    assert parts["question_type"] == pytest.approx({"is": 90.0, "what is": 45.0})


def test_who_processes_what():
    """Each protocol on each side: the traps of the published evaluations."""
    people = {
        "possessive": ("men's",) * 10,
        "unlike": ("a dog!",) * 9 + ("cat",),
        "alike": ("a dog!",) * 10,
        "typed": ("$5.00",) * 10,
    }

    def points(name, said, kind, protocol):
        question = Question("1", "?", "1", people[kind])
        return BENCHMARKS[name].measure([question], [said], protocol).points[0]

    assert points("vqav2", "men's", "possessive", "official") == 1
    assert points("vqav2", "men's", "possessive", "llava") == 0  # LLaVA's upload says "men 's"
    assert points("vqav2", "men's", "possessive", "lmms-eval") == 1
    assert points("vqav2", "dog", "unlike", "official") == 0  # people's articles stay
    assert points("vqav2", "a dog!", "unlike", "lmms-eval") == 1
    assert points("vqav2", "a dog!", "alike", "official") == 0  # all of one mind: nothing is done to them
    assert points("vizwiz", "a dog!", "unlike", "official") == 0  # people's answers as they are
    assert points("vizwiz", "a dog!", "unlike", "lmms-eval") == 1
    assert points("okvqa", "a dog!", "alike", "llava") == 1
    assert points("okvqa", "a dog!", "alike", "official") == 0
    for protocol in PROTOCOLS:
        assert points("textvqa", "The dog", "alike", protocol) == 1
        assert points("textvqa", "$5.00", "typed", protocol) == 1


def test_scienceqa_letters(files):
    folder, answers = files("scienceqa")
    for text, llava, lmms_eval in (
        ("B", True, True),
        ("b", False, True),
        ("B. two", True, True),
        ("B.two", False, True),
        ("B\n", False, True),
        ("The answer is B.", True, False),
        ("The answer is B", False, False),
        ("The answer is B. The answer is B.", False, False),
        ("It is B. two", False, False),
        ("", False, False),
    ):
        for protocol, right in (("llava", llava), ("lmms-eval", lmms_eval)):
            assert scored("scienceqa", [text, "A", "C"], folder, protocol)[0] == (100.0 if right else 50.0), text
    found, measure = scored("scienceqa", ["B", "C", "C"], folder)
    assert found == 100.0
    assert measure.parts()["all"] == pytest.approx(200 / 3)
    assert measure.parts()["subjects"] == pytest.approx({"language science": 100.0, "natural science": 50.0})
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    lines(answers, [records[0], records[2]])  # those with an image alone, as lmms-eval asks them
    result = score("scienceqa", answers, folder)
    assert (result["score"], result["num_questions"], result["num_images"]) == (100.0, 2, 2)


def test_scienceqas_own_output(files, tmp_path):
    folder, _ = files("scienceqa")
    rows = [
        {"question_id": f"{n + 4}", "pred": said, "ground_truth": "B", "question": ""} for n, said in enumerate("BAA")
    ]
    path = tmp_path / "output.json"
    path.write_text(json.dumps({"correct": rows[:2], "incorrect": rows[2:]}))
    assert score("scienceqa", path, folder)["parts"]["all"] == pytest.approx(200 / 3)


# Doubts: blind, examples, two files.


def test_blind_learns_from_other_images(files):
    folder, answers = files("pope")
    result = score("pope", answers, folder)
    # Things are asked of one image each: what is left are the other image's 6 yes to 5 or 6 no: yes to the second.
    assert 0 < result["blind"] < 100
    folder, answers = files("vizwiz")
    assert score("vizwiz", answers, folder)["blind"] == 0.0  # the other image's answer is never right


def test_examples_of_what_could_not_be_parsed(files):
    folder, answers = files("mme")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    for record in records[:5]:
        record["text"] = "I do not know"
    result = score("mme", lines(answers, records), folder)
    assert result["unparsed"] == 5
    assert len(result["unparsed_examples"]) == 3
    assert result["unparsed_examples"][0]["answer"] == "I do not know"
    assert "5 answers could not be parsed: " in score_text(result)


def test_two_files_side_by_side(files, tmp_path, capsys):
    folder, answers = files("gqa")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    other = lines(tmp_path / "other.jsonl", [{**record, "text": "dog"} for record in records])
    ours = read_answered("gqa", answers, folder)
    found = compare(ours, ours.read_others(other))
    assert found["difference"] == pytest.approx(200 / 3)
    assert (found["better"], found["worse"], found["p"]) == (2, 0, 0.5)
    assert found["interval"][0] <= found["difference"] <= found["interval"][1]
    table = tmp_path / "questions.jsonl"
    arguments = ("--truth", folder, "--against", other, "--per-question", table)
    _, out, _ = run(capsys, "score", "gqa", "--answers", answers, *arguments)
    assert f"against {other}, 33.33: +66.67 [" in out
    assert "McNemar's p 0.5" in out
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [row["points"] for row in rows] == [1, 1, 1]
    assert [row["other_points"] for row in rows] == [1, 0, 0]
    assert rows[0] == rows[0] | {
        "id": "200",
        "image": "n0.jpg",
        "truth": "dog",
        "answer": "Dog.",
        "other_answer": "dog",
    }


def test_mmbenchs_questions_are_compared_with_their_rotations(files, tmp_path):
    folder, answers = files("mmbench")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    records[1]["text"] = records[0]["text"] = "D"
    ours = read_answered("mmbench", answers, folder)
    found = compare(ours, ours.read_others(lines(tmp_path / "other.jsonl", records)))
    assert (found["better"], found["worse"], found["p"]) == (1, 0, 1.0)


def test_mcnemars_p():
    assert two_sided_p(0, 0) == 1.0
    assert two_sided_p(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert two_sided_p(2, 8) == two_sided_p(8, 2)
    assert two_sided_p(5, 5) == 1.0
    assert 0 < two_sided_p(30_000, 29_000) < 1e-3


# Submissions: exactly the server's fields and rows.


def submit(capsys, name, answers, folder, path):
    code, _, err = run(capsys, "score", name, "--answers", answers, "--truth", folder, "--submission", path)
    assert code == 0, err
    assert "rows" in err
    return json.loads(path.read_text()) if path.suffix == ".json" else None


def test_vizwiz_submission(files, tmp_path, capsys):
    folder, answers = files("vizwiz")
    asked = [
        {
            "question_id": n,
            "image": f"VizWiz_test_{n:08d}.jpg",
            "text": f"What is this number {n}?",
            "category": "default",
        }
        for n in range(2)
    ]
    lines(folder / "test/llava_test.jsonl", asked)
    (folder / "val.json").unlink()
    found = submit(capsys, "vizwiz", answers, folder, tmp_path / "upload.json")
    assert found == [
        {"image": "VizWiz_test_00000000.jpg", "answer": "red"},
        {"image": "VizWiz_test_00000001.jpg", "answer": "unanswerable"},
    ]
    message = refused(capsys, "score", "vizwiz", "--answers", answers, "--truth", folder)
    assert "the right answers are not published: --submission" in message


def test_vqav2_submission_holds_all_of_test2015(tmp_path, capsys):
    test = tmp_path / "test"
    asked = [
        {"question_id": 7 - n, "image": "COCO_test2015_000000000001.jpg", "text": f"What {n}?", "category": "default"}
        for n in range(4)
    ]
    lines(test / "llava_vqav2_mscoco_test2015.jsonl", asked)
    lines(test / "llava_vqav2_mscoco_test-dev2015.jsonl", asked[1:3])
    answers = [{"question_id": one["question_id"], "prompt": one["text"], "text": "Two dogs."} for one in asked[1:3]]
    path = lines(tmp_path / "merge.jsonl", answers)
    expected = [{"question_id": 7, "answer": ""}, {"question_id": 6, "answer": "2 dogs"}]
    expected += [{"question_id": 5, "answer": "2 dogs"}, {"question_id": 4, "answer": ""}]
    assert submit(capsys, "vqav2", path, test, tmp_path / "upload.json") == expected
    (test / "llava_vqav2_mscoco_test2015.jsonl").unlink()
    arguments = ("score", "vqav2", "--answers", path, "--truth", test, "--submission", tmp_path / "other.json")
    assert "has no v2_OpenEnded_mscoco_test2015_questions.json" in refused(capsys, *arguments)
    assert not (tmp_path / "other.json").exists()


def test_textvqa_submission(files, tmp_path, capsys):
    folder, answers = files("textvqa")
    found = submit(capsys, "textvqa", answers, folder, tmp_path / "upload.json")
    assert found == [{"question_id": 34602 + n, "answer": "red"} for n in range(4)]


def test_gqa_submission(files, tmp_path, capsys):
    folder, answers = files("gqa")
    found = submit(capsys, "gqa", answers, folder, tmp_path / "upload.json")
    assert found[0] == {"questionId": "200", "prediction": "dog"}
    assert score("gqa", tmp_path / "upload.json", folder, "official")["score"] == 100.0


def test_mm_vet_submission(files, tmp_path, capsys):
    folder, grades = files("mm_vet")
    answers = lines(tmp_path / "plain.jsonl", write("mm_vet", folder))
    found = submit(capsys, "mm_vet", answers, folder, tmp_path / "upload.json")
    assert found == {f"v1_{n}": f"It is {n}." for n in range(3)}
    arguments = ("score", "mm_vet", "--answers", grades, "--truth", folder, "--submission", tmp_path / "no.json")
    assert "these are grades, not answers" in refused(capsys, *arguments)


def test_mmbench_submission(files, tmp_path, capsys):
    """The table that LLaVA's conversion uploads: these columns in this order, and every row."""
    folder, answers = files("mmbench")
    path = tmp_path / "upload.xlsx"
    submit(capsys, "mmbench", answers, folder, path)
    head, *rows = load_workbook(BytesIO(path.read_bytes())).active.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    originals = [dict(zip(MMBENCH_HEAD, row, strict=True)) for row in mmbench_rows()]
    assert [row[0] for row in rows] == [one["index"] for one in originals]
    assert rows[0] == (5, 'What is "0"?', "option a0", "option b0", None, None, "A", "A", "dev")
    again = score("mmbench", path, None)
    assert again["score"] == 100.0, "an upload is scored by its own column of answers"
    assert "categories" not in again["parts"]


def test_a_submission_is_whole_or_absent(files, tmp_path, capsys, monkeypatch):
    folder, answers = files("textvqa")
    path = tmp_path / "upload.json"
    path.write_text("of yesterday")
    arguments = ("score", "textvqa", "--answers", answers, "--truth", folder, "--submission")
    code, _, err = run(capsys, *arguments, tmp_path / "upload.xlsx")
    assert (code, "takes a .json file" in err) == (2, True)
    records = answers.read_text().splitlines()
    answers.write_text("\n".join(records[:-1]))
    refused(capsys, *arguments, path)
    assert path.read_text() == "of yesterday"
    answers.write_text("\n".join(records))
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", str(path)))
    )
    code, _, err = run(capsys, *arguments, path)
    assert (code, "No space left" in err) == (4, True)
    assert path.read_text() == "of yesterday"
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_file()) == ["upload.json"]


def test_a_spreadsheet_that_is_none(files, capsys, tmp_path):
    folder, _ = files("mmbench")
    path = tmp_path / "upload.xlsx"
    path.write_bytes(b"PK")
    assert "upload.xlsx cannot be read" in refused(capsys, "score", "mmbench", "--answers", path, "--truth", folder)
    book = Workbook()
    book.active.append(["a", "b"])
    book.save(path)
    assert "upload.xlsx holds no answers" in refused(capsys, "score", "mmbench", "--answers", path, "--truth", folder)


# A benchmark of a stranger's.


def test_a_package_offers_the_benchmark_of_contributing(tmp_path, monkeypatch, capsys):
    """As an installed package, by its entry point."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page.partition("## Add a benchmark")[2], re.DOTALL)
    (line,) = re.findall(r"\nai2d = .*", page)
    about = tmp_path / "site/mine-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[acformer.benchmarks]\nai2d = acformer_ai2d:AI2D\n")
    assert "my_package.ai2d:AI2D" in line
    (tmp_path / "site/acformer_ai2d.py").write_text(f"{code}\nAI2D = Ai2d()\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    asked = [{"id": n, "question": f"Which {n}?", "image": f"{n}.png", "answer": "AB"[n % 2]} for n in range(4)]
    lines(tmp_path / "ai2d/ai2d_test.jsonl", asked)
    answers = [{"question_id": n, "prompt": f"Which {n}?", "text": "A"} for n in range(4)]
    path = lines(tmp_path / "answers.jsonl", answers)
    try:
        code, out, err = run(capsys, "score", "ai2d", "--answers", path, "--truth", tmp_path / "ai2d")
        assert (code, out.startswith("ai2d 50.00 [")) == (0, True), err
    finally:
        BENCHMARKS.pop("ai2d", None)
        sys.modules.pop("acformer_ai2d", None)


@pytest.mark.parametrize(("root", "files", "what"), [
    ("lmms-lab/POPE@test", [], "no file *test*.parquet"),
    ("lmms-lab/POPE", None, "no data set of that name can be had from the hub: 404"),
])  # fmt: skip
def test_a_data_set_that_the_hub_does_not_give(tmp_path, monkeypatch, root, files, what):
    import huggingface_hub

    def download(repo, **options):
        if files is None:
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError, match=re.escape(what)):
        open_folder(Path(root))


def test_a_misspelt_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in (Path("data/pop"), tmp_path / "pop", Path("pop")):
        with pytest.raises(DataError, match=r"there is no such file or folder$"):
            open_folder(path)
