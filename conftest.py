"""Settings of pytest for the notebooks; unit tests need none of them."""

import os

import pytest

UNSTABLE = ("stderr", "text/html", "image/svg+xml", "application/pdf")  # outputs that differ between machines


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Compare a notebook's text and tables; its figures are compared as data, by the notebook itself."""
    if collector.path.suffix == ".ipynb":
        collector.skip_compare += UNSTABLE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Start every notebook's kernel in check mode: what it computes must agree with what is committed."""
    with pytest.MonkeyPatch.context() as patch:
        if item.path.suffix == ".ipynb":
            patch.setenv("KURE_CHECK", "1")
            patch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
        return (yield)
