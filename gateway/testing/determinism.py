"""One seed for everything that trio leaves to chance, so that a run can be repeated."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import trio
from structlog.testing import capture_logs

# trio's scheduler runs the tasks of a batch in random order on purpose. The generator and the switch that makes the
# order depend on it alone are trio's own, for Hypothesis; there is no public name for them.
_run = cast(Any, trio._core._run)


@contextmanager
def scheduled_by(seed: int) -> Iterator[None]:
    """Within the block, `trio.run` and guest runs schedule their tasks in an order that `seed` alone decides.

    What the gateway logs is not shown meanwhile. Not for blocks inside a run.
    """
    before, switch = _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING
    _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING = random.Random(seed), True
    try:
        with capture_logs():
            yield
    finally:
        _run._r, _run._ALLOW_DETERMINISTIC_SCHEDULING = before, switch
