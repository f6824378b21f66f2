"""`python -m entroray` is the `entroray` command."""

from entroray.cli import main

if __name__ == "__main__":
    main()
