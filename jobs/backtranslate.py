"""The whole loop: every step of a recipe that is not done yet."""

import sys

from selfalign.cli import main

sys.exit(main(["run", *sys.argv[1:]]))
