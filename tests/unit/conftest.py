"""A thread for each of the two processes that unit tests run in: with two each they wait for one another."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch

from hypothesis import settings

settings.register_profile("any machine", deadline=None)  # a first example may import for seconds
settings.load_profile("any machine")
