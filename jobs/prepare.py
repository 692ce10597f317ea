"""Read and filter the seed pairs and the corpus."""

import sys

from selfalign.cli import main

sys.exit(main(["run", "--only", "prepare", *sys.argv[1:]]))
