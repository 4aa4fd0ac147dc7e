"""A page of very many examples, its numbers drawn instead of computed: what a browser has to load."""

import torch

from influence.explorer.html_page import Draft

WORDS = ["the", "home", "attic", "you", "may", "feed", "dates", "talent", "weaving", "watch", "while", "find", "lives"]


def page_of_many(n: int, k: int = 10, blocks: int = 14) -> str:
    """Return a page as the defaults of `influence explore` make it: two measures, `k` at either end, texts of 90."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(len(WORDS), (n, 18), generator=draw).tolist()
    page = Draft({"title": "many", "count": n, "k": k, "texts": [" ".join(WORDS[w] for w in one) for one in words]})
    page.facts |= {"loss": page.pack(torch.rand(n, generator=draw)), "number": page.pack(torch.arange(n))}
    views = []
    for name in ("inner product", "cosine"):
        view = {
            "indices": torch.randint(n, (n, 2, k), generator=draw),
            "values": torch.randn(n, 2, k, generator=draw),
            "parts": torch.randn(n, 2, blocks, generator=draw),
            "edges": torch.tensor([[-1.0, 1.0]]).expand(n, 2).contiguous(),
            "counts": torch.randint(1024, (n, 32), generator=draw),
        }
        spectrum = {"values": [1.0, 0.5, 0.25], "rank": 2.0, "of": 3, "dim": 3}
        ranks = [{"name": f"layers.{b}.weight", "rank": 2.0, "trace": 1.0, "dim": 3} for b in range(blocks)]
        packed = {part: page.pack(values) for part, values in view.items()}
        views.append({"of": "examples", "name": name, "k": k, "spectrum": spectrum, "blocks": ranks, **packed})
    page.facts |= {"views": views, "notes": []}
    return page.finish().html
