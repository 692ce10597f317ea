"""Measure the models on held-out pairs and questions."""

import sys

from selfalign.cli import main

sys.exit(main(["run", "--only", "evaluate", *sys.argv[1:]]))
