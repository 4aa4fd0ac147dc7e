"""Write a page to explore an index with: one file, no server, nothing from elsewhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence.index import Index, check, open_index
from influence.index.by_example import Examples
from influence.pipelines.frame.configs import Run
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.prepare import check_gradients
from influence.pipelines.page import LARGEST, Page
from influence.pipelines.panels import Limits, estimated, of_examples, of_queries
from influence.pipelines.reading_texts import Texts, texts_for
from influence.pipelines.score_panels import of_scores
from influence.pipelines.serve import serve
from influence.store import output_file
from influence.terminal import size


@dataclass(frozen=True)
class ExploreConfig:
    """Write one HTML file to explore an index with: search its examples, click one, see what is near it and why.

    influence explore runs/corpus --queries runs/questions

    For each example the page has its largest and smallest scores among the others, under the inner product and the
    cosine, their histogram, the blocks they come from and, where every token has a row, the tokens. Two measures stand
    side by side. The file holds everything it needs: open it by a double click, or send it to somebody.

    Attributes:
        run: the run directory of build.
        to: the file to write; default the run's name with .html, beside it.
        other: another run over the same examples, to stand beside this one: another model, projection or curvature.
        queries: whose hits to show too: a run of build or reduce (each of its rows is a query), or of score.
        texts: a dataset to read the texts from, where it is not the one the run was built from.
        k: how many examples at either end.
        max_examples: show the first so many examples, and score them among one another.
        max_characters: keep so many characters of each text.
        max_tokens: colour the first so many tokens of each example, where every token has a row.
        sample: examples, evenly spaced, of which histograms and spectra are made.
        trust_remote_code: run code that comes with the run's tokenizer; a run cannot ask for it.
        serve: serve the page on this machine alone, at 127.0.0.1, until stopped, instead of writing a file.
        port: to serve at; 0 takes a free one.
        overwrite: replace the file.
        progress: show a progress bar; default where there is a terminal.
        device: where products are computed.
    """

    run: Run
    to: str | None = None
    other: str | None = None
    queries: str | None = None
    texts: str | None = None
    k: int = 10
    max_examples: int = 50_000
    max_characters: int = 1000
    max_tokens: int = 128
    sample: int = 1024
    trust_remote_code: bool = False
    serve: bool = False
    port: int = 0
    overwrite: bool = False
    progress: bool | None = None
    device: str = "cpu"


def run(config: ExploreConfig, say: Say = quiet) -> Outcome:
    """Write or serve a page.

    Args:
        config: of what, and where to.
        say: where its lines go.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: if there is no such run.
        FileExistsError: if the file is there.
        ValueError: if the run has no rows or no texts, or a number is out of range.
    """
    path = _path(config)
    page = page_of(config, say)
    text = page.html()
    facts = {"run": config.run, "examples": page.facts["count"], "characters": len(text)}
    if config.serve:
        serve(text, config.port, say)
        return Outcome(config.run, facts, "stopped")
    with output_file(path) as name:
        name.write_text(text, encoding="utf-8")
    bytes_ = path.stat().st_size
    return Outcome(
        str(path),
        {**facts, "file": str(path), "bytes": bytes_},
        f"{page.facts['count']:,} examples in {path}, {size(bytes_)}: open it in a browser",
    )


def _path(config: ExploreConfig) -> Path:
    """Return where the page goes, refusing what cannot be before the work."""
    if config.serve and config.to is not None:
        raise ValueError("--serve writes no file: leave --to out, or --serve")
    if not 0 <= config.port <= 65_535:
        raise ValueError(f"--port must be from 0, which takes a free one, to 65535; got {config.port}")
    if config.port and not config.serve:
        raise ValueError(f"--port {config.port} is for --serve: pass both, or neither")
    path = Path(config.to) if config.to is not None else Path(config.run.rstrip("/") + ".html")
    if config.serve:
        return path
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the file to write by --to")
    if path.exists() and not config.overwrite:
        raise FileExistsError(f"{path} exists already: pass --overwrite to replace it, or another --to")
    return path


def page_of(config: ExploreConfig, say: Say = quiet) -> Page:
    """Return the page of a configuration.

    Args:
        config: of what.
        say: where its lines go.

    Returns:
        The page.
    """
    index = _opened(config.run)
    count = min(config.max_examples, index.examples)
    _check_numbers(config, index, count)
    limits = Limits(
        config.k, config.max_tokens, config.sample, config.device, config.progress, config.trust_remote_code
    )
    runs = {config.run: Examples(index, count)}
    if config.other is not None:
        runs[config.other] = Examples(_beside(config, index, count), count)
    pairs = [fits(each.index) for each in runs.values()]
    if not (all(pairs) or config.queries):
        raise ValueError(
            f"the rows of {list(runs)[pairs.index(False)]} are one side of a score, with all of a curvature's inverse "
            "in them, so they have no score among themselves: pass --queries RUN, rows of the other side"
        )
    trust = config.trust_remote_code
    texts = texts_for(index, index.index[:count], config.texts, config.max_characters, config.max_tokens, trust)
    characters = sum(map(len, texts.texts)) + sum(len(one) + 3 for each in texts.pieces or () for one in each)
    needed = characters + sum(estimated(each, limits) for each in runs.values() if all(pairs))
    if needed > LARGEST:
        raise ValueError(
            f"the page would have about {size(needed)}, and browsers take {size(LARGEST)}: pass a smaller --k, "
            "--max-examples, --max-characters or --max-tokens"
        )
    page = Page({"title": config.run, "count": count, "k": config.k, **_said(page_facts(index, count, texts))})
    page.facts |= {"loss": page.pack(index.loss[:count]), "number": page.pack(index.index[:count])}
    views = []
    for name, examples in runs.items() if all(pairs) else ():
        say(f"scores of {count:,} examples of {name} with one another")
        views += of_examples(page, examples, limits, texts.lengths, name if config.other else "")
    if config.queries is not None:
        queries = open_index(config.queries) if (Path(config.queries) / "index.h5").exists() else None
        if queries is None or queries.about.kind == "scores":
            views += of_scores(page, config.queries, Examples(index, count), limits)
        else:
            for name, examples in runs.items():
                views += of_queries(page, config.queries, examples, limits, texts.lengths, name if config.other else "")
    page.facts["views"] = views
    page.facts["notes"] = notes(config, index, count, texts)
    return page


def page_facts(index: Index, count: int, texts: Texts) -> dict[str, Any]:
    """Return what the page says of its examples: texts, as tokens where they are coloured."""
    return {"texts": texts.texts, "pieces": texts.pieces, "per_token": index.per_token, "count": count}


def _said(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts without those that are not there."""
    return {name: value for name, value in facts.items() if value is not None}


def notes(config: ExploreConfig, index: Index, count: int, texts: Texts) -> list[str]:
    """Return what the page shows and what it leaves out, in sentences."""
    metric = index.fingerprint.must_match.get("metric")
    powers = index.fingerprint.complement.get("curvature", [])
    sampled = min(config.sample, count)
    found = [
        f"{count:,} of {index.examples:,} examples of {config.run}: "
        + ("all" if count == index.examples else "the first"),
        f"{min(config.k, count - 1)} at either end of each example's scores with the others shown, itself left out",
        "a score is the inner product of two rows: positive where a step on one lowers the other's loss",
        f"rows: {index.fingerprint.recorded.get('transform', 'as they were collected')}",
        f"histograms and spectra: of {sampled:,} examples" + ("" if sampled == count else ", evenly spaced"),
        "blue is positive, orange negative (in a text, dotted below)",
        "effective rank: exp of the entropy of the eigenvalues' shares; the Gram matrix is not centred",
    ]
    if metric == "cosine":
        found.append("the rows have unit norm: inner product and cosine are one")
    if powers:
        found.append("curvature: " + ", ".join(f"{one['step']} to the power {one['power']:g}" for one in powers))
    if index.per_token:
        found.append(
            f"an example's row is the sum of its tokens'; a token's colour is its part of the score, of the first "
            f"{config.max_tokens}"
        )
    if texts.cut:
        found.append(f"{texts.cut:,} texts are cut at {config.max_characters:,} characters")
    return found


def fits(index: Index) -> bool:
    """Whether rows of an index may be multiplied with one another."""
    try:
        check(index.fingerprint, index.fingerprint)
    except ValueError:
        return False
    return True


def _opened(path: str) -> Index:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no run directory {path}")
    if (Path(path) / "best.h5").exists():
        raise ValueError(f"{path} holds scores, and no gradients: explore the index they are of, with --queries {path}")
    index = open_index(path)
    check_gradients(index)
    return index


def _beside(config: ExploreConfig, index: Index, count: int) -> Index:
    """Return the other run, whose examples must be those of the first."""
    assert config.other is not None
    if Path(config.other).resolve() == Path(config.run).resolve():
        raise ValueError(f"--other {config.other} is the run itself: give another, or leave it out")
    other = _opened(config.other)
    if other.examples < count or not torch.equal(other.index[:count], index.index[:count]):
        raise ValueError(
            f"{config.other} has other examples than {config.run} ({other.examples:,} and {index.examples:,}; their "
            "numbers must be the same): build both from the same dataset, or show fewer by --max-examples"
        )
    return other


def _check_numbers(config: ExploreConfig, index: Index, count: int) -> None:
    for name, least in {"k": 1, "max_examples": 2, "max_characters": 1, "max_tokens": 1, "sample": 2}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(config, name)}")
    if count < 2:
        raise ValueError(f"{config.run} shows {count} examples, and there is nothing to compare: two are needed")
    if config.k >= count:
        raise ValueError(f"k must be less than the number of examples shown, {count:,}; got {config.k}")
    if config.sample > 65_535:
        raise ValueError(f"sample must be at most 65,535; got {config.sample}")
