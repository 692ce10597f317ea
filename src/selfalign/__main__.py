"""`python -m selfalign` is the command line."""

from selfalign.cli import entry

entry()
