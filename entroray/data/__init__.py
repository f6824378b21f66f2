"""Prompts: where they come from, in what order, in what mixture."""
