"""How a command fails: one line for each thing that is wrong, on stderr, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from gateway.errors import GatewayError

EXIT_CODE = 2


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Turn this package's errors, also those in groups, into lines and `EXIT_CODE`. What else is raised is a bug."""
    try:
        yield
    except GatewayError as exc:
        _fail(exc)
    except BaseExceptionGroup as group:
        ours, rest = group.split(GatewayError)
        if rest is not None:
            raise
        assert ours is not None  # a group is never empty
        _fail(ours)


def _fail(exc: BaseException) -> None:
    for line in dict.fromkeys(_lines(exc)):
        click.echo(f"trio-gateway: {line}", err=True)
    raise SystemExit(EXIT_CODE)


def _lines(exc: BaseException) -> Iterator[str]:
    if isinstance(exc, BaseExceptionGroup):
        for one in exc.exceptions:
            yield from _lines(one)
    else:
        yield " ".join(str(exc).split())
