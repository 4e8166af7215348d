"""What every unit test leaves behind: nothing of a fake driver."""

import pytest

from unit.fake_driver import reset


@pytest.fixture(autouse=True)
def forget_fake_drivers():
    """Tests of other folders may run in this process next: they must not see a fake's cubins or devices."""
    yield
    reset()
