"""Fixtures of every test."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def auto_without_onnxruntime() -> Iterator[None]:
    """Let "auto" be folded or torch: onnxruntime takes seconds to start, and may not be there.

    For the whole session, as fixtures of modules make stores too, and a test must find these. The
    tests of onnxruntime name it. Commands in processes of their own are not reached.
    """
    from mlc.extract import engines

    without = tuple(name for name in engines.PREFERENCE if name != "onnxruntime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "PREFERENCE", without)
        yield
