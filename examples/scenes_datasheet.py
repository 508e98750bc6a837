"""The sample page of docs/ and the table of blind scores of docs/scenes.md, made from the data set itself.

    acformer fetch openmoji photographs
    python examples/scenes_datasheet.py

Writes docs/scenes-samples.md and docs/images/scenes-LEVEL.png, prints the table.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from acformer.evaluate.families import MEASURES, blind_replies, family_scores
from acformer.evaluate.report import as_reply, training_questions
from acformer.lab.scenes.captions import caption
from acformer.lab.scenes.dataset import undrawn_samples
from acformer.lab.scenes.draw import draw_scene
from acformer.lab.scenes.layout import SIDE, make_scene
from acformer.lab.scenes.levels import LEVELS, Level
from acformer.lab.scenes.questions import ask

DOCS = Path(__file__).parents[1] / "docs"
ROWS, COLUMNS, GAP, COLOURS = 2, 5, 6, 256


def contact_sheet(level: Level) -> Image.Image:
    """The first ten test scenes, numbered row by row."""
    step = SIDE + GAP
    sheet = Image.new("RGB", (COLUMNS * step - GAP, ROWS * (step + 20)), "white")
    for number in range(ROWS * COLUMNS):
        corner = number % COLUMNS * step, number // COLUMNS * (step + 20)
        sheet.paste(draw_scene(make_scene(level, "test", number)), (corner[0], corner[1] + 20))
        font = ImageFont.load_default(16)
        ImageDraw.Draw(sheet).text(corner, str(number), "black", font)
    return sheet.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def sample_page() -> str:
    """Pictures, captions, questions and answers."""
    parts = [
        "# 20 scenes",
        "The first ten test scenes of each level, with one asking of every question; the pictures here have fewer "
        f"colours ({COLOURS}) than those that a model sees. Made by `python examples/scenes_datasheet.py`. "
        "All emojis designed by [OpenMoji](https://openmoji.org), licence CC BY-SA 4.0. "
        "What it all means: [openmoji-scenes](scenes.md).",
    ]
    for level in LEVELS.values():
        parts += [f"## {level.name}", f"![Ten scenes of {level.name}](images/scenes-{level.name}.png)"]
        for number in range(ROWS * COLUMNS):
            scene = make_scene(level, "test", number)
            rows = [f"| {question.text} | {question.answer} |" for question in ask(scene, thorough=False)]
            table = "\n".join(["| question | answer |", "|---|---|", *rows])
            parts += [f"### {level.name} {number}", f"Caption: {caption(scene)}", table]
    return "\n\n".join(parts) + "\n"


def blind_table() -> str:
    """Blind score of each family, in percent, as `acformer eval` tells it."""
    rows = []
    for level in LEVELS.values():
        known = training_questions(level.name)
        for split in ("test", "novel"):
            blind = blind_replies(known, [as_reply(sample) for sample in undrawn_samples(level.name, split)])
            scores = family_scores(blind, blind)
            cells = [scores["families"][family]["score"] for family in MEASURES] + [scores["average"]["score"]]
            questions = f"{len(blind):,}"
            rows.append(
                " | ".join([f"| `{level.name}:{split}`", questions, *(f"{100 * cell:.1f}" for cell in cells)]) + " |"
            )
    head = f"| | questions | {' | '.join(MEASURES)} | average |"
    return "\n".join([head, "|" + "---|" * (len(MEASURES) + 3), *rows])


if __name__ == "__main__":
    for level in LEVELS.values():
        contact_sheet(level).save(DOCS / "images" / f"scenes-{level.name}.png", optimize=True)
    (DOCS / "scenes-samples.md").write_text(sample_page(), encoding="utf-8")
    print(blind_table())
