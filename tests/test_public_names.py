"""The public names, pinned: a change here is a change for users."""

from __future__ import annotations

import subprocess
import sys

import gateway


def test_public_names() -> None:
    assert gateway.__all__ == [
        "AgentConfig",
        "Config",
        "Gateway",
        "GatewayError",
        "Identity",
        "Limits",
        "Log",
        "Server",
        "Store",
        "Turn",
        "TurnFailed",
        "__version__",
        "open_gateway",
        "open_session",
    ]
    for name in gateway.__all__:
        assert getattr(gateway, name) is not None


def test_a_client_does_not_load_the_server() -> None:
    code = "import sys, gateway.client; sys.exit(any(name.startswith('gateway.server') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
