"""447,793 made-up answers and their truth in VQAv2's published layout, to measure seconds: python ... FOLDER."""

import json
import random
import sys
from pathlib import Path

out = Path(sys.argv[1])
out.mkdir(exist_ok=True)
r = random.Random(0)
n = 447_793
words = [f"word{i}" for i in range(3000)] + ["yes", "no", "2", "two", "don't", "men's", "a dog", "red, blue"]
questions, notes, answers = [], [], []
for i in range(n):
    w = r.choice(words)
    qid = 10 * i + 1
    ten = [
        {"answer": w if r.random() < 0.7 else r.choice(words), "answer_confidence": "yes", "answer_id": k + 1}
        for k in range(10)
    ]
    questions.append({"image_id": i // 3, "question": f"what is it {i}?", "question_id": qid})
    notes.append(
        {
            "question_id": qid,
            "image_id": i // 3,
            "answers": ten,
            "answer_type": r.choice(["yes/no", "number", "other"]),
            "question_type": "what is",
            "multiple_choice_answer": w,
        }
    )
    answers.append(
        {
            "question_id": qid,
            "prompt": f"what is it {i}?\nAnswer the question using a single word or phrase.",
            "text": r.choice([w, w + ".", r.choice(words)]),
            "answer_id": str(i),
            "model_id": "m",
            "metadata": {},
        }
    )
(out / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
(out / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": notes}))
(out / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
