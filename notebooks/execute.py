"""Execute the notebooks, each in a kernel of its own, and keep them with their outputs in build/notebooks.

    python notebooks/execute.py                      # all of them
    python notebooks/execute.py notebooks/05_llc.ipynb

A notebook that raises, or takes more than 120 seconds of processor time, fails; the others are executed all the same.
Processor time is what it takes on a core of its own: a busy machine changes nothing.
"""

import argparse
import os
import resource
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).parent
LIMIT, PATIENCE = 120, 1800
"""Seconds of processor time that a notebook may take, its kernel's start included; seconds until a cell is given up."""


def processor_time() -> float:
    """Return the seconds of processor time of all kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(source: Path, target: Path) -> tuple[float, str]:
    """Execute a notebook where it lies, and write it with its outputs, failed or not.

    Args:
        source: the notebook.
        target: where it goes.

    Returns:
        The seconds of processor time it took, and what went wrong, if anything.
    """
    notebook, before, wrong = nbformat.read(source, as_version=4), processor_time(), ""
    client = NotebookClient(
        notebook,
        timeout=PATIENCE,
        startup_timeout=PATIENCE,
        kernel_name="python3",
        resources={"metadata": {"path": str(source.parent)}},
        extra_arguments=["--log-level=ERROR"],  # it warns of every port it opens, on the loopback
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        wrong = str(error).strip()
    spent = processor_time() - before
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    return spent, wrong or (f"longer than {LIMIT} s" if spent > LIMIT else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")), help="default: all")
    parser.add_argument("--to", type=Path, default=HERE.parent / "build" / "notebooks", help="where they are kept")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small tensors: threads only wait for one another
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # of widgets: none is used
    failed = []
    for source in options.notebooks:
        spent, wrong = execute(source, options.to / source.name)
        print(f"{source.name:36}{spent:6.1f} s   {'FAILED' if wrong else 'ok'}", flush=True)
        if wrong:
            print(wrong, file=sys.stderr)
            failed.append(source.name)
    if failed:
        sys.exit(f"{len(failed)} of {len(options.notebooks)} notebooks failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
