"""What these tests share, also with the contract's."""

import pytest

from tests.contract.conftest import cheap_hashes
from tests.lab import Lab

__all__ = ["cheap_hashes", "target"]


@pytest.fixture
def target(lab: Lab, request: pytest.FixtureRequest) -> Lab:
    """An empty place on the other database."""
    other: Lab = request.getfixturevalue("postgres_lab" if lab.backend == "sqlite" else "sqlite_lab")
    return other
