"""Settings that all tests share: reproducible, few threads (several tests start processes of their own)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same cases each time, so that a failure is one of the change; thousands of new ones with LIGHTNING_THOR_FUZZ=1.
settings.register_profile("default", max_examples=40, derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=3000, derandomize=False, deadline=None, print_blob=True)
settings.load_profile("fuzz" if os.environ.get("LIGHTNING_THOR_FUZZ") == "1" else "default")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
