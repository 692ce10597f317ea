"""Rate the generated pairs, in every round or in that of --round, and keep the good ones."""

import sys

from selfalign.cli import main

sys.exit(main(["run", "--only", "curate", *sys.argv[1:]]))
