"""What several files of server tests share."""

from __future__ import annotations

import plain_client
import pytest
import tls_certificates


@pytest.fixture(params=["tcp", "tls"])
def line(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test that uses it runs twice: over plain TCP and over TLS."""
    if request.param == "tls":
        monkeypatch.setattr(plain_client, "SECURE", tls_certificates.server_context())
