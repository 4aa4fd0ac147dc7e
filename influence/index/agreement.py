"""Whether two sides of a score fit: what they must have in common, and what has to add up over both.

Powers of one curvature add up to 0 or −1; an optimizer's scale is on both sides, on neither, or on the training side
alone (LESS). A query may be projected to a smaller dim, where projections nest.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from influence.func.fingerprint import fingerprint as hash_of
from influence.func.sketch import NESTING
from influence.index.fingerprints import Fingerprint

WHY_ELSE = "inner products of such rows mean nothing. Collect the query as the index was collected, or build another"
WHY = {
    "weights": "gradients of different weights have no inner product. Query with the model that the index is of",
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
        if nested and name in ("dim", "blocks"):
            continue
        values = f"the query's {name} is {_shown(mine, theirs)}, and the stored rows' is {_shown(theirs, mine)}"
        yield name, f"{values}: {WHY.get(name, WHY_ELSE)}"
    words = [side.recorded.get("vocabulary") for side in (query, stored)]
    if None not in words and words[0] != words[1]:
        values = f"the query's vocabulary is {_shown(*words)}, and the stored rows' is {_shown(*reversed(words))}"
        yield "vocabulary", f"{values}: their tokenizers give one word different numbers. Use the index's tokenizer"
    whole = [side.recorded.get("unprojected") for side in (query, stored)]
    if stored.must_match.get("target") == "global" and None not in whole and whole[0] != whole[1]:
        values = f"the query's blocks is {_shown(*whole)}, and the stored rows' is {_shown(*reversed(whole))}"
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
            f"the query's scaling is {_shown(mine, theirs)}, and the stored rows' is {_shown(theirs, mine)}: an "
            "optimizer's scale is on both sides, on neither, or on the training side alone",
        )


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
    """Yield every field that differs, with both values, causes before what follows from them; some are free to."""
    for kind in kinds:
        mine, theirs = getattr(one, kind), getattr(other, kind)
        for name in sorted({*mine, *theirs} - set(free), key=lambda name: (name in ("blocks", "order"), name)):
            if mine.get(name) != theirs.get(name):
                yield name, mine.get(name), theirs.get(name)


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


def _shown(value: Any, other: Any) -> str:
    """Return a value for a message; of long mappings what differs from the other."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        differing = {key: item for key, item in value.items() if other.get(key) != item}
        listed = ", ".join(f"{key}: {item}" for key, item in list(differing.items())[:3])
        more = f", … ({len(differing)} differ)" if len(differing) > 3 else ""
        return f"{{{listed}{more}}}" if differing else f"of {len(value)} entries"
    text = str(value)
    return repr(value) if len(text) <= 80 else f"{text[:70]}…"
