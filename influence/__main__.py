"""`python -m influence`, and what torchrun starts: `torchrun --nproc-per-node 2 -m influence build …`."""

import sys

from influence.cli import main

if __name__ == "__main__":
    sys.exit(main())
