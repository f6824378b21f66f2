"""Configuration -> running parts, and every refusal."""
