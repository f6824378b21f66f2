"""`python -m docs.build [FOLDER]`: the site as HTML, warnings being errors. Nothing is fetched."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent


def main(arguments: list[str]) -> int:
    """Write the site to FOLDER, `build/docs` by default; 0 if nothing is wrong with it."""
    try:
        from sphinx.cmd.build import build_main
    except ModuleNotFoundError:
        print("sphinx is missing: ENTRORAY_EXTRAS=docs launch/setup.sh", file=sys.stderr)
        return 3
    out = Path(*arguments[:1]) if arguments else DOCS.parent / "build" / "docs"
    wrong = build_main(["-W", "--keep-going", "-n", "-q", "-E", "-b", "html", str(DOCS), str(out)])
    print(f"{out / 'index.html'}: not written as it should be" if wrong else out / "index.html")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
