"""Judge an index, or scores, by known answers: how often the right documents come first."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from influence.data.parsing import parsed, shortly, text_of
from influence.func.engine.per_example import per_example_grads_fn
from influence.func.retrieval import Recall, first_gold, first_gold_listed, recall
from influence.index import fingerprint_of, open_index
from influence.pipelines.frame.configs import Run, RunConfig
from influence.pipelines.frame.directory import config_of, names_in
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.prepare import batches_of
from influence.pipelines.frame.tokens import read_data
from influence.pipelines.passes.best import read_best
from influence.pipelines.passes.queries import column
from influence.pipelines.query import QueryConfig, open_session
from influence.store.folder import RUN
from influence.terminal import table


@dataclass(frozen=True)
class RecallConfig:
    """Measure how often the right documents come first: recall@k and mean reciprocal rank.

    influence recall runs/scores --gold gold.jsonl

    influence recall runs/corpus --gold questions.jsonl --dataset questions.jsonl --prompt-column prompt
    --completion-column answer

    A line of the gold file is {"gold": [rows of the corpus]}, one per query, in the order of the queries. A line with
    {"query": 3, "gold": [...]} names its query; then queries may be left out. A query's rank is that of its first gold
    document.

    Attributes:
        run: a run of score, trackstar, ekfac or trak, with a score per query; or an index written by build.
        gold: the right answers: JSON lines with a field gold, or one JSON object {query: [rows]}.
        dataset: for an index, the queries to ask. Their gradients are taken as the index's were.
        prompt_column: the dataset's text column. Default: the index's.
        completion_column: the dataset's answer column. Then only the answer is labelled.
        k: numbers of documents to look through.
        force: answer even if the fingerprints disagree, with a warning.
        model_kwargs: as in influence query.
        trust_remote_code: run code that comes with the model. An index cannot ask for it.
        loss: as in influence query. Your own loss function runs only if it is named here.
        device: where the model runs.
    """

    run: Run
    gold: str
    dataset: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    k: tuple[int, ...] = (1, 10)
    force: bool = False
    model_kwargs: str | None = None
    trust_remote_code: bool = False
    loss: str | None = None
    device: str = "cpu"


class Gold(NamedTuple):
    """Which documents are right.

    Attributes:
        rows: of the corpus, by the query's number.
        by_place: whether lines without a query's number are among them, so that every query has a line.
    """

    rows: dict[int, list[int]]
    by_place: bool


class Ranked(NamedTuple):
    """Where the gold documents of some queries are.

    Attributes:
        name: the queries' run or dataset.
        ranks: of each query's first gold document; 0 beyond the list.
        listed: how many documents were kept of each query, if not all.
    """

    name: str
    ranks: Int[Tensor, " q"]
    listed: int | None = None


def run(config: RecallConfig, say: Say = quiet) -> Outcome:
    """Judge a run.

    Args:
        config: the run and the gold.
        say: where its lines go.

    Returns:
        Recall and mean reciprocal rank.

    Raises:
        ValueError: if gold and queries do not belong together, or the run says nothing of single queries.
    """
    if not config.k or min(config.k) < 1:
        raise ValueError(f"k must be at least 1; got {', '.join(map(str, config.k)) or 'none'}")
    gold = read_gold(config.gold)
    scores = _scores_at(Path(config.run))
    if scores is None and config.dataset is None:
        raise ValueError(f"{config.run} holds gradients, and no scores: give the --dataset of the queries to ask it")
    asked = ("dataset", "prompt_column", "completion_column", "loss", "model_kwargs")
    if scores is not None and (unused := [name for name in asked if getattr(config, name) is not None]):
        flag = "--" + unused[0].replace("_", "-")
        raise ValueError(f"{flag} is for an index: the queries of the scores in {scores} were asked already")
    found = of_scores(config, scores, gold) if scores is not None else [of_index(config, gold)]
    judged = [(each, recall(each.ranks, config.k)) for each in found]
    facts = [_facts(each, metrics) for each, metrics in judged]
    head = ["queries", "number", *(f"recall@{k}" for k in config.k), "MRR"]
    rows = [[each.name, m.queries, *(f"{m.recall[k]:.3f}" for k in config.k), f"{m.mrr:.3f}"] for each, m in judged]
    text = table(head, rows)
    if (kept := found[0].listed) is not None:
        text += f"\nonly the {kept:,} best documents of each query were kept: beyond them 1 / rank counts as 0"
    return Outcome(config.run, {"gold": config.gold, "results": facts}, text)


def _facts(ranked: Ranked, metrics: Recall) -> dict[str, Any]:
    shares = {f"recall@{k}": share for k, share in metrics.recall.items()}
    kept = {} if ranked.listed is None else {"listed": ranked.listed}
    return {"queries": ranked.name, "number": metrics.queries, **shares, "mrr": metrics.mrr, **kept}


def read_gold(path: str | Path) -> Gold:
    """Read which documents are right.

    Args:
        path: JSON lines with a field `gold`, or one object `{query: [rows]}`.

    Returns:
        The gold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the line that is no gold.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no gold file {path}")
    text = text_of(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):  # it is read line by line below, which says what is wrong
        whole = None
    if isinstance(whole, Mapping) and "gold" not in whole:
        lines = [(f"query {query!r}", {"query": query, "gold": rows}) for query, rows in whole.items()]
    else:
        lines = [(f"line {number}", _parsed(line, path, number)) for number, line in _lines(text)]
    gold: dict[int, list[int]] = {}
    for number, (where, line) in enumerate(lines):
        query, rows = _number(line.get("query", number)), line.get("gold")
        if query is None or not isinstance(rows, list) or not rows or None in (known := [_number(r) for r in rows]):
            raise ValueError(
                f'{path}, {where}: expected {{"gold": [rows of the corpus]}} with at least one row, and the number of '
                f'its query in "query" or by its place; got {shortly(line)}'
            )
        if query in gold:
            raise ValueError(f"{path}, {where}: query {query} has gold already: put all of its rows in one list")
        gold[query] = [row for row in known if row is not None]
    if not gold:
        raise ValueError(f"{path} is empty: it has no query")
    return Gold(gold, any("query" not in line for _, line in lines))


def _lines(text: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _parsed(line: str, path: str | Path, number: int) -> dict[str, Any]:
    read = parsed(line, f"{path}, line {number}")
    if not isinstance(read, dict):
        raise ValueError(f"{path}, line {number}: expected an object with the field gold; got {line[:100]}")
    return read


def _number(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _scores_at(path: Path) -> Path | None:
    """Return where a run keeps its scores, a recipe's in its last step; none where it is an index of gradients."""
    path = path / "scores" if (path / "scores" / RUN).exists() else path
    return path if (path / "best.h5").is_file() or open_index(path).about.kind == "scores" else None


def of_scores(config: RecallConfig, path: Path, gold: Gold) -> list[Ranked]:
    """Return where scores put the gold documents, for every query run that was scored."""
    about = config_of(path)
    if about.get("mode") == "nearest":
        raise ValueError(f"{path} keeps the best score over all queries: score with --mode individual")
    names = names_in(path, "query")
    if (path / "best.h5").is_file():
        heaps = [heap for name, heap in read_best(path).items() if name.endswith("/best")]
        kept = heaps[0].indices.shape[1]
        if max(config.k) > kept:
            raise ValueError(f"{path} keeps the {kept} best of each query: ask for k up to {kept}, or score with more")
        each = [_chosen(gold, len(heap.indices), str(path)) for heap in heaps]
        ranks = [first_gold_listed(heap.indices[q], g) for heap, (q, g) in zip(heaps, each, strict=True)]
        return [Ranked(_name(names, number), found, kept) for number, found in enumerate(ranks)]
    index = open_index(path)
    found = []
    runs = sum("/" not in name for name in index.blocks)  # others are a block's part of a score
    for number in range(runs):
        scores = index.rows([column(number)])[column(number)].flatten(1).mT
        queries, known = _chosen(gold, len(scores), str(path))
        found.append(Ranked(_name(names, number), first_gold(scores[queries], _columns(known, index.document, path))))
    return found


def _name(names: Sequence[str], number: int) -> str:
    return names[number] if number < len(names) else column(number)


def of_index(config: RecallConfig, gold: Gold) -> Ranked:
    """Return where an index puts the gold documents of a dataset's queries."""
    same = {name: getattr(config, name) for name in ("force", "device", "model_kwargs", "trust_remote_code", "loss")}
    session = open_session(QueryConfig(config.run, k=1, **same))
    columns = {name: getattr(config, name) for name in ("prompt_column", "completion_column")}
    chosen = {name: value for name, value in columns.items() if value is not None}
    data = replace(session.data, dataset=str(config.dataset), split=None, subset=None, max_examples=None, **chosen)
    tokens = read_data(data, session.measured)
    queries, known = _chosen(gold, len(tokens), str(config.dataset))
    loss_fn, params, transform = session.measured[:3]
    asked, ranks = dict(zip(queries.tolist(), known, strict=True)), {}
    for batch in batches_of(RunConfig(device=config.device))(tokens):
        rows = per_example_grads_fn(loss_fn, params, batch, transform=transform)(params, batch)
        shapes = {name: tuple(row.shape[1:]) for name, row in rows.items()}
        made = fingerprint_of(loss_fn, params, transform, shapes, session.weights, session.recorded)
        answer = session.attributor.ask(rows, fingerprint=made, force=config.force).by_document()
        documents, scores = answer.ids, answer.all()
        for query, row in zip(batch["index"].tolist(), scores, strict=True):
            if query in asked:
                ranks[query] = int(first_gold(row[None], _columns([asked[query]], documents, config.run))[0])
    return Ranked(str(config.dataset), torch.tensor([ranks[query] for query in asked]))


def _chosen(gold: Gold, number: int, where: str) -> tuple[Tensor, list[Sequence[int]]]:
    """Return the queries that have gold, and theirs."""
    queries = sorted(gold.rows)
    if queries[-1] >= number:
        raise ValueError(f"there is gold for query {queries[-1]}, and {where} has {number} queries, counted from 0")
    if gold.by_place and len(queries) != number:
        raise ValueError(
            'lines of gold without a "query" are for the queries in their order, one for each; there are '
            f"{len(queries)}, and {where} has {number} queries. Is it the right dataset? To leave queries out, name "
            'the others: {"query": 3, "gold": [...]}'
        )
    return torch.tensor(queries), [gold.rows[query] for query in queries]


def _columns(gold: Sequence[Sequence[int]], documents: Int[Tensor, " n"], where: Any) -> list[list[int]]:
    """Return the columns of scores that are of gold documents: tokens and chunks count as the document they are of."""
    columns: dict[int, list[int]] = {}
    for place, document in enumerate(documents.tolist()):
        columns.setdefault(document, []).append(place)
    missing = [row for known in gold for row in known if row not in columns]
    if missing:
        raise ValueError(
            f"gold row {missing[0]} is not in {where}, whose rows go from {min(columns)} to {max(columns)}: gold names "
            "rows of the corpus, counted from 0"
        )
    return [[place for row in known for place in columns[row]] for known in gold]
