"""What every unit test leaves behind: nothing of a fake driver."""

import pytest

from unit.fake_driver import reset
from unit.fake_family import write_family


@pytest.fixture(scope="session")
def layer_root(tmp_path_factory):
    """Made-up cubins of all kernels of an expert layer, for tests that change none of the files."""
    root = tmp_path_factory.mktemp("cubins")
    write_family(root, layer=True)
    return root


@pytest.fixture(scope="session")
def whole_root(tmp_path_factory):
    """The same with kernels that do all of a layer."""
    root = tmp_path_factory.mktemp("cubins")
    write_family(root, layer=True, whole=True)
    return root


@pytest.fixture(autouse=True)
def forget_fake_drivers():
    """Tests of other folders may run in this process next: they must not see a fake's cubins or devices."""
    yield
    reset()
