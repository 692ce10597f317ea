"""Measure rows of the benchmarks: `python benchmarks/run.py [ROW…]`, all that are built where none is named.

Exits 1 where a row is not what it must be, or its check fails.
"""

import argparse
import sys
from importlib import import_module

from measure import show, write

from selfalign.core.errors import SelfalignError

# Each module has `row()`, which measures under the row's own conditions and returns a Result and a table.
ROWS = {"4": "sft", "4b": "packing", "5": "near_duplicates"}


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)}")
    rows = parser.parse_args(arguments).rows or list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"no benchmark is built for row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    met = True
    for name in rows:
        result, details = import_module(ROWS[name]).row()
        write(result)
        show(result, details)
        met &= result.is_met
    return 0 if met else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SelfalignError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
