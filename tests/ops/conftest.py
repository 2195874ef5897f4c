import pytest


@pytest.fixture(autouse=True)
def _one_thread_unless_asked(one_thread: None) -> None:
    """Small tensors: a second thread is worth waiting for only where a test is about threads."""
