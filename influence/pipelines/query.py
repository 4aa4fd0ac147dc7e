"""Ask an index in words: which examples help a text, and which hurt it."""

import csv
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from influence import data
from influence.data.parsing import text_of
from influence.func.engine.per_example import per_example_grads_fn
from influence.func.fingerprint import weights_hash
from influence.index import Attributor, FaissConfig, Fingerprint, fingerprint_of, open_index
from influence.pipelines.frame import recorded
from influence.pipelines.frame.configs import DataConfig, Inversion, Run, RunConfig, at_least
from influence.pipelines.frame.outcome import Outcome, Say, as_row, quiet
from influence.pipelines.frame.prepare import Measured, check_gradients, measure, predicted
from influence.pipelines.frame.texts import by_part, datasets_of, highlighted, short, texts_of
from influence.pipelines.frame.tokens import tokens_of, vocabulary_hash
from influence.terminal import table
from influence.types import Rows

COLUMNS = ("query", "direction", "rank", "score", "example", "position", "text")
"""What a record's first line says."""


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


class TextAnswer(NamedTuple):
    """What was found for a text."""

    query: str
    loss: float
    best: list[Hit]
    worst: list[Hit]


def shown(answers: Sequence[TextAnswer], width: int) -> str:
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


def as_facts(answer: TextAnswer) -> dict[str, Any]:
    """Return an answer as JSON can write it."""
    ends = {name: [hit._asdict() for hit in getattr(answer, name)] for name in ("best", "worst")}
    return {"query": answer.query, "loss": answer.loss, **ends}


def record(path: str | Path, answers: Sequence[TextAnswer]) -> None:
    """Append answers to a CSV file, with a head if it is new; texts as `as_cell` writes them.

    All in one write, so that a kill leaves all of its lines or none.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if not Path(path).exists() or not Path(path).stat().st_size:
        writer.writerow(COLUMNS)
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
    if path.is_file() and path.stat().st_size:
        with open(path, "rb") as file:
            if file.readline(1000).strip() != ",".join(COLUMNS).encode():
                raise FileExistsError(f"{path} holds something else than results of queries: change --record")


@dataclass(frozen=True)
class QueryConfig:
    """Ask an index which examples help a text (lower its loss) and which hurt it.

    influence query runs/corpus --text "where does babo live ?"

    Without --text and --file it is a prompt: type a text, or exit. The index's own model, tokenizer, loss and transform
    are used, whatever they were; but a text is no step of training, so of Adam's updates it sees the plain gradient.
    An index is data: code that it names, of its model or its loss, runs only if you type so.

    Attributes:
        run: the run directory of build.
        text: one or more texts to ask about.
        file: a file of texts, one a line.
        k: how many examples to show at either end.
        blocks: compare these blocks only (names or globs).
        faiss: find neighbours by FAISS, which keeps its index beside the run, instead of scanning all rows.
        record: a CSV file to append every result to.
        model: another folder or Hub id of the same model; weights that differ are refused.
        model_kwargs: more arguments of from_pretrained, as JSON or YAML, instead of the index's.
        trust_remote_code: run code that comes with the model; an index cannot ask for it.
        loss: the loss to measure the query by; needed where the index's is a function, package.module:function, which
            is imported and run only if it is named here.
        hessian: factors of influence hessian to put on the query's side, as whole blocks or projected rows want.
        power: of that curvature on the query's side.
        damping: of that curvature.
        inversion: of that curvature.
        force: answer what the fingerprints refuse, with a warning.
        device: where the model runs.
        width: characters of an example that are shown.
    """

    run: Run
    text: tuple[str, ...] = ()
    file: str | None = None
    k: int = 5
    blocks: tuple[str, ...] = ()
    faiss: FaissConfig = field(default_factory=lambda: FaissConfig(index_factory=None))
    record: str | None = None
    model: str | None = None
    model_kwargs: str | None = None
    trust_remote_code: bool = False
    loss: str | None = None
    hessian: str | None = None
    power: float = -1.0
    damping: float = 0.1
    inversion: Inversion = "damped"
    force: bool = False
    device: str = "cpu"
    width: int = 100

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range."""
        at_least(self, -1, "power", most=0)
        at_least(self, 0, "damping")
        at_least(self, 1, "k")
        at_least(self, 2, "width")

    @property
    def asks(self) -> bool:
        """Whether the texts are given."""
        return bool(self.text) or self.file is not None


class Session(NamedTuple):
    """An open index with its model.

    Attributes:
        config: what was asked for.
        attributor: searches the index.
        measured: the loss and the transform of the query's side.
        data: how the index's examples became tokens.
        task: of the model.
        weights: the hash of the model's weights.
        recorded: what else a query's fingerprint says: the tokenizer's vocabulary, the loss as the index names it, and
            the reference of a KL.
        texts: what examples say.
        marked: what they say around a token.
        greeting: what to say first.
    """

    config: QueryConfig
    attributor: Attributor
    measured: Measured
    data: DataConfig
    task: str
    weights: str
    recorded: dict[str, Any]
    texts: Callable[[Sequence[int]], list[str]]
    marked: Callable[[Sequence[int], Sequence[int]], list[str]]
    greeting: str


def open_session(config: QueryConfig) -> Session:
    """Open an index and load its model.

    Args:
        config: what is asked for.

    Returns:
        The session.

    Raises:
        ValueError: if the index holds scores, or was not made by a pipeline, or `k` is too large.
    """
    if config.record is not None:
        check_record(config.record)
    index = open_index(config.run)
    check_gradients(index)
    stored = index.about.config
    if not {"model", "data", "loss", "transform"} <= set(stored):
        raise ValueError(
            f"{config.run} was built from Python, so it does not say by which model: ask it from Python, with "
            "Attributor(…).ask(…)"
        )
    if not 1 <= config.k <= len(index):
        raise ValueError(f"k must be between 1 and the number of rows, {len(index):,}; got {config.k}")
    if config.model is None and not config.trust_remote_code:
        recorded.refuse_remote_code(stored["model"], config.run)
    model = recorded.model_of(stored["model"], config.run, config.trust_remote_code, config.model_kwargs)
    model = replace(model, model=config.model) if config.model is not None else model
    own = recorded.data_of(stored["data"], config.run)
    view = recorded.view_of(stored["transform"], config.run)
    if config.hessian is not None:
        if view.hessian is not None and view.power + config.power != -1:
            raise ValueError(
                f"the index was built with power {view.power:g} of a curvature, and --power {config.power:g} "
                f"makes {view.power + config.power:g}; they must sum to -1: pass --power {-1 - view.power:g}"
            )
        curvature = {name: getattr(config, name) for name in ("hessian", "power", "damping", "inversion")}
        view = replace(view, **curvature)
    if view.optimizer_view == "update":
        view = replace(view, optimizer=None, optimizer_view="scale")
    loss = recorded.loss_of(stored["loss"], config.run, config.loss)
    measured = measure(model, loss, view, RunConfig(device=config.device))
    begins, parts = datasets_of(index, own)
    shown = [(part, measured.tokenizer, measured.config) for part in parts]
    texts, marked = (by_part(begins, [make(*each) for each in shown]) for make in (texts_of, highlighted))
    weights = weights_hash(measured.loss_fn, measured.params)
    greeting = f"{index!r}; type a text, or exit"
    known: dict[str, Any] = {"vocabulary": vocabulary_hash(measured.tokenizer), "loss": loss.loss}
    if (reference := measured.loss_fn.reference) is not None:
        known["reference"] = reference
    asked = Attributor(config.run, faiss=config.faiss)
    return Session(config, asked, measured, own, model.task, weights, known, texts, marked, greeting)


def ask(session: Session, texts: Sequence[str]) -> list[TextAnswer]:
    """Find the examples at both ends for each text.

    Args:
        session: an open index.
        texts: the texts.

    Returns:
        An answer per text.

    Raises:
        ValueError: if a text is empty or says nothing to predict, or its rows do not belong to the index's.
    """
    config = session.config
    rows, losses, fingerprint = query_rows(session, texts)
    blocks = list(config.blocks) or None
    found = session.attributor.ask(rows, blocks=blocks, fingerprint=fingerprint, force=config.force)
    ends = [found.top(config.k), found.bottom(config.k)]
    answers = []
    for number, text in enumerate(texts):
        best, worst = ([*_hits(session, hits, number)] for hits in ends)
        answers.append(TextAnswer(text, float(losses[number]), best, worst))
    return answers


def query_rows(session: Session, texts: Sequence[str]) -> tuple[Rows, torch.Tensor, Fingerprint]:
    """Return the rows, the losses and the fingerprint of some texts.

    Raises:
        ValueError: if a text is empty or says nothing to predict.
    """
    empty = [number for number, text in enumerate(texts) if not text.strip()]
    if empty or not texts:
        raise ValueError("the query is empty: give a text of at least two tokens")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the query {text!r} has a byte that is no UTF-8: give a text without it") from error
    measured = session.measured
    plain = DataConfig("query", max_length=session.data.max_length, truncation=session.data.truncation)
    tokens = tokens_of(plain, data.load([{"text": text} for text in texts]), measured.tokenizer, measured.config)
    batch = data.collate(tokens, torch.arange(len(tokens)))
    batch = {name: value.to(session.config.device) for name, value in batch.items()}
    silent = (~predicted(batch, session.task)).nonzero().flatten().tolist()
    if silent:
        raise ValueError(
            f"the query {texts[silent[0]]!r} has {int(tokens.lengths[silent[0]])} token, and a loss needs one more to "
            "predict: give a longer text"
        )
    rows_of = per_example_grads_fn(measured.loss_fn, measured.params, batch, transform=measured.transform)
    rows, losses = rows_of.with_losses(measured.params, batch)
    shapes = {name: tuple(row.shape[1:]) for name, row in rows.items()}
    made = fingerprint_of(
        measured.loss_fn, measured.params, measured.transform, shapes, session.weights, session.recorded
    )
    return rows, losses, made


def _hits(session: Session, hits: Any, number: int) -> list[Hit]:
    index, rows = session.attributor.index, hits.indices[number]
    scores = hits.values[number].tolist()
    if not index.per_token:
        examples = index.index[rows].tolist()
        return [Hit(s, n, None, text) for s, n, text in zip(scores, examples, session.texts(examples), strict=True)]
    examples, positions = (numbers.tolist() for numbers in index.place(rows))
    texts = session.marked(examples, positions)
    return [Hit(*hit) for hit in zip(scores, examples, positions, texts, strict=True)]


def run(config: QueryConfig, say: Say = quiet) -> Outcome:
    """Answer the texts that are given.

    Args:
        config: the index and the texts.
        say: where its lines go.

    Returns:
        The answers.

    Raises:
        ValueError: if there is no text.
    """
    texts = [*config.text, *_lines(config.file)]
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("the query is empty: give a text by --text, or a file of texts by --file")
    session = open_session(config)
    answers = ask(session, texts)
    if config.record is not None:
        record(config.record, answers)
    facts = {"run": config.run, "answers": [as_facts(answer) for answer in answers]}
    return Outcome(config.run, facts, shown(answers, config.width))


def _lines(file: str | None) -> list[str]:
    if file is None:
        return []
    if file == "-":
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file} of texts to ask about")
    return [line for line in text_of(file).splitlines() if line.strip()]
