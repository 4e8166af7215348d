"""What the emulated tests share: random inputs, whose seed a failure shows."""

import numpy as np
import pytest


@pytest.fixture
def rng():
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")
    return np.random.default_rng(seed)
