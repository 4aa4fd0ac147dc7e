"""Whether two sides of a score fit: what they must have in common, and what has to add up over both.

Powers of one curvature add up to 0 or −1; an optimizer's scale is on both sides, on neither, or on the training side
alone (LESS). A query may be projected to a smaller dim, where projections nest. It may measure another loss, under
another name or other settings; a loss which says that it is the same has to say the same of the same examples.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from influence.func.described import differing
from influence.func.fingerprint import fingerprint as hash_of
from influence.func.sketch import NESTING
from influence.func.trial import again, apart, can_repeat
from influence.index.fingerprints import Fingerprint

WHY_ELSE = "inner products of such rows mean nothing. Collect the query as the index was collected, or build another"
WHY = {
    "weights": "gradients of different weights have no inner product. Query with the model that the index is of",
    "function": "gradients of different functions have no inner product, though the weights be the same. Query with "
    "the model that the index is of, config and code included",
    "reference": "it is another divergence. Query with the reference that the index is of",
    "loss": "it is another loss under the same name. Query with the loss that the index is of, or name the other as "
    "another if it is meant",
    "dim": "only a smaller dim of a nesting projection per block can be read from the stored rows",
    "metric": "put unit_norm() on both sides or on neither",
}


class FingerprintError(ValueError):
    """Two sides of a score do not fit; the message names the field and both values."""


def check(query: Fingerprint, stored: Fingerprint, force: bool = False) -> int | None:
    """Refuse a query whose rows do not fit those that are stored.

    Args:
        query: the query's side.
        stored: the training side.
        force: warn instead.

    Returns:
        The smaller dim at which the stored rows are to be read, if the query's rows have one (see `index.narrowed`).

    Raises:
        FingerprintError: naming the field and both values.
    """
    found = list(problems(query, stored))
    if found and not force:
        name, problem = found[0]
        raise FingerprintError(f"{problem} (field {name!r})")
    if found:
        listed = "; ".join(f"{name!r}: {problem}" for name, problem in found)
        warnings.warn(f"forced past {len(found)} differences: {listed}", stacklevel=2)
    return query.dim if nests(query, stored) else None


def problems(query: Fingerprint, stored: Fingerprint) -> Iterator[tuple[str, str]]:
    """Yield every field that does not fit: its name, and what is wrong with it."""
    nested = nests(query, stored)
    for name, mine, theirs in differences(query, stored, kinds=("must_match",)):
        unknown = name == "function" and (mine is None or theirs is None)  # a function by hand has no settings
        if unknown or (nested and name in ("dim", "blocks")):
            continue
        yield name, _said(name, mine, theirs)
    references = [side.recorded.get("reference") for side in (query, stored)]
    if None not in references and references[0] != references[1]:
        yield "reference", _said("reference", *references)
    for name, mine, theirs in trials_apart(query, stored, same_loss(query, stored)):
        yield name, _said(name, mine, theirs)
    words = [side.recorded.get("vocabulary") for side in (query, stored)]
    if None not in words and words[0] != words[1]:
        values = f"the query's vocabulary is {shown(*words)}, and the stored rows' is {shown(*reversed(words))}"
        yield "vocabulary", f"{values}: their tokenizers give one word different numbers. Use the index's tokenizer"
    whole = [side.recorded.get("unprojected") for side in (query, stored)]
    if stored.must_match.get("target") == "global" and None not in whole and whole[0] != whole[1]:
        values = f"the query's blocks is {shown(*whole)}, and the stored rows' is {shown(*reversed(whole))}"
        yield "blocks", f"{values} before one projection of all: {WHY_ELSE}"
    powers = [_powers_of(side) for side in (query, stored)]
    sums = {key: powers[0].get(key, 0.0) + powers[1].get(key, 0.0) for key in {**powers[0], **powers[1]}}
    if any(min(abs(total), abs(total + 1)) > 1e-9 for total in sums.values()) or sum(sums.values()) < -1.5:
        listed = [_listed(side) for side in (query, stored)]
        yield (
            "curvature",
            f"the query's curvature is {listed[0]}, and the stored rows' is {listed[1]}: the powers of one curvature "
            "have to add up to 0 or -1, and one inverse is applied in all. Make both sides with power=-0.5, or "
            "one with power=-1.0 and the other without curvature",
        )
    mine, theirs = (side.complement.get("scaling") for side in (query, stored))
    if mine is not None and mine != theirs:
        yield (
            "scaling",
            f"the query's scaling is {shown(mine, theirs)}, and the stored rows' is {shown(theirs, mine)}: an "
            "optimizer's scale is on both sides, on neither, or on the training side alone",
        )


def _said(name: str, mine: Any, theirs: Any) -> str:
    values = f"the query's {name} is {shown(mine, theirs)}, and the stored rows' is {shown(theirs, mine)}"
    return f"{values}: {WHY.get(name, WHY_ELSE)}"


def same_loss(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether both sides say that they measure the same loss: by its name, and by the settings of a loss of ours.

    A function of the user's is called by its own name, or by `package.module:function` where the command line was told;
    all functions without a name have one.
    """
    said = [_claim(side) for side in (one, other)]
    names = [name for name, _ in said]
    dotted = all(":" in name for name in names)
    short = [name if dotted else name.rpartition(":")[2] for name in names]
    return bool(names[0]) and short[0] == short[1] and said[0][1] == said[1][1]


def _claim(side: Fingerprint) -> tuple[str, Any]:
    """Return the name of a side's loss, and the settings that make another loss of it."""
    name, settings = str(side.recorded.get("loss", "")), side.recorded.get("loss_settings")
    name = "<lambda>" if name.endswith("<lambda>") else name
    if settings is None or settings["own"]:
        return name, settings is None
    return name, [settings["reduction"], settings["label_smoothing"]]


def trials_apart(one: Fingerprint, other: Fingerprint, losses: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield what two sides say differently of the same examples, though their weights and settings be the same.

    Where they were not tried on the same, the side that is at hand is tried on the other's; where neither is, or only
    the hash of the examples was kept, nothing is known.

    Args:
        one: a side.
        other: the other.
        losses: compare the losses too, beside what the model returns.

    Yields:
        `function` or `loss`, and what both sides say.
    """
    functions = [side.must_match.get("function") for side in (one, other)]
    if one.must_match.get("weights") != other.must_match.get("weights"):
        return
    if None not in functions and functions[0] != functions[1]:
        return
    mine, theirs = (side.recorded.get("trial") for side in (one, other))
    try:
        if mine is None or theirs is None or mine["on"] != theirs["on"]:
            if theirs is not None and one.live is not None and can_repeat(theirs):
                mine = again(*one.live, theirs, losses)
            elif mine is not None and other.live is not None and can_repeat(mine):
                theirs = again(*other.live, mine, losses)
            else:
                return
    except Exception as error:  # whatever the user's code raises on examples that the other side's took
        name = "loss" if losses else "function"
        yield name, f"one that fails on the other's trial ({type(error).__name__}: {error})", "one that does not"
        return
    for name, what in (("function", "outputs"), ("loss", "losses")):
        if (losses or what == "outputs") and apart(mine, theirs, what):
            yield name, {f"{what} of a trial": mine[what]}, {f"{what} of a trial": theirs[what]}
            return


def nests(query: Fingerprint, stored: Fingerprint) -> bool:
    """Whether the query's projection is a corner of the stored one."""
    small, large = query.dim, stored.dim
    there = stored.must_match
    if small is None or large is None or small >= large:
        return False
    if there.get("projection") not in NESTING or there.get("target") == "global" or there.get("reshape_to_square"):
        return False
    order = there.get("order", [])
    after = [one for one in stored.complement.get("curvature", ()) if one["after"] == len(order)]
    if order[-1:] != ["project"] or after or not stored.recorded.get("unprojected"):
        return False
    mine, theirs = query.must_match.get("blocks", {}), there.get("blocks", {})
    return mine.keys() == theirs.keys() and all(
        list(mine[name]) == [min(size, small) for size in shape] for name, shape in theirs.items()
    )


def differences(
    one: Fingerprint,
    other: Fingerprint,
    free: Iterable[str] = (),
    kinds: Iterable[str] = ("must_match", "complement", "recorded"),
) -> Iterator[tuple[str, Any, Any]]:
    """Yield every field that differs, with both values, causes before what follows from them; some are free to.

    A trial differs where it says something else of the same examples, by more than rounding.
    """
    kinds, free = tuple(kinds), {*free, "trial"}
    for kind in kinds:
        mine, theirs = getattr(one, kind), getattr(other, kind)
        for name in sorted({*mine, *theirs} - free, key=lambda name: (name in ("blocks", "order"), name)):
            if mine.get(name) != theirs.get(name):
                yield name, mine.get(name), theirs.get(name)
    if "recorded" in kinds:
        yield from trials_apart(one, other)


def _key(power: Mapping[str, Any]) -> str:
    """Return what must be the same for two powers to be powers of one matrix."""
    return hash_of({key: value for key, value in power.items() if key not in ("power", "after", "step")})


def _powers_of(side: Fingerprint) -> dict[str, float]:
    return {_key(one): one["power"] for one in side.complement.get("curvature", ())}


def _listed(side: Fingerprint) -> str:
    found = [
        f"{one['factors']}^{one['power']:g} (damping {one['damping']:g}, {one['inversion']})"
        for one in side.complement.get("curvature", ())
    ]
    return " · ".join(found) or "none"


def shown(value: Any, other: Any) -> str:
    """Return a value for a message; of long mappings what differs from the other."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        own = differing(value, other)[0]
        if all(item is None for item in own.values()) and len(own) > 3:
            return f"of {len(value)} entries"
        listed = ", ".join(f"{key}: {_brief(item, other.get(key))}" for key, item in list(own.items())[:3])
        more = f", … ({len(own)} differ)" if len(own) > 3 else ""
        return f"{{{listed}{more}}}"
    return _brief(value, other)


def _brief(value: Any, other: Any) -> str:
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return shown(value, other)
    text = str(value)
    return repr(value) if len(text) <= 80 else f"{text[:70]}…"
