"""Write an instruction for every corpus document with the backward model."""

import sys

from selfalign.cli import main

sys.exit(main(["run", "--only", "augment", *sys.argv[1:]]))
