import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_readme_examples_run_and_have_the_shapes_they_say():
    names = {"__name__": "readme"}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert names["rows"]["0.weight"].shape == (100, 32, 8)
    assert {block: rows.shape for block, rows in names["train"].items()} == {"0": (100, 4, 4), "2": (100, 3, 4)}
    assert names["cosines"].shape == (2, 100)
