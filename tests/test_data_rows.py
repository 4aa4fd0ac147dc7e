"""From a dataset to rows: the same bytes from memory, from disk and from a stream, by any number of ranks."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from influence import as_blocks, chain, functionalize, per_example_grads_fn, project
from influence.data import Tokenized, batches, load, shards, stream, tokenize
from tests.cases import LLAMA, hf

SIZE, BUDGET = 5, 24
LENGTHS = (3, 9, 1, 12, 0, 7, 2, 5, 12, 4, 6, 8, 3)


def documents() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(12, (n,), generator=draw).tolist()} for n in LENGTHS]


@pytest.fixture(scope="module")
def rows_of() -> Callable[[Iterable[Tokenized]], Tensor]:
    """Projected rows of shards, one after another in the order of `index`, as a rank would make them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf("LlamaForCausalLM", "LlamaConfig", **LLAMA)()
    loss_fn, params = functionalize(model, targets="*.layers.*_proj.weight")
    first = next(batches(tokenize(load(documents())), BUDGET))
    planned = per_example_grads_fn(loss_fn, params, first, transform=chain(as_blocks(), project(4)))

    def rows(parts: Iterable[Tokenized]) -> Tensor:
        found, index = [], []
        for batch in batches(parts, BUDGET):
            made = planned(params, batch)
            found.append(torch.cat([row.flatten(1) for row in made.values()], 1))
            index.append(batch["index"])
        order = torch.cat(index)
        assert sorted(order.tolist()) == order.sort().values.tolist()
        return torch.cat([order[:, None].to(found[0]), torch.cat(found)], 1)[order.argsort()]

    return rows


def saved(folder: Path) -> Path:
    load(documents()).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("source", ["memory", "disk", "jsonl", "stream"])
def test_rows_are_the_same_bytes(
    source: str, world: int, tmp_path: Path, rows_of: Callable[[Iterable[Tokenized]], Tensor]
) -> None:
    import json

    want = rows_of(shards(tokenize(load(documents())), SIZE))
    assert want[:, 0].tolist() == list(range(len(LENGTHS)))
    assert not want[[2, 4], 1:].any()  # one token, and none: nothing is predicted
    assert want[:, 1:].any(1).sum() == len(LENGTHS) - 2
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    parts = []
    for rank in range(world):
        if source == "stream":
            rows = load(str(lines), streaming=True)
            parts.append(rows_of(stream(rows, shard_size=SIZE, rank=rank, world=world)))
        else:
            where: Any = {"memory": documents(), "disk": str(saved(tmp_path / f"{rank}")), "jsonl": str(lines)}
            parts.append(rows_of(shards(tokenize(load(where[source])), SIZE, rank=rank, world=world)))
    got = torch.cat(parts)
    assert torch.equal(got[got[:, 0].argsort()], want)
