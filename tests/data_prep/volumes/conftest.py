"""Files that the tests of reading and of the whole way share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.awkward import write_awkward


@pytest.fixture(scope="session", params=["made", "real"])
def awkward(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of awkward files: made here, and the real ones where they are at hand."""
    if request.param == "real":
        return request.getfixturevalue("shared_data") / "awkward"
    return write_awkward(tmp_path_factory.mktemp("awkward"))
