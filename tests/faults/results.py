"""What came of a fault, and the table of all of them."""

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

GOOD = ("same", "refused")
BAD = {
    "lost": "the same command again does not give what an undisturbed one gives",
    "unequal": "two runs of the same work are not the same bytes",
    "left": "all is there, and files beside it that nobody removes",
    "wrong": "what is read is neither refused nor right",
    "changed": "a file of the user's was changed or removed",
    "mixed": "files of two owners in one directory, and no refusal",
    "hang": "it did not end in time",
    "traceback": "an error that nobody foresaw",
    "signal": "it was killed by a signal that nobody sent",
    "unseen": "a check of the library was taken out, and no fault shows",
    "unclear": "refused without naming the file",
}
KINDS = ("kill", "damage", "pair", "foreign", "mutation")


@dataclass(frozen=True)
class Task:
    """One fault to inject; its name replays it.

    Attributes:
        kind: of fault: one of `KINDS`.
        case: which command or reader.
        what: which fault: the number of an event, the name of a damage and its seed, ….
    """

    kind: str
    case: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.case}/{self.what}"

    @classmethod
    def read(cls, text: str) -> "Task":
        """Return the task of a name."""
        kind, case, what = text.split("/", 2)
        return cls(kind, case, what)

    @property
    def replay(self) -> str:
        """What to type to see it again."""
        return f"python -m tests.faults --replay {shlex.quote(str(self))}"


@dataclass(frozen=True)
class Result:
    """What came of a task: an outcome, one of `GOOD` or `BAD`, and where that shows."""

    task: Task
    protocol: str
    outcome: str
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Whether it is a fault of the library."""
        return self.outcome not in GOOD

    def json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self) | {"task": str(self.task), "replay": self.task.replay}


def table(results: Iterable[Result]) -> str:
    """Return how many faults of each kind each protocol met, and what came of them."""
    results = list(results)
    rows = sorted({(r.protocol, r.task.kind) for r in results}, key=lambda row: (KINDS.index(row[1]), row[0]))
    columns = [*GOOD, *BAD]
    lines = [["protocol", "fault", "injected", *columns]]
    for protocol, kind in rows:
        counts = Counter(r.outcome for r in results if (r.protocol, r.task.kind) == (protocol, kind))
        lines.append([protocol, kind, str(counts.total()), *(str(counts[name] or "") for name in columns)])
    counts = Counter(r.outcome for r in results)
    lines.append(["all", "", str(counts.total()), *(str(counts[name] or "") for name in columns)])
    return "\n".join(_aligned(lines))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 2
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
