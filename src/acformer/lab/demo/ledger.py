"""Answers as the page writes them: a card a model for the newest, and a table of all with what each cost."""

from html import escape

from acformer.lab.demo.respondent import Answer
from acformer.lab.demo.visit import Visit

LONG = 40  # characters of an answer that is no longer set in large type


def cards(visit: Visit) -> str:
    """The newest answers side by side, and what each was before if it has changed; empty before the first one."""
    newest = visit.rounds[-1] if visit.rounds else ()
    return "".join(["<div class='cards'>", *(_card(visit, place) for place in range(len(newest))), "</div>"])


def table(visit: Visit) -> str:
    """Every answer about this picture, the newest first; empty before the first one."""
    rows = [_cells(answer) for answers in reversed(visit.rounds) for answer in answers]
    if not rows:
        return ""
    if len(visit.looks) == 1:
        rows = [{key: cell for key, cell in row.items() if key != "Model"} for row in rows]
    head = "".join(f'<th scope="col">{key}</th>' for key in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row.values())}</tr>" for row in rows)
    inside = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="All answers">{inside}</div>'


def duration(seconds: float) -> str:
    """`0.42 ms`, `17 ms`, `2.4 s`."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"


def size(num_bytes: int) -> str:
    """`512 B`, `8.5 KiB`, `17 MiB`."""
    amount, units = float(num_bytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while amount >= 1024 and (larger := next(units, None)):
        amount, unit = amount / 1024, larger
    return f"{amount:.1f} {unit}" if unit != "B" and amount < 10 else f"{amount:.0f} {unit}"


def _card(visit: Visit, place: int) -> str:
    answer, before = visit.rounds[-1][place], visit.changed_from(place)
    change = f'<p class="was">before: <s>{escape(before.text)}</s></p>' if before else ""
    kind = "said long" if len(answer.text) > LONG else "said"
    cost = f"first token after {duration(answer.first_token)}, KV cache of the picture {size(answer.image_kv_bytes)}"
    return (
        f'<article class="card"><h3>{escape(answer.model)}</h3>'
        f'<p class="{kind}">{escape(answer.text) or "(nothing)"}</p>{change}'
        f'<p class="cost"><b>{answer.num_tokens} visual tokens</b>, {cost}</p></article>'
    )


def _cells(answer: Answer) -> dict[str, str]:
    return {
        "Question": answer.question,
        "Answer": answer.text,
        "Model": answer.model,
        "Visual tokens": str(answer.num_tokens),
        "Pins": str(answer.pins) or "none",
        "First token": duration(answer.first_token),
        "Encoder": duration(answer.encoder),
        "Connector": duration(answer.connector),
        "Language model": duration(answer.language_model),
        "KV cache": size(answer.kv_bytes),
        "of it the picture": size(answer.image_kv_bytes),
    }
