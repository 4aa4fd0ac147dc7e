"""What was found for a text: shown in a terminal, written as JSON, recorded as CSV."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from influence.pipelines.cells import as_row
from influence.pipelines.outcome import table
from influence.pipelines.texts import short


class Hit(NamedTuple):
    """An example that was found.

    Attributes:
        score: positive helps.
        example: its row in the dataset, or its chunk's number.
        position: where every token has a row, the token.
        text: what it says.
    """

    score: float
    example: int
    position: int | None
    text: str


class Answer(NamedTuple):
    """What was found for a text."""

    query: str
    loss: float
    best: list[Hit]
    worst: list[Hit]


def shown(answers: Sequence[Answer], width: int) -> str:
    """Return answers for a terminal."""
    lines = []
    for answer in answers:
        lines.append(f"{answer.query!r} (loss {answer.loss:.4g})")
        against = "hurts" if answer.worst and answer.worst[0].score < 0 else "helps least"
        for title, hits in (("helps", answer.best), (against, answer.worst)):
            rows = [
                [rank + 1, hit.score, hit.example, *_at(hit), short(hit.text, width)] for rank, hit in enumerate(hits)
            ]
            token = ["token"] if hits and hits[0].position is not None else []
            lines.append(table([title, "score", "example", *token, "text"], rows, "  "))
    return "\n".join(lines)


def _at(hit: Hit) -> list[int]:
    return [] if hit.position is None else [hit.position]


def as_facts(answer: Answer) -> dict[str, Any]:
    """Return an answer as JSON can write it."""
    ends = {name: [hit._asdict() for hit in getattr(answer, name)] for name in ("best", "worst")}
    return {"query": answer.query, "loss": answer.loss, **ends}


def record(path: str | Path, answers: Sequence[Answer]) -> None:
    """Append answers to a CSV file, with a head if it is new; texts as `as_cell` writes them.

    All in one write, so that a kill leaves all of its lines or none.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if not Path(path).exists() or not Path(path).stat().st_size:
        writer.writerow(["query", "direction", "rank", "score", "example", "position", "text"])
    for answer in answers:
        for direction in ("best", "worst"):
            for rank, hit in enumerate(getattr(answer, direction)):
                place = "" if hit.position is None else hit.position
                row = [answer.query, direction, rank + 1, hit.score, hit.example, place, hit.text]
                writer.writerow(as_row(row))
    with open(path, "ab") as file:
        file.write(text.getvalue().encode())


def check_record(path: str | Path) -> None:
    """Refuse a file that cannot be written, before the model is loaded.

    Raises:
        OSError: saying why.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the file to append results to by --record")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {path.parent} to write {path.name} in: make it, or change --record"
        )
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path} may not be written: change --record")
