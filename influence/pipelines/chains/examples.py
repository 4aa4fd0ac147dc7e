"""The examples of finished chains in words, from their stored token ids."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from influence.sgmcmc import Run

Words: TypeAlias = Callable[[Sequence[int]], list[str]]
"""A function from token ids to what each says."""


class Example(NamedTuple):
    """An example of an observable.

    Attributes:
        name: the observable.
        number: its row in the dataset.
        text: what it says.
        tokens: what each labelled position says; of a loss per example, its text.
        labelled: which positions those are.
    """

    name: str
    number: int
    text: str
    tokens: tuple[str, ...]
    labelled: tuple[int, ...]

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{self.name}[{self.number}]"

    def facts(self) -> dict[str, Any]:
        """Return what identifies it, for machines."""
        return {"observable": self.name, "index": self.number, "text": self.text}


def words_of(tokenizer: Any) -> Words:
    """Return the function from token ids to words; numbers, where there is no tokenizer."""
    if tokenizer is None:
        return lambda ids: [str(i) for i in ids]
    return lambda ids: [tokenizer.decode([i]) for i in ids]


def examples(run: Run, names: Sequence[str], words: Words, pad: int) -> list[Example]:
    """Return the examples of some observables, or of all, in order; `pad` fills their rows."""
    found = []
    for name in names or run.observables:
        observed = run.observable(name)
        for row, index in enumerate(observed.index.tolist()):
            found.append(_example(name, index, observed.labelled[row], observed.ids, row, words, pad))
    return found


def _example(name: str, index: int, labelled: Tensor, ids: Tensor | None, row: int, words: Words, pad: int) -> Example:
    at = tuple(labelled.nonzero().flatten().tolist())
    if ids is None:
        return Example(name, index, "", tuple(str(k) for k in at), at)
    own = ids[row].tolist()
    whole = len(labelled) == len(own)
    last = max(at, default=-1) + 1 if whole else len(own)
    while not whole and last > 1 and own[last - 1] == pad:
        last -= 1
    said = words(own[:last])
    spaced = any(word.startswith((" ", "▁")) for word in said)
    text = "".join(said) if spaced else " ".join(said)
    return Example(name, index, text, tuple(said[k] for k in at) if whole else (text,) * len(at), at)
