"""Train the model that answers, in every round or in that of --round, on seed pairs and curated ones."""

import sys

from selfalign.cli import main

sys.exit(main(["run", "--only", "forward", *sys.argv[1:]]))
