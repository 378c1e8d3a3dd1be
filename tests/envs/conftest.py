import pytest
from support.general import libero_assets


@pytest.fixture(scope="session")
def assets() -> str:
    return libero_assets()
