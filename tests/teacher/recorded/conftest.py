"""The teacher that all recordings are of."""

import pytest

from tests.teacher.recorded.recordings import Teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A teacher with a tokenizer in a folder."""
    return Teacher.make(tmp_path_factory.mktemp("teacher"))
