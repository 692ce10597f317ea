"""Measure rows of the benchmarks: `python benchmarks/run.py [ROW…]`, all that are built where none is named.

Exits 1 where a row is not what it must be, or its check fails, and 2 where a row lacks what it compares with.
"""

import argparse
import sys
from importlib import import_module

from measure import show, write

from selfalign.core.errors import SelfalignError, UsageError

# Each function measures its row under the row's own conditions and returns a Result and a table.
ROWS = {
    "2": "rating:row_2",
    "2b": "rating:row_2b",
    "2c": "rating:row_2c",
    "3": "generation:row_3",
    "3b": "generation:row_3b",
    "4": "sft:row",
    "4b": "packing:row",
    "5": "near_duplicates:row",
    "7": "orchestration:row_7",
    "8": "orchestration:row_8",
}


def main(arguments: list[str]) -> int:
    """The process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"one of {', '.join(ROWS)}")
    rows = parser.parse_args(arguments).rows or list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"no benchmark is built for row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    code = 0
    for name in rows:
        module, _, function = ROWS[name].partition(":")
        try:
            result, details = getattr(import_module(module), function)()
        except UsageError as error:
            # A peer that is not installed keeps no other row from being measured.
            print(error, file=sys.stderr)
            code = error.exit_code
            continue
        write(result)
        show(result, details)
        code = code or (0 if result.is_met else 1)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except SelfalignError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
