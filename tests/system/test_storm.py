"""Nothing accepted is lost over SIGKILL (see `storm`). The long form: ``pytest --long``,
or ``python tests/system/storm.py --kills 200``."""

from __future__ import annotations

from pathlib import Path

import pytest
from storm import storm


async def test_ten_kills(tmp_path: Path) -> None:
    result = await storm(tmp_path, kills=10, sessions=50, seed=20261121)
    assert result["problems"] == []
    assert result["exit_code"] == 0
    assert result["durable_inputs"] > 100


@pytest.mark.long
async def test_two_hundred_kills(tmp_path: Path) -> None:
    result = await storm(tmp_path, kills=200, sessions=50, seed=2026)
    assert result["problems"] == []
    assert result["exit_code"] == 0
