"""The documentation site: pages, and what makes them. `python -m docs.build`."""
