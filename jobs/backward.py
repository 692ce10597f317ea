"""Train the backward model, p(instruction | response), on the seed pairs."""

import sys

from selfalign.cli import main

sys.exit(main(["run", "--only", "backward", *sys.argv[1:]]))
