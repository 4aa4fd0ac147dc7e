"""The command `explore`: writes or serves a page to look at an index with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from influence import explorer
from influence.explorer.by_example import summed_tokens
from influence.index import Index, open_index
from influence.pipelines.frame.configs import Run
from influence.pipelines.frame.directory import names_in
from influence.pipelines.frame.outcome import Outcome, Say, quiet
from influence.pipelines.frame.texts import texts_of_run
from influence.pipelines.passes.best import read_best
from influence.pipelines.passes.queries import column
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
    page = page_of(config)
    facts = {"run": config.run, "examples": page.count, "characters": len(page.html)}
    if config.serve:
        page.serve(config.port, say)
        return Outcome(config.run, facts, "stopped")
    bytes_ = page.save(path, overwrite=config.overwrite).stat().st_size
    return Outcome(
        str(path),
        {**facts, "file": str(path), "bytes": bytes_},
        f"{page.count:,} examples in {path}, {size(bytes_)}: open it in a browser",
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


def page_of(config: ExploreConfig) -> explorer.Page:
    """Return the page of a configuration: its runs opened, and their texts found."""
    index = _open(config.run)
    return explorer.page(
        index,
        texts=texts_of_run(index, config.texts, index.per_token, config.trust_remote_code),
        other=_open_other(config),
        **_asked(config, index),
        title=config.run,
        k=config.k,
        max_examples=config.max_examples,
        max_characters=config.max_characters,
        max_tokens=config.max_tokens,
        sample=config.sample,
        device=config.device,
        progress=config.progress,
    )


def _open(path: str) -> Index:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"there is no run directory {path}")
    if (Path(path) / "best.h5").exists():
        raise ValueError(f"{path} holds scores, and no gradients: explore the index they are of, with --queries {path}")
    return open_index(path)


def _open_other(config: ExploreConfig) -> Index | None:
    if config.other is None:
        return None
    if Path(config.other).resolve() == Path(config.run).resolve():
        raise ValueError(f"--other {config.other} is the run itself: give another, or leave it out")
    return _open(config.other)


def _asked(config: ExploreConfig, index: Index) -> dict[str, Any]:
    """Return the arguments of `explorer.page` that say which queries are shown: rows or scores, and their texts."""
    path = config.queries
    if path is None:
        return {}
    rows = open_index(path) if (Path(path) / "index.h5").exists() else None
    if rows is not None and rows.about.kind != "scores":
        run, number = path, rows.examples
        return {"queries": rows, "query_texts": lambda _: _query_texts(run, number, config.trust_remote_code)}
    scores: explorer.Ends | Tensor
    scores, numbers = _kept_scores(config, index) if rows is None else _all_scores(config, index, rows)
    names = names_in(path, "query")
    names += [column(number) for number in range(len(names), len(numbers))]

    def texts(_: Sequence[int]) -> list[str]:
        each = zip(names, numbers, strict=False)  # a configuration may name more
        return [text for name, number in each for text in _query_texts(name, number, config.trust_remote_code)]

    return {"scores": scores, "query_texts": texts}


def _all_scores(config: ExploreConfig, index: Index, scores: Index) -> tuple[Float[Tensor, "q n"], list[int]]:
    """Return the scores of the examples that are shown (tokens' scores summed), and how many each query run has."""
    count = min(config.max_examples, index.examples)
    if not torch.equal(scores.index[:count], index.index[:count]):
        raise ValueError(
            f"{config.queries} scores other examples than {config.run} shows: score the dataset that it was built from"
        )
    found = []
    for name in scores.blocks:
        if "/" in name:  # a block's part of a score
            continue
        rows = int(scores.offsets[count]) if scores.per_token else count
        each = scores.rows([name], 0, rows)[name]
        each = summed_tokens(each, scores.offsets[: count + 1]) if scores.per_token else each
        found.append(each.mT.contiguous())
    return torch.cat(found), [len(each) for each in found]


def _kept_scores(config: ExploreConfig, index: Index) -> tuple[explorer.Ends, list[int]]:
    """Return the best and worst examples, as places among those that are shown, and how many each query run has."""
    assert config.queries is not None
    kept, values, indices = read_best(config.queries), [], []
    shown = index.index[: min(config.max_examples, index.examples)]
    for number in range(len(kept) // 2):
        heaps = [kept[f"{column(number)}/{end}"] for end in ("best", "worst")]
        if config.k > heaps[0].values.shape[1]:
            raise ValueError(
                f"k must be at most {heaps[0].values.shape[1]}, which {config.queries} kept; got {config.k}"
            )
        numbers = torch.stack([heap.indices[:, : config.k] for heap in heaps], 1)
        places = torch.searchsorted(shown, numbers).clamp(max=len(shown) - 1)
        if not torch.equal(shown[places], numbers):
            raise ValueError(
                f"{config.queries} found examples that are not shown: raise --max-examples, or score the run's dataset"
            )
        values.append(torch.stack([heap.values[:, : config.k] for heap in heaps], 1))
        indices.append(places)
    return explorer.Ends(torch.cat(values), torch.cat(indices)), [len(each) for each in values]


def _query_texts(path: str, number: int, trust: bool) -> list[str]:
    """Return the texts of a query run's rows or, where they are not texts themselves, the run and the row."""
    if (Path(path) / "index.h5").exists():
        index = open_index(path)
        if index.about.kind == "index" and index.examples == number:
            try:
                return texts_of_run(index, trust=trust)(index.index.tolist())
            except ValueError:
                pass
        elif index.about.kind == "reduce":
            return [f"{index.about.config['method']} of {index.about.config['data']['dataset']}"]
    return [f"row {row} of {path}" for row in range(number)]
