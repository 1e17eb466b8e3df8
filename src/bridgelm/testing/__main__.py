"""`python -m bridgelm.testing FILE:CLASS [key=value ...]`: a method of one's own against what every method promises."""

from __future__ import annotations

import sys

from bridgelm.errors import UserError
from bridgelm.testing.checks import check


def main(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        print("usage: python -m bridgelm.testing FILE:CLASS [key=value ...], for instance\n"
              "       python -m bridgelm.testing my_method.py:MyMethod method.mu=0.5")
        return 0 if argv else 2
    try:
        return 0 if check(argv[0], argv[1:]) else 1
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
