"""The explorer: its numbers against dense products, its page against hostile texts, and the page in a browser."""

import base64
import http.client
import json
import re
import threading
from html import unescape
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from influence.cli import main
from influence.explorer.html_page import server
from influence.index import open_index
from influence.pipelines import build, reduce, score
from influence.pipelines.explore import ExploreConfig, page_of
from influence.pipelines.explore import run as explore
from influence.pipelines.frame.configs import TransformConfig
from influence.pipelines.frame.texts import cut
from tests.browser import Browser, chromium
from tests.many_examples import page_of_many
from tests.pipeline_world import DOCUMENTS, FAST, build_config, lines, model_config, questions, world

K = 3
HOSTILE = (
    '</script><script>window.broken=1</script><img src=x onerror="window.broken=2"> "quoted" & <b>bold</b> 😀 \u2028'
)


def read(html: str) -> tuple[dict[str, Any], dict[str, numpy.ndarray]]:
    """Return what a page says, read without any code of the library: its facts and its numbers by their id."""
    facts = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[0])
    found = re.findall(r'<script type="application/octet-stream" id="(.*?)">(.*?)</script>', html)
    return facts, {name: numpy.frombuffer(base64.b64decode(text), "u1") for name, text in found}


def numbers(page: tuple[dict[str, Any], dict[str, numpy.ndarray]], packed: dict[str, Any], *shape: int) -> Tensor:
    values = page[1][packed["id"]].view("<" + packed["type"])
    return torch.from_numpy(values.astype("f8" if values.dtype.kind == "f" else "i8")).reshape(*shape)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes of the corpus, plain and by token; queries, a mean, and scores."""
    place = tmp_path_factory.mktemp("explore")
    build.run(build_config(place / "corpus"))
    build.run(build_config(place / "tokens", per_token="loss"))
    build.run(build_config(place / "unit", transform=TransformConfig(projection_dim=2, unit_norm=True)))
    ask = TransformConfig(projection_dim=4)
    build.run(build.BuildConfig(str(place / "questions"), model_config(), questions(), transform=ask, execution=FAST))
    build.run(
        build.BuildConfig(str(place / "asked"), model_config(), questions(), "loss", transform=ask, execution=FAST)
    )
    reduce.run(reduce.ReduceConfig(str(place / "mean"), model_config(), questions(), transform=ask, execution=FAST))
    for name, how in (("all", {}), ("best", {"top_k": K}), ("tokens", {"per_token": "loss"})):
        scored = build_config(place / f"scores-{name}")
        query = (str(place / "questions"), str(place / "mean"))
        given: dict[str, Any] = {"transform": ask, "execution": FAST, **how}
        score.run(score.ScoreConfig(scored.run, scored.model, scored.data, query, **given))
    return place


def page(runs: Path, name: str, **changes: Any) -> Any:
    return read(page_of(ExploreConfig(str(runs / name), **{"k": K, "sample": 7} | changes)).html)


def check(page: Any, view: dict[str, Any], scores: Tensor, parts: Tensor | None = None, own: bool = False) -> None:
    """Compare a view's lists, block sums and histogram with a dense `[q, n]` and its parts `[b, q, n]`."""
    q, n = scores.shape
    masked = scores.clone()
    if own:
        masked.fill_diagonal_(torch.nan)
    for end, descending in ((0, True), (1, False)):
        order = masked.nan_to_num(-torch.inf if descending else torch.inf).sort(
            dim=1, descending=descending, stable=True
        )
        values = numbers(page, view["values"], q, 2, K)[:, end]
        torch.testing.assert_close(values, order.values[:, :K], rtol=1e-5, atol=1e-6 * float(scores.abs().max()))
        places = numbers(page, view["indices"], q, 2, K)[:, end]
        torch.testing.assert_close(scores.gather(1, places), values, rtol=1e-5, atol=1e-6 * float(scores.abs().max()))
        if parts is not None:
            expected = torch.stack([part.gather(1, places).sum(1) for part in parts], 1)
            got = numbers(page, view["parts"], q, 2, len(parts))[:, end]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * float(scores.abs().max()))
    if "counts" in view:
        counts = numbers(page, view["counts"], q, 32)
        sampled = torch.arange(min(7, n)) * n // min(7, n) if "parts" in view else torch.arange(n)
        for row in range(q):
            mine = masked[row, sampled][~masked[row, sampled].isnan()]
            edges = numbers(page, view["edges"], q, 2)[row]
            torch.testing.assert_close(edges, torch.stack([mine.min(), mine.max()]), rtol=1e-5, atol=1e-7)
            wanted = torch.from_numpy(numpy.histogram(mine.numpy(), 32)[0])
            assert int(counts[row].sum()) == len(mine)
            assert (
                counts[row].cumsum(0) - wanted.cumsum(0)
            ).abs().max() <= 1  # a score on an edge may be on either side


def dense(run: Path) -> tuple[Tensor, list[Tensor]]:
    """Return an index's rows in float64, of a token index each example's sum, whole and by block."""
    index = open_index(run)
    rows = {name: row.flatten(1).double() for name, row in index.rows().items()}
    if index.per_token:
        spans = list(zip(index.offsets[:-1].tolist(), index.offsets[1:].tolist(), strict=True))
        rows = {name: torch.stack([row[a:b].sum(0) for a, b in spans]) for name, row in rows.items()}
    return torch.cat(list(rows.values()), 1), list(rows.values())


def both_measures(mine: list[Tensor], theirs: list[Tensor]) -> dict[str, Tensor]:
    """Return the parts `[b, q, n]` of inner products and of cosines."""
    parts = torch.stack([a @ b.mT for a, b in zip(mine, theirs, strict=True)])
    norms = [torch.cat(side, 1).norm(dim=1) for side in (mine, theirs)]
    return {"inner product": parts, "cosine": parts / norms[0][:, None] / norms[1]}


@pytest.mark.parametrize("name", ["corpus", "tokens"])
def test_the_pages_numbers_are_those_of_dense_products(runs: Path, name: str) -> None:
    found = page(runs, name)
    rows, blocks = dense(runs / name)
    assert [view["name"] for view in found[0]["views"]] == ["inner product", "cosine"]
    for view in found[0]["views"]:
        parts = both_measures(blocks, blocks)[view["name"]]
        check(found, view, parts.sum(0), parts, own=True)
        unit = rows if view["name"] == "inner product" else rows / rows.norm(dim=1, keepdim=True)
        some = unit[torch.arange(7) * DOCUMENTS // 7]
        values = torch.linalg.svdvals(some).square() / 7
        torch.testing.assert_close(torch.tensor(view["spectrum"]["values"]).double()[:6], values[:6], rtol=1e-4, atol=0)
        share = values / values.sum()
        assert view["spectrum"]["rank"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)
        traces = [block["trace"] for block in view["blocks"]]
        assert sum(traces) == pytest.approx(float(values.sum()), rel=1e-5)
    texts = [line["text"] for line in lines("corpus.jsonl")]
    pieces = found[0].get("pieces")
    assert texts == (found[0]["texts"] if pieces is None else ["".join(one) for one in pieces])
    torch.testing.assert_close(
        numbers(found, found[0]["loss"], -1), open_index(runs / name).loss.double(), rtol=1e-5, atol=0
    )


def test_a_tokens_colour_is_its_part_of_the_score(runs: Path) -> None:
    for limit in (128, 4):
        found = page(runs, "tokens", max_tokens=limit)
        index, (rows, _) = open_index(runs / "tokens"), dense(runs / "tokens")
        view = found[0]["views"][1]  # cosine
        lengths = [len(one) for one in found[0]["pieces"]]
        steps, begins = (numbers(found, view[name], -1) for name in ("tokens", "begins"))
        places = numbers(found, view["indices"], DOCUMENTS, 2 * K)
        largest = numbers(found, view["largest"], DOCUMENTS, 2 * K)
        for i in range(DOCUMENTS):
            at = int(begins[i])
            for pair, n in enumerate(places[i].tolist()):
                tokens = index.matrix(int(index.offsets[n]), int(index.offsets[n + 1])).double()
                parts = tokens @ rows[i] / rows[i].norm() / rows[n].norm()
                expected = torch.zeros(limit + 64).double()
                expected[index.position[index.offsets[n] : index.offsets[n + 1]]] = parts
                got = steps[at : at + lengths[n]] * largest[i, pair] / 127
                assert (got - expected[: lengths[n]]).abs().max() <= largest[i, pair] / 254 * 1.01 + 1e-9
                at += lengths[n]
            assert at == int(begins[i + 1])


def test_queries_and_scores_are_those_of_dense_products(runs: Path) -> None:
    _, corpus = dense(runs / "corpus")
    _, wanted = dense(runs / "questions")
    parts = both_measures(wanted, corpus)
    for queries in ("questions", "asked"):  # the same rows, stored by example and by token
        found = page(runs, "corpus", queries=str(runs / queries))
        views = [view for view in found[0]["views"] if view["of"] == "queries"]
        assert [view["name"] for view in views] == ["inner product", "cosine"]
        for view in views:
            check(found, view, parts[view["name"]].sum(0), parts[view["name"]])
        assert found[0]["queries"] == [line["text"] for line in lines("questions.jsonl")]
    _, mean = dense(runs / "mean")
    scores = torch.cat([parts["inner product"], both_measures(mean, corpus)["inner product"]], 1).sum(0)
    for name in ("scores-all", "scores-best", "scores-tokens"):  # of tokens' scores, their sums
        found = page(runs, "corpus", queries=str(runs / name))
        [view] = [view for view in found[0]["views"] if view["of"] == "queries"]
        check(found, view, scores)
        assert ("counts" in view) == (name != "scores-best")
        assert len(found[0]["queries"]) == len(scores)
        assert found[0]["queries"][-1] == f"mean of {world() / 'questions.jsonl'}"


def test_another_run_stands_beside_and_unit_rows_have_one_measure(runs: Path) -> None:
    found = page(runs, "corpus", other=str(runs / "unit"), max_examples=11)
    names = [view["name"] for view in found[0]["views"]]
    assert names == [f"{runs / 'corpus'} · inner product", f"{runs / 'corpus'} · cosine", f"{runs / 'unit'} · cosine"]
    assert found[0]["count"] == 11
    _, blocks = dense(runs / "unit")
    parts = both_measures([block[:11] for block in blocks], [block[:11] for block in blocks])["inner product"]
    check(found, found[0]["views"][2], parts.sum(0), parts, own=True)
    assert any("the first" in note for note in found[0]["notes"])


def test_texts_cannot_leave_their_place_and_nothing_comes_from_elsewhere(runs: Path, tmp_path: Path) -> None:
    html, texts = hostile(runs, tmp_path)
    assert read(html)[0]["texts"] == texts
    assert "<img" not in html
    assert html.count("<script") == html.count("</script>")
    assert "window.broken" not in re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.S)
    ours = re.sub(r'<script type="application.*?</script>', "", html, flags=re.S)
    outside = set(re.findall(r"(?:https?:)?//[a-z0-9.]+\.[a-z]+[^\s\"']*", ours))
    assert outside <= {"http://www.w3.org/2000/svg"}  # the name of SVG's elements, which nobody fetches
    assert not re.findall(r"<(?:link|img|iframe|object|embed)|\bsrc=|@import|url\(|fetch\(|XMLHttp|WebSocket", ours)


def hostile(runs: Path, folder: Path) -> tuple[str, list[str]]:
    """Return a page of texts that want out, and the texts."""
    texts = [HOSTILE if i == 1 else f"text {i} <i>{{{{js}}}}</i>" for i in range(DOCUMENTS)]
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    explore(ExploreConfig(str(runs / "corpus"), str(folder / "page.html"), texts=str(file), k=K))
    return (folder / "page.html").read_text(), texts


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int8"])
def test_rows_by_their_numbers_are_those_of_the_whole(dtype: str) -> None:
    from influence import as_blocks
    from influence import build as build_from_python

    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 6, dtype=torch.float64, generator=draw) for _ in range(3)]
    params = {"w": torch.zeros(6, dtype=torch.float64)}
    index = build_from_python(lambda p, b: (b * p["w"]).sum(1), params, batches, transform=as_blocks(), dtype=dtype)
    some = torch.tensor([14, 0, 7, 7, 3])
    assert torch.equal(index.take(some), index.matrix()[some])


def test_pieces_of_a_text_are_the_text() -> None:
    assert cut(" a ünder ", ["a", "\ufffd", "\ufffd", "nder"]) == [" a", "", "", " ünder "]
    assert cut("", []) == []
    assert "".join(cut("nothing of it", ["x", "y"])) == "nothing of it"


def refused(capsys: Any, *flags: Any) -> str:
    status = main(["explore", *map(str, flags)])
    said = [line for line in capsys.readouterr().err.splitlines() if line and "note:" not in line]
    assert status == 1
    assert len(said) == 1, said
    return said[0]


def test_what_cannot_be_is_refused_before_the_work(runs: Path, tmp_path: Path, capsys: Any) -> None:
    corpus, to = runs / "corpus", ("--to", tmp_path / "x.html")
    assert "there is no run directory" in refused(capsys, tmp_path / "none")
    assert "k must be less than the number of examples shown, 25; got 25" in refused(capsys, corpus, *to, "--k", 25)
    assert "k must be at least 1" in refused(capsys, corpus, *to, "--k", 0)
    assert f"--queries {runs / 'scores-best'}" in refused(capsys, runs / "scores-best", *to)
    assert "holds scores" in refused(capsys, runs / "scores-all", *to)
    assert "two are needed" in refused(capsys, runs / "mean", *to)
    assert "is the run itself" in refused(capsys, corpus, *to, "--other", corpus)
    assert "has other examples" in refused(capsys, corpus, *to, "--other", runs / "mean")
    assert "leave --to out" in refused(capsys, corpus, *to, "--serve")
    assert "pass both, or neither" in refused(capsys, corpus, *to, "--port", 8000)
    assert "k must be at most 3" in refused(capsys, corpus, *to, "--queries", runs / "scores-best", "--k", 4)
    assert "is a directory" in refused(capsys, corpus, "--to", tmp_path)
    (tmp_path / "x.html").write_text("mine")
    assert "--overwrite" in refused(capsys, corpus, *to)
    assert (tmp_path / "x.html").read_text() == "mine"
    gone = refused(capsys, corpus, "--to", tmp_path / "y.html", "--texts", tmp_path / "gone.jsonl")
    assert "texts" in gone
    assert "--texts FILE" in gone
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n')
    fewer = refused(capsys, corpus, "--to", tmp_path / "y.html", "--texts", tmp_path / "few.jsonl")
    assert "numbered up to 24, and" in fewer
    assert "few.jsonl has fewer rows" in fewer
    python = tmp_path / "python"
    from influence import as_blocks
    from influence import build as build_from_python

    params = {"w": torch.zeros(2)}
    build_from_python(
        lambda p, b: (b * p["w"]).sum(1), params, [torch.eye(2)] * 3, python, transform=as_blocks(), progress=False
    )
    assert "was built from Python" in refused(capsys, python, "--k", 2)
    assert not (tmp_path / "python.html").exists()
    (tmp_path / "said.txt").write_text("a\nb\nc\nd\ne\nf\n")
    assert main(["explore", str(python), "--texts", str(tmp_path / "said.txt"), "--k", "2"]) == 0
    assert read((tmp_path / "python.html").read_text())[0]["texts"] == list("abcdef")


def test_rows_with_all_of_an_inverse_are_shown_with_queries_alone(tmp_path: Path, capsys: Any) -> None:
    from influence import as_blocks, chain, hessians, precondition
    from influence import build as build_from_python

    ell, w = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}
    x = torch.tensor([[2.0, 0], [0, 4], [1, 1], [-3, 1]])
    factors = hessians.autocorrelation.fit(ell, w, [x], transform=as_blocks(), progress=False)
    inverse = precondition(factors, power=-1.0, damping=0.1)
    build_from_python(ell, w, [x], tmp_path / "one", transform=chain(as_blocks(), inverse), progress=False)
    build_from_python(ell, w, [x[:2]], tmp_path / "other", transform=as_blocks(), progress=False)
    (tmp_path / "t.txt").write_text("a\nb\nc\nd\n")
    flags = (tmp_path / "one", "--texts", tmp_path / "t.txt", "--k", 3)
    assert "one side of a score" in refused(capsys, *flags)
    assert main(["explore", *map(str, flags), "--queries", str(tmp_path / "other")]) == 0
    found = read((tmp_path / "one.html").read_text())
    assert {view["of"] for view in found[0]["views"]} == {"queries"}
    (mine, _), (wanted, _) = dense(tmp_path / "one"), dense(tmp_path / "other")
    check(found, found[0]["views"][0], wanted @ mine.mT)


def test_from_python_a_page_of_any_index_and_any_scores(tmp_path: Path) -> None:
    from influence import Attributor, as_blocks, explorer
    from influence import build as build_from_python

    draw = torch.Generator().manual_seed(0)
    ell, w = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(4)}
    x, q = torch.randn(9, 4, generator=draw), torch.randn(2, 4, generator=draw)
    index, queries = (build_from_python(ell, w, [rows], transform=as_blocks()) for rows in (x, q))
    texts = [f"text {n}" for n in range(9)]
    how: dict[str, Any] = {"k": K, "sample": 7, "progress": False}
    made = explorer.page(index, texts=texts, queries=queries, query_texts=["one?", "two?"], title="mine", **how)
    found = read(made.html)
    assert (found[0]["title"], found[0]["texts"], found[0]["queries"]) == ("mine", texts, ["one?", "two?"])
    inner, _, asked, _ = found[0]["views"]
    check(found, inner, (x @ x.mT).double(), (x @ x.mT)[None].double(), own=True)
    check(found, asked, (q @ x.mT).double(), (q @ x.mT)[None].double())
    # scores by any method; numbers looked up by a function; nothing given is known by its number
    dense = Attributor(index).ask(queries.rows(), fingerprint=queries.fingerprint).all()
    found = read(explorer.page(index, texts=lambda numbers: [str(n) for n in numbers], scores=dense, **how).html)
    check(found, found[0]["views"][2], dense.double())
    assert found[0]["texts"] == [str(n) for n in range(9)]
    both = explorer.Ends(
        torch.stack([dense.topk(K).values, dense.topk(K, largest=False).values], 1),
        torch.stack([dense.topk(K).indices, dense.topk(K, largest=False).indices], 1),
    )
    found = read(explorer.page(index, scores=both, **how).html)
    assert (found[0]["texts"][3], found[0]["queries"]) == ("example 3", ["query 0", "query 1"])
    assert "counts" not in found[0]["views"][2]
    # a page in a notebook, and in a file
    assert made._repr_html_().count("<iframe") == 1
    assert unescape(re.findall('srcdoc="(.*?)"', made._repr_html_(), re.S)[0]) == made.html
    assert made.save(tmp_path / "new" / "page.html").read_text() == made.html
    with pytest.raises(FileExistsError, match="overwrite=True"):
        made.save(tmp_path / "new" / "page.html")
    for wrong, message in (
        ({"texts": ["a"]}, "texts has 1 entries, and example 8 needs one"),
        ({"texts": lambda numbers: ["a"]}, "returned 1 texts of 9 numbers"),
        ({"scores": dense, "queries": queries}, "pass one of them"),
        ({"scores": dense[:, :4]}, r"the scores have 4 examples, and 9 are shown: pass \[q, n\]"),
        ({"scores": both, "max_examples": 4}, "raise max_examples"),
        ({"scores": both, "k": 4}, "k must be at most 3"),
    ):
        with pytest.raises(ValueError, match=message):
            explorer.page(index, **(how | wrong))


def test_a_token_index_without_tokens_of_its_texts_has_no_colours(runs: Path) -> None:
    from influence import explorer

    found = read(explorer.page(runs / "tokens", texts=["plain"] * DOCUMENTS, k=K, progress=False).html)
    assert found[0]["texts"] == ["plain"] * DOCUMENTS
    assert "pieces" not in found[0]
    assert not any("tokens" in view for view in found[0]["views"])


def test_a_page_is_served_to_this_machine_alone() -> None:
    with server("<p>é</p>") as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        place = serving.server_address
        assert place[0] == "127.0.0.1"
        for path, host, status in (
            ("/", f"127.0.0.1:{place[1]}", 200),
            ("/x", "localhost:1", 404),
            ("/", "evil:1", 404),
        ):
            asked = http.client.HTTPConnection("127.0.0.1", place[1])
            asked.request("GET", path, headers={"Host": host})
            answer = asked.getresponse()
            assert answer.status == status
            assert answer.read().decode() == ("<p>é</p>" if status == 200 else "")
            asked.close()
        serving.shutdown()
        with pytest.raises(ValueError, match="another port"):
            server("", place[1])


needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="no Chromium is installed (INFLUENCE_CHROMIUM names one)"
)


@needs_chromium
def test_in_chromium_search_click_compare_and_screenshot(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    explore(
        ExploreConfig(str(runs / "tokens"), str(file), other=str(runs / "corpus"), queries=str(runs / "questions"), k=K)
    )
    facts = read(file.read_text())
    with Browser(str(chromium()), tmp_path / "profile") as browser:
        browser.open(file.as_uri())
        browser.press("/")
        word = facts[0]["pieces"][5][0].strip()
        browser.type(word.upper())
        said = browser.js("document.getElementById('count').textContent")
        expected = sum(word in "".join(one) for one in facts[0]["pieces"])
        assert said == f"{expected} of {DOCUMENTS} examples"
        browser.js("document.getElementById('search').value = ''; 0")
        browser.type("#5")
        browser.press("Enter")
        browser.until("document.getElementById('facts').textContent.startsWith('example #5 ')")
        shown = browser.js(
            "[...document.querySelectorAll('.panel')]"
            ".map(p => [...p.querySelectorAll('.hit')].map(h => h.dataset.example))"
        )
        for side, number in ((0, 0), (1, 2)):  # this run's inner product beside the other's
            view = facts[0]["views"][number]
            assert shown[side] == [str(n) for n in numbers(facts, view["indices"], DOCUMENTS, 2 * K)[5].tolist()]
        assert browser.js("document.querySelectorAll('.token.more, .token.less').length") > 0
        for drawing in ("svg[aria-label^=histogram] .bin", "svg[aria-label^=eigenvalues] .dot", ".blocks .cell i"):
            assert browser.js(f"document.querySelectorAll('{drawing}').length") > 10, drawing
        browser.js(
            "const s = document.querySelector('select[data-side=\"1\"]'); s.value = '1';"
            " s.dispatchEvent(new Event('change')); 0"
        )
        compared = browser.js("[...document.querySelectorAll('.panel:nth-child(2) .hit')].map(h => h.dataset.example)")
        assert compared == [
            str(n) for n in numbers(facts, facts[0]["views"][1]["indices"], DOCUMENTS, 2 * K)[5].tolist()
        ]
        first = compared[0]
        browser.click(".panel:nth-child(2) .hit")
        browser.until(f"location.hash === '#examples={first}'")
        browser.js("history.back(); 0")
        browser.until("location.hash === '#examples=5'")
        browser.click("[data-kind=queries]")
        browser.until("document.getElementById('facts').textContent.startsWith('query 0')")
        browser.press("ArrowDown")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        assert browser.complaints() == []
        assert {address.partition(":")[0] for address in browser.requests()} == {"file"}


@needs_chromium
def test_in_chromium_hostile_texts_stay_texts(runs: Path, tmp_path: Path) -> None:
    _, texts = hostile(runs, tmp_path)
    with Browser(str(chromium()), tmp_path / "profile") as browser:
        browser.open((tmp_path / "page.html").as_uri())
        browser.js("document.getElementById('search').focus(); 0")
        browser.type("onerror <b>")
        browser.press("Enter")
        browser.until("location.hash === '#examples=1'")
        # the page is drawn at the event that follows the change of the address
        browser.until("!document.getElementById('text').textContent.startsWith('text 0')")
        assert browser.js("document.getElementById('text').textContent") == texts[1]
        assert browser.js("window.broken === undefined && document.querySelectorAll('img, b').length === 0")
        assert browser.complaints() == []


@needs_chromium
def test_in_chromium_fifty_thousand_examples_load_in_two_seconds(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "many.html"
    file.write_text(page_of_many(50_000))
    with Browser(str(chromium()), tmp_path / "profile") as browser:
        taken = []
        for _ in range(3):
            browser.open("about:blank", "location.href === 'about:blank'")
            before, wall = browser.processor(), browser.open(file.as_uri())
            taken.append((min(browser.processor() - before, wall), wall))
        print(f"{file.stat().st_size / 1e6:.0f} MB: processor and wall seconds {taken}")
        assert browser.js("document.getElementById('count').textContent") == "50,000 of 50,000 examples"
        assert min(taken)[0] < 2, taken  # of the processor: the wall's are of whoever else is at work here too
