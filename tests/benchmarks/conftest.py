"""Benchmarks choose their number of threads; other tests keep theirs."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
