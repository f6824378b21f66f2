"""`python -m entroray` is the `entroray` command."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):  # refused by an installer, not by PYTHONPATH
    print(f"entroray: Python is {sys.version.split()[0]}: make an environment of 3.11, 3.12 or 3.13")
    sys.exit(3)

from entroray.cli import main

if __name__ == "__main__":
    main()
