"""The sample page of docs/ and the table of blind scores of docs/scenes.md, made from the data set itself.

    acformer fetch openmoji photographs
    python examples/scenes_datasheet.py

Writes docs/scenes-samples.md and docs/images/scenes-LEVEL.png, prints the table.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from acformer.evaluate.families import MEASURES, blind_replies, family_scores
from acformer.evaluate.report import as_reply, training_questions
from acformer.lab.markdown import markdown_table
from acformer.lab.scenes.captions import caption
from acformer.lab.scenes.dataset import undrawn_samples
from acformer.lab.scenes.difficulty import DIFFICULTIES, Difficulty
from acformer.lab.scenes.draw import draw_scene
from acformer.lab.scenes.layout import SIDE, make_scene
from acformer.lab.scenes.questions import ask

DOCS = Path(__file__).parents[1] / "docs"
ROWS, COLUMNS, GAP, COLOURS = 2, 5, 6, 256


def contact_sheet(difficulty: Difficulty) -> Image.Image:
    """The first ten test scenes, numbered row by row."""
    step = SIDE + GAP
    sheet = Image.new("RGB", (COLUMNS * step - GAP, ROWS * (step + 20)), "white")
    for number in range(ROWS * COLUMNS):
        corner = number % COLUMNS * step, number // COLUMNS * (step + 20)
        sheet.paste(draw_scene(make_scene(difficulty, "test", number)), (corner[0], corner[1] + 20))
        font = ImageFont.load_default(16)
        ImageDraw.Draw(sheet).text(corner, str(number), "black", font)
    return sheet.quantize(COLOURS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def sample_page() -> str:
    """Images, captions, questions and answers."""
    parts = [
        "# 30 scenes",
        "The first ten test scenes of each difficulty, with one asking of every question; the images here have fewer "
        f"colours ({COLOURS}) than those that a model sees. Made by `python examples/scenes_datasheet.py`. "
        "All emojis designed by [OpenMoji](https://openmoji.org), licence CC BY-SA 4.0. "
        "What it all means: [openmoji-scenes](scenes.md).",
    ]
    for name, difficulty in DIFFICULTIES.items():
        parts += [f"## {name}", f"![Ten scenes of {name}](images/scenes-{name}.png)"]
        for number in range(ROWS * COLUMNS):
            scene = make_scene(difficulty, "test", number)
            table = markdown_table(["question", "answer"], ([q.text, q.answer] for q in ask(scene, thorough=False)))
            parts += [f"### {name} {number}", f"Caption: {caption(scene)}", table]
    return "\n\n".join(parts) + "\n"


def blind_table() -> str:
    """Blind score of each family, in percent, as `acformer eval` tells it."""
    rows = []
    for name in DIFFICULTIES:
        known = training_questions(name)
        for split in ("test", "novel"):
            blind = blind_replies(known, [as_reply(sample) for sample in undrawn_samples(name, split)])
            scores = family_scores(blind, blind)
            columns = [*(scores["families"][family] for family in MEASURES), scores["average"]]
            rows.append([f"`{name}:{split}`", f"{len(blind):,}", *(f"{100 * each['score']:.1f}" for each in columns)])
    return markdown_table(["", "questions", *MEASURES, "average"], rows)


if __name__ == "__main__":
    for difficulty in DIFFICULTIES.values():
        contact_sheet(difficulty).save(DOCS / "images" / f"scenes-{difficulty.name}.png", optimize=True)
    (DOCS / "scenes-samples.md").write_text(sample_page(), encoding="utf-8")
    print(blind_table())
