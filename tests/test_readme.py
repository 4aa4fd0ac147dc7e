import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def run(page: str) -> dict[str, Any]:
    """Execute every example of a page, one after the other."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


def test_readme_examples_run_and_have_the_shapes_they_say():
    names = run("README.md")
    assert names["rows"]["0.weight"].shape == (100, 32, 8)
    assert {block: rows.shape for block, rows in names["train"].items()} == {"0": (100, 4, 4), "2": (100, 3, 4)}
    assert names["cosines"].shape == (2, 100)


def test_curvature_examples_run_and_a_score_is_largest_for_the_example_itself():
    names = run("docs/curvature.md")
    scores = names["scores"]
    assert scores.shape == (100, 100)
    assert bool((scores.diagonal() > 0).all())
    torch.testing.assert_close(scores, scores.mT, rtol=1e-3, atol=1e-4 * float(scores.abs().max()))
    assert {block: rows.shape for block, rows in names["rows"].items()} == {"0": (100, 16, 9), "2": (100, 3, 16)}


def test_sampling_examples_run_and_have_the_shapes_they_say():
    names = run("docs/sampling.md")
    assert names["run"].loss.shape == (4, 80)
    assert names["influences"].shape == (10, 10)
    assert names["found"].value.shape == names["found"].stderr.shape == (10, 1, 3)
