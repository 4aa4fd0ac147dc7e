"""`import influence` is light: the library is imported in every worker of every run."""

import subprocess
import sys

import pytest

HEAVY = {"transformers", "datasets", "faiss", "h5py", "matplotlib", "peft", "tqdm"}


def test_nothing_heavier_than_torch_is_imported() -> None:
    # torch imports tqdm itself where it is installed; what counts is what comes on top
    code = f"import sys, torch; had = set(sys.modules); import influence; print((set(sys.modules) - had) & {HEAVY!r})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def share_of_torch() -> float:
    """What `import influence` takes over what torch alone does, in processor time of a fresh process."""
    code = (
        "import time; a = time.process_time(); import torch; b = time.process_time(); import influence;"
        "print((time.process_time() - b) / (b - a))"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_import_costs_little_on_top_of_torch() -> None:
    # a loaded machine can only make it slower: the best of five is the import's own
    assert min(share_of_torch() for _ in range(5)) <= 0.25


def test_rooms_are_there_when_asked_for() -> None:
    code = "import sys, influence; print('influence.hessians' in sys.modules, influence.hessians.kfac.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False influence.hessians.kfac"
    out = subprocess.run([sys.executable, "-c", "import influence; influence.nothing"], capture_output=True, text=True)
    assert "module 'influence' has no attribute 'nothing'" in out.stderr


def test_a_name_that_is_not_there_is_answered_with_the_nearest() -> None:
    import influence

    with pytest.raises(AttributeError, match="did you mean 'per_example_grads'"):
        _ = influence.per_exmple_grads
