"""``trio-gateway run``: a gateway and its HTTP side in one process, until a signal drains it.

This is the place where everything is put together, and the owner of the process: only here are signals, the garbage
collector, the limit of open files and stdout touched. Everything that can be wrong with what the operator gave comes
out before the first client is served, as lines on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import gc
import ipaddress
import math
import os
import resource
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

import click
import structlog
import trio

from gateway._version import __version__
from gateway.agents import as_agent, build_agent, load_agent
from gateway.agents.demo import DEMO_AGENTS, demo
from gateway.agents.loader import KINDS
from gateway.cli.failing import EXIT_CODE, errors_as_lines
from gateway.cli.logs import set_up_logs
from gateway.cli.settings import CONFIG_VARIABLE, Flag, Loaded, load
from gateway.cli.signals import end_within, on_hangup, on_signals
from gateway.cli.state import make_folder, with_default_store
from gateway.config import Config
from gateway.errors import AgentLoadError, ConfigError, StoreFenced
from gateway.server import Gateway, open_gateway
from gateway.session import Registered
from gateway.transport.tls import expired, load_certificate

CLEAN_UP_SECONDS = 10.0
"""From the end of the drain to the end of the process. A drain is bounded; what comes after it, such as an agent's
thread that does not return, must not keep the process either."""

FILES_BESIDE_CONNECTIONS = 256
"""Listening sockets, the store's files, agents' pipes and their connections to models."""

HTTP_MODULES = {"hypercorn", "starlette", "h2", "wsproto", "anyio"}

_log = structlog.get_logger(__name__)

_DEFAULT = Config()

ServeHttp = Callable[..., Awaitable[None]]
"""`gateway.http.serve_http`, if it is installed."""


FLAGS = {
    "--host": ("server.host", "HOST", f"Where to listen [default: {_DEFAULT.server.host}]."),
    "--port": ("server.port", "PORT", f"For WebSocket; 0 takes a free one [default: {_DEFAULT.server.port}]."),
    "--http-port": ("server.http_port", "PORT", f"For health checks, likewise [default: {_DEFAULT.server.http_port}]."),
    "--tls-certificate": ("server.tls_certificate", "FILE", "Speak TLS (wss://): PEM file with certificate and chain."),
    "--tls-key": ("server.tls_key", "FILE", "PEM file with the certificate's key. SIGHUP reads both again."),
    "--store": ("store.url", "STORE", "sqlite:PATH, or memory [default: a file in the state directory]."),
    "--log-level": ("log.level", "LEVEL", f"debug, info, warning or error [default: {_DEFAULT.log.level}]."),
    "--log-format": ("log.format", "FORMAT", f"console or json [default: {_DEFAULT.log.format}]."),
}
"""Flags that are settings: their texts are checked with all other settings, so that errors come in one form."""


def _settings_flags(function: Callable[..., None]) -> Callable[..., None]:
    for name, (_, metavar, text) in reversed(FLAGS.items()):
        function = click.option(name, metavar=metavar, help=text)(function)
    return function


@click.command()
@click.argument("agents", metavar="[AGENT]...", nargs=-1)
@click.option("--config", "file", metavar="FILE", envvar=CONFIG_VARIABLE, help="Settings, as TOML.")
@_settings_flags
@click.option("--no-http", is_flag=True, help="Serve no health checks.")
@click.option(
    "--drain-timeout",
    metavar="SECONDS",
    help=f"How long running turns may go on after SIGTERM [default: {_DEFAULT.server.drain_timeout_ms // 1000}].",
)
def run(
    agents: tuple[str, ...], file: str | None, no_http: bool, drain_timeout: str | None, **given: str | None
) -> None:
    """Serve agents over WebSocket.

    AGENT is MODULE:ATTR (its id is ATTR), NAME=MODULE:ATTR, or the name of an agent in the file. Without one, all
    agents of the file are served; without any there, a demo, as "echo" and "demo".

    Sessions are kept in a file, which is printed at the start; --store memory keeps none.

    Every setting can also be in FILE or in the environment (TRIO_GATEWAY_SERVER_PORT for [server] port); flags win.
    The first SIGTERM or SIGINT drains, the second ends at once; the exit code is 0 then, and 2 if it
    cannot start, or if another process takes its store away.
    """
    with errors_as_lines():
        flags = [
            Flag(name=name, path=path, value=given[key])
            for name, (path, _, _) in FLAGS.items()
            if given[key := name.removeprefix("--").replace("-", "_")] is not None
        ]
        if drain_timeout is not None:
            flags.append(
                Flag(name="--drain-timeout", path="server.drain_timeout_ms", value=_milliseconds(drain_timeout))
            )
        if no_http or given["http_port"] is not None:
            flags.append(Flag(name="--no-http", path="server.http", value=not no_http))
        loaded = with_default_store(load(file, flags=flags))
        config = loaded.config
        set_up_logs(config.log)
        served = _load_agents(agents, config)
        serve_http = _find_http(loaded)
        make_folder(loaded)
        _prepare_process(config)
        trio.run(_serve, config, served, serve_http)


def _milliseconds(text: str) -> int:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise ConfigError("server.drain_timeout_ms", f"expected seconds, got {text!r} (--drain-timeout)")
    return round(seconds * 1000)


def _load_agents(specs: tuple[str, ...], config: Config) -> dict[str, Registered]:
    limiter = trio.CapacityLimiter(config.limits.max_sync_threads)
    served: dict[str, Registered] = {}
    for spec in specs or config.agents or DEMO_AGENTS:
        max_detached_ms, retry_lost = config.limits.max_detached_ms, False
        if spec in config.agents:
            table = config.agents[spec]
            name, agent = spec, build_agent(spec, table, limiter=limiter)
            retry_lost = table.on_lost == "retry"
            if table.max_detached_ms is not None:
                max_detached_ms = table.max_detached_ms
        elif spec in DEMO_AGENTS:
            name, agent = spec, as_agent(demo, name=spec)
        elif config.agents and spec.isidentifier() and spec not in KINDS:
            known = ", ".join(config.agents)
            raise AgentLoadError(f"unknown agent {spec!r}; expected MODULE:ATTR, NAME=MODULE:ATTR or one of: {known}")
        else:
            name, agent = load_agent(spec, limiter=limiter)
        if name in served:
            what = spec.partition("=")[2] or spec
            raise AgentLoadError(f"two agents are called {name!r}; give one another name: NAME={what}")
        served[name] = Registered(agent, max_detached_ms, retry_lost)
    return served


def _find_http(loaded: Loaded) -> ServeHttp | None:
    """`serve_http`, if it is wanted. Without the extra ``http`` the gateway runs without, unless it was asked for."""
    if not loaded.config.server.http:
        return None
    try:
        from gateway.http import serve_http
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.partition(".")[0] not in HTTP_MODULES:
            raise
        what = f"needs {exc.name}; install trio-gateway[http]"
        for path in ("server.http_port", "server.http"):
            if path in loaded.sources:
                raise ConfigError(path, f"{what}, or run with --no-http ({loaded.sources[path]})") from None
        click.echo(f"trio-gateway: runs without health checks: HTTP {what} to have them", err=True)
        return None
    return serve_http


SWITCH_INTERVAL = 0.001
"""Seconds, a fifth of the default. Shorter ones cost more switches than they save waiting."""


def _prepare_process(config: Config) -> None:
    """What only the owner of a process may change in it."""
    # Modules and agents stay: the collector need not visit them. Its default thresholds make it run every few hundred
    # messages; from 1,000 connections on each run is a pause for everyone.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    # The store's thread has to get the interpreter back after each transaction. While agents stream, that takes the
    # whole interval, and those who wait for their message to be stored wait for it: 5 ms by default.
    sys.setswitchinterval(SWITCH_INTERVAL)
    need = config.limits.max_connections + FILES_BESIDE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < need:
        soft = need if hard == resource.RLIM_INFINITY else min(need, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < need:
            _log.warning("few_files", limit=soft, max_connections=config.limits.max_connections, hint="see ulimit -n")


async def _serve(config: Config, agents: Mapping[str, Registered], serve_http: ServeHttp | None) -> None:
    """Serve until a signal comes, then drain. A second signal cancels everything."""
    stop = trio.Event()
    reason = ""

    def first(name: str) -> None:
        nonlocal reason
        reason = name
        stop.set()

    with contextlib.ExitStack() as signals, trio.CancelScope() as everything:
        signals.enter_context(on_signals(first, everything.cancel))
        async with open_gateway(config, agents) as gateway, trio.open_nursery() as nursery:
            if config.server.tls_certificate is not None:
                _check_dates(gateway)
                signals.enter_context(on_hangup(partial(_reload_certificate, gateway)))
            over = trio.Event()
            http = None
            if serve_http is not None:
                server = config.server
                # Owned by this nursery. Goes on while the gateway drains, to say so; `over` ends it.
                http = await nursery.start(partial(serve_http, gateway, server.host, server.http_port, shutdown=over))
            _announce(config, list(agents), gateway, http)
            # Owned by this nursery; ends with the drain.
            nursery.start_soon(_until_drained, gateway)
            await stop.wait()
            await gateway.drain(reason)
            end_within(CLEAN_UP_SECONDS)
            over.set()
    if everything.cancelled_caught:
        _log.warning("ended_at_once")


async def _until_drained(gateway: Gateway) -> None:
    """Raises when the gateway had to end by itself: it has lost its store."""
    try:
        await gateway.serve_forever()
    except StoreFenced:
        end_within(CLEAN_UP_SECONDS, EXIT_CODE)
        raise


def _check_dates(gateway: Gateway) -> None:
    path = gateway.config.server.tls_certificate
    assert path is not None
    assert gateway.ssl_context is not None
    if expired(gateway.ssl_context, path):
        # No reason not to start: a clock may be wrong, and clients that do not verify go on.
        _log.warning("certificate_expired", file=path, hint="clients refuse it; renew it, then send SIGHUP")


def _reload_certificate(gateway: Gateway) -> None:
    """Show new connections what is in the files now. Files that are wrong change nothing."""
    server = gateway.config.server
    assert server.tls_certificate is not None
    assert server.tls_key is not None
    try:
        gateway.ssl_context = load_certificate(server.tls_certificate, server.tls_key)
    except ConfigError as exc:
        _log.error("certificate_kept", error=str(exc), hint="the one read before is still shown")
    else:
        _log.info("certificate_reloaded", file=server.tls_certificate)
        _check_dates(gateway)


def _announce(config: Config, agents: list[str], gateway: Gateway, http: tuple[str, int] | None) -> None:
    """Say what is listening and how to talk to it: on stdout for people, in the log for machines."""
    http_url = _url(*http) if http else None
    if not config.server.tokens and not _is_loopback(gateway.address[0]):
        _log.warning("open_to_everyone", host=gateway.address[0], hint="set [server] tokens, or listen on 127.0.0.1")
    if config.log.format == "json":
        _log.info("listening", url=gateway.url, http=http_url, agents=agents, store=config.store.url)
        return
    local = gateway.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    lines = [
        f"trio-gateway {__version__}",
        f"  WebSocket  {gateway.url}",
        f"  HTTP       {http_url}/healthz /readyz /version" if http_url else "  HTTP       off",
        f"  agents     {', '.join(agents)}",
        f"  store      {config.store.url}" + (" (gone when this process ends)" if config.store.url == "memory" else ""),
        f"  talk       trio-gateway chat {local} --agent {agents[0]}",
        "  stop       Ctrl-C drains, a second one ends at once",
    ]
    try:
        click.echo("\n".join(lines))
    except BrokenPipeError:
        # Nobody reads it. Later writes, and the flush at the end, must not fail for that.
        _log.debug("stdout_closed")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
