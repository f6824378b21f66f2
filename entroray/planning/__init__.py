"""Step time from rates: measured here or elsewhere, and a simulation of the loop (README.md here)."""
