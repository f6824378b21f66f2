"""A thread for each of the two processes that unit tests run in: with two each they wait for one another."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
