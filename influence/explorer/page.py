"""The page of an index: checks what is asked for, gathers texts, scores and notes, and returns the finished page."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influence.explorer.by_example import Examples
from influence.explorer.html_page import LARGEST, Draft, Page
from influence.explorer.panels import PageOptions, estimated_size, of_examples, of_queries, of_scores
from influence.explorer.statistics import Ends
from influence.index import Index, check, open_index

Text: TypeAlias = str | Sequence[str]
"""A text, or the texts of its tokens, which joined are the text."""
Texts: TypeAlias = Sequence[Text] | Callable[[Sequence[int]], Sequence[Text]]
"""Texts by number, or a function from numbers to texts."""


class _Shown(NamedTuple):
    """The examples' texts as the page holds them.

    Attributes:
        texts: each text; where the page has it as tokens, what is behind them.
        pieces: the first tokens of each, where every token has a row.
        lengths: how many these are.
        cut: how many texts were cut.
    """

    texts: list[str]
    pieces: list[list[str]] | None
    lengths: Int[Tensor, " n"] | None
    cut: int


def page(
    index: Index | str | Path,
    *,
    texts: Texts | None = None,
    other: Index | str | Path | None = None,
    queries: Index | str | Path | None = None,
    scores: Float[Tensor, "q n"] | Ends | None = None,
    query_texts: Texts | None = None,
    title: str | None = None,
    k: int = 10,
    max_examples: int = 50_000,
    max_characters: int = 1000,
    max_tokens: int = 128,
    sample: int = 1024,
    device: str = "cpu",
    progress: bool | None = True,
) -> Page:
    r"""Return a page to look at an index with: search its examples, click one, see its neighbours and what they share.

    For every example the page has its `k` largest and `k` smallest scores among the others,
    $s_{qn} = \langle g_q, g_n \rangle$ and their cosine, a histogram, each block's part of the scores and, where every
    token has a row, each token's. It costs $2 N^2 d$ FLOPs for $N$ examples of $d$ numbers, and holds no matrix of all
    pairs.

    Args:
        index: the index, or its run directory.
        texts: the dataset's texts, looked up by the examples' numbers in it; or a function from numbers to texts. Of an
            index with a row for every token, each may be the list of its tokens' texts, and tokens are coloured. By
            default an example is known by its number.
        other: another index of the same examples, to stand beside this one: another model, projection or curvature.
        queries: rows to ask about, an index of their own: `build(loss_fn, params, [query_batch], transform=view)`.
        scores: instead of `queries`, scores by any method: `[q, n]` of the examples in the index's order (of those that
            are shown, at least), or both ends of each query's.
        query_texts: what the queries say, by their row.
        title: the page's title; by default the run directory.
        k: how many examples at either end.
        max_examples: show the first so many examples, and score them among one another.
        max_characters: keep so many characters of each text.
        max_tokens: colour the first so many tokens of each example.
        sample: examples, evenly spaced, of which histograms and spectra are made.
        device: where products are computed.
        progress: show progress bars; `None` shows them in a terminal alone.

    Returns:
        The page: `.save(path)`, `.serve()`, and itself in a notebook.

    Raises:
        ValueError: if a number is out of range, the page would be too large, the texts are too few, or the index has no
            rows that can be scored.

    Example:
        >>> import torch
        >>> from influence import as_blocks, build, explorer
        >>> ell, w = lambda p, b: (b * p["w"]).sum(1), {"w": torch.zeros(2)}
        >>> index = build(ell, w, [torch.eye(2), torch.ones(2, 2)], transform=as_blocks())
        >>> explorer.page(index, texts=["a", "b", "c", "d"], k=1, progress=False)
        <page of 4 examples, 0.0 MB: .save(path), .serve()>
    """
    index = _open(index)
    beside, queries = (None if source is None else _open(source) for source in (other, queries))
    name = str(index.path or "index")
    title = title or name
    count = min(max_examples, index.examples)
    _check_numbers(title, count, k=k, max_characters=max_characters, max_tokens=max_tokens, sample=sample)
    options = PageOptions(k, max_tokens, sample, device, progress)
    runs = {name: Examples(index, count)}
    if beside is not None:
        _check_same_examples(index, beside, count)
        runs[str(beside.path or "other index")] = Examples(beside, count)
    one_sided = [each for each, examples in runs.items() if not _scored_with_itself(examples.index)]
    if one_sided and queries is None and scores is None:
        raise ValueError(
            f"the rows of {one_sided[0]} are one side of a score, with all of a curvature's inverse in them, so they "
            "have no score among themselves: pass queries, rows of the other side"
        )
    if queries is not None and scores is not None:
        raise ValueError("queries and scores are two ways to say the same: pass one of them")
    if scores is not None:
        _check_scores(scores, count, k)
    shown = _shown(
        _read(texts, index.index[:count].tolist(), "texts", "example"), index.per_token, options, max_characters
    )
    among = {} if one_sided else runs
    characters = sum(map(len, shown.texts)) + sum(len(piece) + 3 for one in shown.pieces or () for piece in one)
    needed = characters + sum(estimated_size(each, options, shown.pieces is not None) for each in among.values())
    if needed > LARGEST:
        raise ValueError(
            f"the page would have about {needed / 1e6:,.0f} MB, and browsers take {LARGEST / 1e6:,.0f} MB: pass a "
            "smaller k, max_examples, max_characters or max_tokens"
        )
    facts = {"title": title, "count": count, "k": k, "texts": shown.texts, "per_token": index.per_token}
    draft = Draft(facts if shown.pieces is None else facts | {"pieces": shown.pieces})
    draft.facts |= {"loss": draft.pack(index.loss[:count]), "number": draft.pack(index.index[:count])}
    views = []
    for each, examples in among.items():
        views += of_examples(draft, examples, options, shown.lengths, each if len(runs) > 1 else "")
    if queries is not None:
        for each, examples in runs.items():
            views += of_queries(draft, queries, examples, options, shown.lengths, each if len(runs) > 1 else "")
    if scores is not None:
        views += of_scores(draft, scores if isinstance(scores, Ends) else scores[:, :count], k)
    number = queries.examples if queries is not None else 0 if scores is None else _number_of(scores)
    if number:
        asked = _read(query_texts, range(number), "query_texts", "query")
        draft.facts["queries"] = ["".join(text)[:max_characters] for text in asked]
    draft.facts["views"] = views
    draft.facts["notes"] = _notes(title, index, count, shown.cut, max_characters, options)
    return draft.finish()


def _open(source: Index | str | Path) -> Index:
    index = open_index(source) if isinstance(source, str | Path) else source
    if index.about.kind == "scores":
        raise ValueError(
            f"{index.path} holds scores, and no gradients: explore the index that they belong to, "
            "with these as its scores"
        )
    return index


def _scored_with_itself(index: Index) -> bool:
    """Whether rows of an index may be multiplied with one another."""
    try:
        check(index.fingerprint, index.fingerprint)
    except ValueError:
        return False
    return True


def _check_numbers(title: str, count: int, **numbers: int) -> None:
    for name, least in {"k": 1, "max_characters": 1, "max_tokens": 1, "sample": 2}.items():
        if numbers[name] < least:
            raise ValueError(f"{name} must be at least {least}; got {numbers[name]}")
    if count < 2:
        raise ValueError(f"{title} shows {count} examples, and there is nothing to compare: two are needed")
    if numbers["k"] >= count:
        raise ValueError(f"k must be less than the number of examples shown, {count:,}; got {numbers['k']}")
    if numbers["sample"] > 65_535:  # counts of a histogram are stored as 16 bits
        raise ValueError(f"sample must be at most 65,535; got {numbers['sample']}")


def _check_same_examples(index: Index, other: Index, count: int) -> None:
    if other.examples < count or not torch.equal(other.index[:count], index.index[:count]):
        raise ValueError(
            f"{other.path or 'other'} has other examples than {index.path or 'index'} ({other.examples:,} and "
            f"{index.examples:,}; their numbers must be the same): build both from the same dataset, or show fewer by "
            "max_examples"
        )


def _check_scores(scores: Float[Tensor, "q n"] | Ends, count: int, k: int) -> None:
    if isinstance(scores, Ends):
        if scores.values.shape[2] < k:
            raise ValueError(f"k must be at most {scores.values.shape[2]}, as many as the scores have; got {k}")
        if int(scores.indices.max()) >= count:
            raise ValueError(
                f"the scores name example {int(scores.indices.max())}, and {count} are shown: raise max_examples"
            )
    elif scores.shape[1] < count:
        raise ValueError(
            f"the scores have {scores.shape[1]:,} examples, and {count:,} are shown: pass [q, n] of every example, "
            "in the index's order, or show fewer by max_examples"
        )


def _number_of(scores: Float[Tensor, "q n"] | Ends) -> int:
    return len(scores.values if isinstance(scores, Ends) else scores)


def _read(texts: Texts | None, numbers: Sequence[int], argument: str, kind: str) -> list[Text]:
    """Return the texts of some numbers; where none are given, the numbers themselves."""
    if texts is None:
        return [f"{kind} {number}" for number in numbers]
    if callable(texts):
        found = list(texts(numbers))
        if len(found) != len(numbers):
            raise ValueError(
                f"{argument} returned {len(found)} texts of {len(numbers)} numbers: it must return one each"
            )
        return found
    if max(numbers) >= len(texts):
        raise ValueError(
            f"{argument} has {len(texts):,} entries, and {kind} {max(numbers)} needs one: pass the texts of all"
        )
    return [texts[number] for number in numbers]


def _shown(texts: list[Text], per_token: bool, options: PageOptions, most: int) -> _Shown:
    """Return texts cut to what a page keeps, as tokens where these have rows and are given."""
    if not per_token or any(isinstance(text, str) for text in texts):
        whole, pieces, lengths = ["".join(text) for text in texts], None, None
    else:
        whole = ["".join(text[options.max_tokens :]) for text in texts]
        pieces = [list(text[: options.max_tokens]) for text in texts]
        lengths = torch.tensor([len(one) for one in pieces])
    return _Shown([text[:most] for text in whole], pieces, lengths, sum(len(text) > most for text in whole))


def _notes(title: str, index: Index, count: int, cut: int, most: int, options: PageOptions) -> list[str]:
    """Return what the page shows and what it leaves out, in sentences."""
    powers = index.fingerprint.powers
    sampled = min(options.sample, count)
    notes = [
        f"{count:,} of {index.examples:,} examples of {title}: " + ("all" if count == index.examples else "the first"),
        f"{min(options.k, count - 1)} at either end of each example's scores with the others shown, itself left out",
        "a score is the inner product of two rows: positive where a step on one lowers the other's loss",
        f"rows: {index.fingerprint.recorded.get('transform', 'as they were collected')}",
        f"histograms and spectra: of {sampled:,} examples" + ("" if sampled == count else ", evenly spaced"),
        "blue is positive, orange negative (in a text, dotted below)",
        "effective rank: exp of the entropy of the eigenvalues' shares; the Gram matrix is not centred",
    ]
    if index.fingerprint.cosine:
        notes.append("the rows have unit norm: inner product and cosine are one")
    if powers:
        notes.append("curvature: " + ", ".join(f"{one.name} to the power {one.settings['power']:g}" for one in powers))
    if index.per_token:
        notes.append(
            f"an example's row is the sum of its tokens'; a token's colour is its part of the score, of the first "
            f"{options.max_tokens}"
        )
    if cut:
        notes.append(f"{cut:,} texts are cut at {most:,} characters")
    return notes
