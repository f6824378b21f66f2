"""Held-out prompts: what a policy does on them."""
