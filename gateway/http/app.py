"""The routes: ``/healthz``, ``/readyz``, ``/version``."""

from __future__ import annotations

from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from gateway._version import __version__
from gateway.protocol.handshake import VERSIONS


class State(Protocol):
    """What the routes ask of a gateway."""

    @property
    def draining(self) -> bool:
        """True from the first moment of a drain on; it never turns back."""

    def statistics(self) -> Any:
        """Counts of this moment: an object with ``connections``, ``sessions`` and ``turns`` at least."""


def make_app(state: State) -> Starlette:
    """The ASGI application over `state`."""
    # The routes are async though they wait for nothing: starlette runs plain functions in threads.

    async def healthz(request: Request) -> JSONResponse:
        # The process answers: that is all. A drain is healthy, and restarting it would lose the turns it waits for.
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> JSONResponse:
        now = state.statistics()
        body = {"connections": now.connections, "sessions": now.sessions, "turns": now.turns}
        if state.draining:
            return JSONResponse({"status": "draining", **body}, status_code=503, headers=_FRESH)
        return JSONResponse({"status": "ready", **body}, headers=_FRESH)

    async def version(request: Request) -> JSONResponse:
        return JSONResponse({"name": "trio-gateway", "version": __version__, "protocols": list(VERSIONS)})

    return Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/version", version)])


_FRESH = {"Cache-Control": "no-store"}
