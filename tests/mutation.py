"""What makes a run of mutmut say the same as running the tests against each mutant by hand.

`conftest` adds this to pytest when mutmut runs it, which it tells by `MUTANT_UNDER_TEST`; without mutmut nothing of it
is used.
"""

from __future__ import annotations

import os

import pytest

VARIABLE = "MUTANT_UNDER_TEST"


class Mutants:
    """A plugin of pytest."""

    def __init__(self) -> None:
        self._at_import: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        # pytest would report wrong usage, as the tests that mutmut names are not found: a time-out, for mutmut.
        if report.failed and os.environ.get(VARIABLE):
            pytest.exit("the mutant cannot be imported", returncode=pytest.ExitCode.TESTS_FAILED)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # A survivor costs all tests whatever their order, every other mutant only those up to the first that fails.
        items.sort(key=lambda item: bool(getattr(getattr(item, "obj", None), "is_hypothesis_test", False)))

    def pytest_collection_finish(self) -> None:
        if os.environ.get(VARIABLE) == "stats":
            from mutmut.state import state

            self._at_import = set(state()._stats)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        # What ran while modules were imported stands behind every test; mutmut sees it with the first one only.
        if self._at_import:
            from mutmut.state import state

            state()._stats |= self._at_import
