"""Recall and reciprocal ranks against counting by hand; `influence recall` against scores at hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from influence.cli import main
from influence.func.retrieval import first_gold, first_gold_listed, recall
from influence.index import open_index
from tests.pipeline_world import world
from tests.test_cli import SMALL, refused
from tests.test_cli import run as typed


def by_hand(scores: list[float], gold: set[int]) -> int:
    """Return the rank of the first gold document of a sorted list: the oracle."""
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column))
    return next(rank for rank, column in enumerate(order, 1) if column in gold)


def test_first_gold_is_the_place_in_a_sorted_list_ties_by_column() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(6, (200, 30), generator=draw).double()  # ties are frequent
    gold = [torch.randperm(30, generator=draw)[: 1 + i % 4].tolist() for i in range(200)]
    expected = [by_hand(row.tolist(), set(known)) for row, known in zip(scores, gold, strict=True)]
    assert first_gold(scores, gold).tolist() == expected
    listed = scores.argsort(dim=1, descending=True, stable=True)
    assert first_gold_listed(listed, gold).tolist() == expected
    short = first_gold_listed(listed[:, :3], gold).tolist()
    assert short == [rank if rank <= 3 else 0 for rank in expected]


def test_recall_and_mrr_of_known_ranks() -> None:
    found = recall(torch.tensor([1, 4, 10, 11, 0]), at=(1, 10, 11))
    assert found.recall == {1: 0.2, 10: 0.6, 11: 0.8}
    assert found.mrr == pytest.approx((1 + 1 / 4 + 1 / 10 + 1 / 11) / 5)


def test_random_scores_have_the_recall_of_chance() -> None:
    queries, documents, gold = 4000, 50, 3
    scores = torch.rand(queries, documents, generator=torch.Generator().manual_seed(1))
    found = recall(first_gold(scores, [list(range(gold))] * queries), at=(1, 10))
    for k, missed in ((1, 47 / 50), (10, torch.tensor([(47 - i) / (50 - i) for i in range(10)]).prod().item())):
        error = (missed * (1 - missed) / queries) ** 0.5
        assert abs(found.recall[k] - (1 - missed)) < 4 * error


def test_what_has_no_recall_is_refused() -> None:
    scores = torch.zeros(2, 3)
    for gold, said in (([[0]], "gold for 1"), ([[0], []], "query 1 has no gold"), ([[0], [3]], "among 3 documents")):
        with pytest.raises(ValueError, match=said):
            first_gold(scores, gold)
    with pytest.raises(ValueError, match="query 1 and document 2 is not finite"):
        first_gold(torch.tensor([[0.0, 0, 0], [0, 0, torch.nan]]), [[0], [0]])
    with pytest.raises(ValueError, match="no query"):
        recall(torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="k of at least 1"):
        recall(torch.tensor([1]), at=(0,))


def made(place: Path, command: str, dataset: str, *more: str) -> list[str]:
    return [
        *(command, str(place), "--model", str(world() / "model"), "--dataset", str(world() / dataset)),
        *(*SMALL, *more),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index, questions, their scores, and the best of these."""
    place = tmp_path_factory.mktemp("recall")
    assert main(made(place / "corpus", "build", "corpus.jsonl")) == 0
    assert main(made(place / "questions", "build", "questions.jsonl")) == 0
    asked = ["--query", str(place / "questions")]
    assert main(made(place / "scores", "score", "corpus.jsonl", *asked)) == 0
    assert main(made(place / "best", "score", "corpus.jsonl", *asked, "--top-k", "5")) == 0
    assert main(made(place / "nearest", "score", "corpus.jsonl", *asked, "--mode", "nearest")) == 0
    return place


@pytest.fixture(scope="module")
def gold(runs: Path) -> list[list[int]]:
    """Two documents for every question, some of them near."""
    scores = open_index(runs / "scores").rows(["query0"])["query0"].mT
    order = scores.argsort(dim=1, descending=True, stable=True)
    known = [[int(row[i % 8]), int(row[-1 - i])] for i, row in enumerate(order)]
    (runs / "gold.jsonl").write_text("".join(json.dumps({"gold": rows, "why": "x"}) + "\n" for rows in known))
    return known


def facts(capsys: Any, *flags: Any) -> dict[str, Any]:
    status, out, err = typed(capsys, "recall", *flags, "--json")
    assert status == 0, err
    return json.loads(out)["results"][0]


def test_scores_an_index_and_the_best_of_scores_say_the_same(runs: Path, gold: list[list[int]], capsys: Any) -> None:
    flags = ["--gold", runs / "gold.jsonl", "--k", "1", "5"]
    ranks = torch.tensor([1 + i % 8 for i in range(len(gold))])
    expected = recall(ranks, at=(1, 5))
    whole = facts(capsys, runs / "scores", *flags)
    assert whole == {
        "queries": str(runs / "questions"),
        "number": len(gold),
        "recall@1": expected.recall[1],
        "recall@5": expected.recall[5],
        "mrr": expected.mrr,
    }
    asked = facts(capsys, runs / "corpus", *flags, "--dataset", world() / "questions.jsonl")
    assert asked == whole | {"queries": str(world() / "questions.jsonl")}
    best = facts(capsys, runs / "best", *flags)
    assert (best["recall@1"], best["recall@5"], best["listed"]) == (whole["recall@1"], whole["recall@5"], 5)
    assert best["mrr"] == pytest.approx(recall(torch.where(ranks <= 5, ranks, 0)).mrr)
    status, out, _ = typed(capsys, "recall", runs / "best", *flags)
    assert status == 0
    assert out.splitlines()[0].split() == ["queries", "number", "recall@1", "recall@5", "MRR"]
    assert "beyond them 1 / rank counts as 0" in out


def test_gold_may_name_its_queries_and_leave_others_out(runs: Path, gold: list[list[int]], capsys: Any) -> None:
    (runs / "some.json").write_text(json.dumps({"1": gold[1]}))
    (runs / "line.jsonl").write_text(json.dumps({"query": 1, "gold": gold[1]}))
    for name in ("some.json", "line.jsonl"):
        found = facts(capsys, runs / "scores", "--gold", runs / name)
        assert (found["number"], found["mrr"]) == (1, 0.5)


def test_what_does_not_belong_together_is_refused(
    runs: Path, gold: list[list[int]], tmp_path: Path, capsys: Any
) -> None:
    def file(text: str) -> list[Any]:
        (tmp_path / "gold").write_text(text)
        return ["recall", runs / "scores", "--gold", tmp_path / "gold"]

    refused(capsys, file('{"gold": [0]}\n{"gold": []}'), "line 2", "at least one row")
    refused(capsys, file('{"gold": [0]}\n{"gold": ["a"]}'), "line 2", "rows of the corpus")
    refused(capsys, file('{"gold": [0]}\nhello'), "line 2 is no JSON")
    refused(capsys, file('{"gold": [0], "query": 0}\n{"gold": [1], "query": 0}'), "query 0 has gold already")
    refused(capsys, file('{"query": 0, "gold": [999]}'), "gold row 999 is not in", "0 to 24")
    refused(capsys, file('{"query": 999, "gold": [0]}'), "gold for query 999")
    refused(capsys, file('{"gold": [0]}'), "one for each; there are 1", "name the others")
    refused(capsys, file('{"gold": [0]}\n{"query": 1, "gold": [0]}'), "one for each; there are 2", "name the others")
    refused(capsys, file(""), "is empty")
    known = ["--gold", runs / "gold.jsonl"]
    refused(capsys, ["recall", runs / "scores", "--gold", tmp_path / "no"], "no gold file")
    assert typed(capsys, "recall", *known)[0] == 2  # no run is named
    refused(capsys, ["recall", tmp_path / "no", *known], "there is no index at")
    refused(capsys, ["recall", runs / "corpus", *known], "holds gradients, and no scores", "give the --dataset")
    refused(capsys, ["recall", runs / "scores", *known, "--dataset", "x"], "--dataset is for an index")
    refused(capsys, ["recall", runs / "nearest", *known], "--mode individual")
    refused(capsys, ["recall", runs / "best", *known, "--k", "6"], "keeps the 5 best")
    refused(capsys, ["recall", runs / "scores", *known, "--k", "0"], "k must be at least 1")
