"""Notebooks are listed, stored without outputs, seeded by generators of their own, and close with a check."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in HERE.glob("*.ipynb"))


def cells(name: str, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads((HERE / name).read_text())["cells"] if cell["cell_type"] == kind]


def source(name: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(name, kind)]


def test_every_notebook_is_listed_once() -> None:
    assert NOTEBOOKS
    listed = re.findall(r"^\| \[[^\]]*\]\(([^)]*\.ipynb)\)", (HERE / "README.md").read_text(), re.MULTILINE)
    assert listed == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs(name: str) -> None:
    for cell in cells(name, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None), f"clear the outputs of {name}"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_close_with_an_assertion(name: str) -> None:
    assert re.search(r"^\s*assert ", source(name, "code")[-1], re.MULTILINE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_draw_from_no_global_generator(name: str) -> None:
    code = "\n".join(source(name, "code"))
    assert "manual_seed" not in code.replace("torch.Generator().manual_seed(", "")
    for call in re.findall(r"torch\.(?:randn?|randint|randperm|multinomial|bernoulli)\(.*", code):
        assert "generator=" in call, f"{name}: {call}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_notebooks_lead_somewhere(name: str) -> None:
    for text in source(name, "markdown"):
        for target, anchor in re.findall(r"\]\(([^)\s#]+)#?([^)\s]*)\)", text):
            assert target.startswith("https://") or (HERE / target).exists(), f"{name} links to {target}"
            assert not anchor or anchor in headings(HERE / target), f"{name} links to {target}#{anchor}"
