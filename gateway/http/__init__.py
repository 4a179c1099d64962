"""The HTTP side, on a port of its own: what supervisors and operators ask. Needs the extra ``http``.

`app` has the routes (starlette, no I/O of its own), `serving` puts them on a socket (hypercorn on trio). Neither knows
`gateway.server`: they ask a `State`.
"""

from gateway.http.app import State, make_app
from gateway.http.serving import serve_http

__all__ = ["State", "make_app", "serve_http"]
