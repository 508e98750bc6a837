"""Small benchmarks in the formats in which they are published, texts and images being made up here.

`write(name, folder)` writes the files of one, with its images, and returns LLaVA's answers to it, all right ones.
"""

import base64
import json
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import tiny

from acformer.benchmarks.benchmark import OPTION_LETTER, SHORT_ANSWER

Record = dict[str, Any]
VIZWIZ_SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER
WRITERS: dict[str, Callable[[Path], list[Record]]] = {}
"""By name: writes a folder, returns LLaVA's answers."""


def writer(function: Callable[[Path], list[Record]]) -> Callable[[Path], list[Record]]:
    WRITERS[function.__name__] = function
    return function


def write(name: str, folder: Path) -> list[Record]:
    folder.mkdir(parents=True, exist_ok=True)
    return WRITERS[name](folder)


def lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.picture(seed).save(path)


def as_answers(asked: Iterable[Record], right: Iterable[str]) -> list[Record]:
    """In LLaVA's layout."""
    return [
        {"question_id": one["question_id"], "prompt": one["text"], "text": text, "answer_id": "x", "model_id": "m"}
        for one, text in zip(asked, right, strict=True)
    ]


@writer
def pope(folder: Path) -> list[Record]:
    """Two images, three samplings of two things that are there and two that are not; random lacks one."""
    asked, right = [], []
    for number, sampling in enumerate(("adversarial", "popular", "random")):
        labels = []
        for row in range(7 if sampling == "random" else 8):
            name = f"COCO_val2014_{row // 4:012d}.jpg"
            thing = f"thing {row}" if row % 2 == 0 else f"{sampling} {row}"
            label = "yes" if row % 2 == 0 else "no"
            text = f"Is there a {thing} in the image?"
            labels.append({"question_id": row + 1, "image": name, "text": text, "label": label})
            key = number * 10_000_000 + row + 1
            asked.append({"question_id": key, "image": name, "text": text + SHORT_ANSWER, "category": sampling})
            right.append(label.capitalize())
        lines(folder / f"coco/coco_pope_{sampling}.json", labels)
    for seed in range(2):
        image(folder / f"val2014/COCO_val2014_{seed:012d}.jpg", seed)
    lines(folder / "llava_pope_test.jsonl", asked)
    return as_answers(asked, right)


MME_IN_SUBFOLDERS = ("artwork", "celebrity", "landmark", "posters", "scene")
MME_CATEGORIES = (
    *MME_IN_SUBFOLDERS,
    *("existence", "count", "position", "color", "OCR", "commonsense_reasoning", "numerical_calculation"),
    *("text_translation", "code_reasoning"),
)


@writer
def mme(folder: Path) -> list[Record]:
    """All fourteen categories, two images each; five of them keep images and questions in folders of their own."""
    asked, right = [], []
    for category in MME_CATEGORIES:
        for number in range(2):
            inner = "images/" if category in MME_IN_SUBFOLDERS else ""
            texts = "questions_answers_YN/" if inner else ""
            name = f"{category}/{inner}{number:04d}.png"
            release = folder / "MME_Benchmark_release_version"
            image(release / name, number)
            questions = [(f"Is this {category} {number}?", "Yes"), (f"Is this {category} {number + 9}?", "No")]
            path = release / category / f"{texts}{number:04d}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{text} Please answer yes or no.\t{said}\n" for text, said in questions))
            for text, said in questions:
                asked.append({"question_id": name, "image": name, "text": text + SHORT_ANSWER, "category": category})
                right.append(said)
    lines(folder / "llava_mme.jsonl", asked)
    return as_answers(asked, right)


MMBENCH_HEAD = [
    "index",
    "question",
    "hint",
    "A",
    "B",
    "C",
    "D",
    "answer",
    "category",
    "image",
    "source",
    "l2-category",
    "comment",
    "split",
]


def mmbench_rows() -> list[list[Any]]:
    """Three questions with two, three and four options, each in all rotations; the second has a hint."""
    rows = []
    for question, count in enumerate((2, 3, 4)):
        options = [f"option {letter}{question}" for letter in "abcd"[:count]]
        for turn in range(count):
            turned = options[-turn:] + options[:-turn] if turn else options
            index = question + 5 + turn * 1_000_000
            answer = "ABCD"[turned.index(options[0])]
            hint = "Look\ncloser." if question == 1 else ""
            buffer = BytesIO()
            tiny.picture(question).save(buffer, "PNG")
            picture = base64.b64encode(buffer.getvalue()).decode()
            cells = [*turned, *[""] * (4 - count)]
            about = [f"category {question % 2}", picture, "made up", "level", "", "dev"]
            rows.append([index, f'What is "{question}"?', hint, *cells, answer, *about])
    return rows


@writer
def mmbench(folder: Path) -> list[Record]:
    rows = mmbench_rows()
    cells = [MMBENCH_HEAD, *rows]
    text = "\n".join("\t".join('"' + str(cell).replace('"', '""') + '"' for cell in row) for row in cells)
    (folder / "mmbench_dev_20230712.tsv").write_text(text + "\n")
    found = []
    for row in rows:
        record = dict(zip(MMBENCH_HEAD, row, strict=True))
        hint = f"{record['hint']}\n" if record["hint"] else ""
        options = "".join(f"\n{letter}. {record[letter]}" for letter in "ABCD" if record[letter])
        asked = f"{hint}{record['question']}{options}"
        extra = {"round_id": 0, "options": [], "option_char": []}
        found.append({"question_id": record["index"], "prompt": asked, "text": record["answer"], **extra})
    return found


@writer
def mm_vet(folder: Path) -> list[Record]:
    """Three questions; the answers are open."""
    capabilities = (["rec"], ["ocr", "math"], ["rec", "ocr"])
    asked, official = [], {}
    for number, capability in enumerate(capabilities):
        text = f"What is number {number}?"
        asked.append({"question_id": number, "image": f"v1_{number}.png", "text": text, "category": "conv"})
        entry = {"imagename": f"v1_{number}.png", "question": text, "answer": "x", "capability": capability}
        official[f"v1_{number}"] = entry
        image(folder / f"images/v1_{number}.png", number)
    lines(folder / "llava-mm-vet.jsonl", asked)
    (folder / "mm-vet.json").write_text(json.dumps(official))
    return as_answers(asked, [f"It is {number}." for number in range(3)])


TEN = ["red"] * 6 + ["crimson"] * 3 + ["a rose"]
"""To a question about colour."""


@writer
def textvqa(folder: Path) -> list[Record]:
    """Four questions about three images; the second image is asked about twice."""
    data, asked = [], []
    for number, key in enumerate(("00a", "00b", "00b", "00c")):
        text = f"What is the NAME number {number}?"
        data.append({"image_id": key, "question_id": 34602 + number, "question": text, "answers": TEN})
        hint = "" if number == 3 else "TAIL, S,, 1"
        prompt = f"{text}\nReference OCR token: {hint}{SHORT_ANSWER}"
        asked.append({"question_id": key, "image": f"{key}.jpg", "text": prompt, "category": "default"})
        image(folder / f"train_images/{key}.jpg", number)
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": data}))
    lines(folder / "llava_textvqa_val_v051_ocr.jsonl", asked)
    return as_answers(asked, ["Red."] * 4)


@writer
def gqa(folder: Path) -> list[Record]:
    """A query, a choice and a yes or no; a fourth is not of the balanced set."""
    kinds = (("query", "dog"), ("choose", "left"), ("verify", "no"), ("query", "cat"))
    entries, asked, right = {}, [], []
    for number, (structural, answer) in enumerate(kinds):
        text = f"Which thing is it{' now' * number}?"
        key = f"20{number}"
        types = {"structural": structural, "semantic": "attr", "detailed": "x"}
        entries[key] = {"question": text, "imageId": f"n{number // 2}", "answer": answer, "types": types}
        entries[key]["isBalanced"] = number != 3
        if number != 3:
            name = f"n{number // 2}.jpg"
            asked.append({"question_id": key, "image": name, "text": text + SHORT_ANSWER, "category": "default"})
            right.append(f"{answer.capitalize()}.")
        image(folder / f"images/n{number // 2}.jpg", number // 2)
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(entries))
    lines(folder / "llava_gqa_testdev_balanced.jsonl", asked)
    return as_answers(asked, right)


def vqa_files(folder: Path, prefix: str) -> list[Record]:
    """Questions and annotations as VQA has them: three about two images."""
    questions, annotations, asked = [], [], []
    for number, (kind, people) in enumerate(
        (("other", TEN), ("yes/no", ["yes"] * 10), ("number", ["2"] * 7 + ["3"] * 3))
    ):
        text, picture, key = f"What is it, number {number}?", number // 2, 262148000 + number
        questions.append({"image_id": picture, "question": text, "question_id": key})
        answers = [{"answer": said, "answer_confidence": "yes", "answer_id": i + 1} for i, said in enumerate(people)]
        annotations.append(
            {
                "question_type": "what is" if number else "is",
                "multiple_choice_answer": people[0],
                "answers": answers,
                "image_id": picture,
                "answer_type": kind,
                "question_id": key,
            }
        )
        asked.append({"question_id": key, "text": text + SHORT_ANSWER})
        image(folder / f"val2014/COCO_val2014_{picture:012d}.jpg", picture)
    head = {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    (folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json").write_text(
        json.dumps({**head, "questions": questions})
    )
    (folder / f"{prefix}mscoco_val2014_annotations.json").write_text(json.dumps({**head, "annotations": annotations}))
    return as_answers(asked, ["Red.", "Yes", "two"])


@writer
def vqav2(folder: Path) -> list[Record]:
    return vqa_files(folder, "v2_")


@writer
def okvqa(folder: Path) -> list[Record]:
    return vqa_files(folder, "")


@writer
def vizwiz(folder: Path) -> list[Record]:
    """val, whose second question nobody could answer."""
    records, asked = [], []
    for number, people in enumerate((TEN, ["unanswerable"] * 8 + ["blurry", "blurry"])):
        name = f"VizWiz_val_{number:08d}.jpg"
        answers = [{"answer": said, "answer_confidence": "yes"} for said in people]
        kind = "unanswerable" if number else "other"
        text = f"What is this number {number}? "
        records.append({"image": name, "question": text, "answers": answers, "answer_type": kind, "answerable": 1})
        asked.append({"question_id": number, "text": text + VIZWIZ_SUFFIX})
        image(folder / f"val/{name}", number)
    (folder / "val.json").write_text(json.dumps(records))
    return as_answers(asked, ["Red", "Unanswerable"])


@writer
def scienceqa(folder: Path) -> list[Record]:
    """Two questions with an image, one without."""
    records, asked, problems = [], [], {}
    for number, (letter, has_image) in enumerate((("B", True), ("A", False), ("C", True))):
        text = f"Context: It rains.\nWhich is number {number}?\nA. one\nB. two\nC. three"
        value = f"<image>\n{text}" if has_image else text
        record: Record = {"id": str(number + 4)}
        if has_image:
            record["image"] = f"{number + 4}/image.png"
            image(folder / f"images/test/{number + 4}/image.png", number)
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": letter}]
        records.append({**record, "conversations": turns})
        asked.append({"question_id": record["id"], "text": value + OPTION_LETTER})
        problems[record["id"]] = {
            "subject": "natural science" if number else "language science",
            "choices": ["one"] * 3,
        }
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(records))
    (folder / "problems.json").write_text(json.dumps(problems))
    return as_answers(asked, "BAC")
