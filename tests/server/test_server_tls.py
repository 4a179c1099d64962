"""A gateway that listens with TLS.

That flow control, drain and resume hold there too is shown in their own files, by the fixture `line`.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest
import tls_certificates as certificates
import trio
from cutting_proxy import open_proxy
from plain_client import PATIENCE, Plain, Reader, dial, ended, eventually, follow, gateway_of, hello, joined

from gateway import Config, Server, Turn, open_gateway, open_session
from gateway.client import Session
from gateway.errors import ConfigError
from gateway.protocol.cursor import Backoff
from gateway.protocol.messages import TurnEnded
from gateway.server import Gateway

SECURE = {"ssl_context": certificates.server_context()}


def trusted(gateway: Gateway) -> str:
    """Its URL under a name that the certificate has."""
    return gateway.url.replace("127.0.0.1", "localhost")


async def answer_of(session: Session, text: str) -> str:
    await session.send(text)
    async for event in session:
        if isinstance(event, TurnEnded):
            return session.text_of(event.turn_id)
    raise AssertionError("the session ended first")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_conversation_with_the_clients_own_verification(host: str) -> None:
    async with gateway_of(**SECURE) as gateway:
        assert gateway.url == f"wss://127.0.0.1:{gateway.address[1]}/ws"
        url = gateway.url.replace("127.0.0.1", host)
        async with open_session(url, "echo", ssl_context=certificates.client_context()) as session:
            with trio.fail_after(PATIENCE):
                assert await answer_of(session, "hi") == "echo: hi"


async def test_from_the_files_of_the_settings(tmp_path: Path) -> None:
    files = certificates.write(tmp_path, certificates.issue())
    async with gateway_of(server=files) as gateway:
        async with open_session(trusted(gateway), "echo", ssl_context=certificates.client_context()) as session:
            with trio.fail_after(PATIENCE):
                assert await answer_of(session, "hi") == "echo: hi"


async def test_wrong_files_are_told_before_anything_listens(tmp_path: Path) -> None:
    files = certificates.write(tmp_path, certificates.issue())
    with pytest.raises(ConfigError, match="cannot read /no/such") as caught:
        async with gateway_of(server={**files, "tls_key": "/no/such"}):
            pass
    assert caught.value.key == "server.tls_key"
    with pytest.raises(ConfigError, match="missing") as caught:
        Server(tls_certificate=files["tls_certificate"])
    assert caught.value.key == "server.tls_key"
    with pytest.raises(ConfigError, match="missing") as caught:
        Server(tls_key=files["tls_key"])
    assert caught.value.key == "server.tls_certificate"


async def test_who_does_not_know_the_authority_does_not_join() -> None:
    async with gateway_of(**SECURE) as gateway:
        async with open_session(trusted(gateway), "echo") as session:
            with trio.fail_after(PATIENCE):
                async for state in session.connection_states():
                    if state.phase == "waiting":
                        break
        assert "certificate verify failed" in state.reason.lower()
        await eventually(lambda: gateway.statistics().pending_handshakes == 0)
        assert gateway.statistics().crashed_connections == 0


async def test_it_resumes_over_lines_that_are_cut() -> None:
    async def count(turn: Turn) -> None:
        for n in range(3000):
            await turn.send(f"{n} ")
            await trio.lowlevel.checkpoint()

    cuts = iter([4_000, 9_000, 15_000])
    async with gateway_of(count, **SECURE) as gateway:
        async with open_proxy(gateway.address, budget=lambda: next(cuts, None)) as proxy:
            async with open_session(
                proxy.url.replace("ws://127.0.0.1", "wss://localhost"),
                "echo",
                ssl_context=certificates.client_context(),
                backoff=Backoff(base=0.02, cap=0.1),
            ) as session:
                with trio.fail_after(60):
                    assert await answer_of(session, "go") == "".join(f"{n} " for n in range(3000))
                assert proxy.accepted > 1


async def test_a_replay_of_several_mebibytes_comes_out_whole() -> None:
    async def much(turn: Turn) -> None:
        for n in range(100):
            await turn.output(f"{n:<60000}", channel=f"c{n % 8}")

    limits = {"send_buffer_bytes": 16_384}
    async with gateway_of(much, limits=limits, **SECURE) as gateway:
        async with joined(gateway, "s") as first:
            await first.message()
            await first.until("turn_ended")
        reader = Reader()
        async with joined(gateway, "s", since=0) as client:
            reader.take(client.hello)
            await follow(client, reader, ended)
        assert [event["content"] for event in reader.kept if event["type"] == "output"] == [
            f"{n:<60000}" for n in range(100)
        ]
        assert sum(client.sizes) > 6_000_000


async def test_a_message_of_a_mebibyte_from_the_client() -> None:
    async def measure(turn: Turn) -> str:
        return str(len(turn.input.content))

    async with gateway_of(measure, **SECURE) as gateway, joined(gateway) as client:
        await client.message("x" * 1_000_000)
        assert (await client.until("output"))["content"] == "1000000"


async def test_a_client_that_is_gone_without_a_goodbye() -> None:
    async with gateway_of(**SECURE) as gateway, joined(gateway) as other:
        for hard in (True, False):
            client = await dial(gateway)
            await client.send("hello", protocol_min=2, protocol_max=2, agent_id="echo")
            await client.until("hello_ok")
            await (client.cut() if hard else client.stream.aclose())
        await eventually(lambda: gateway.statistics().connections == 1)
        await other.ask("ping", "pong")
        assert gateway.statistics().crashed_connections == 0


JUNK = {
    "zeros": bytes(1000),
    "half a record": b"\x16\x03\x01\x02\x00\x01",
    "a bad record": b"\x16\x03\x01\x00\x05hello",
    "a long record": b"\x16\x03\x03\xff\xff" + bytes(70_000),
    "an alert": b"\x15\x03\x03\x00\x02\x02\x28",
    "nothing": b"",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
@pytest.mark.parametrize("end", [True, False])
async def test_junk_on_the_port_ends_nothing_else(junk: bytes, end: bool) -> None:
    async with gateway_of(limits={"handshake_timeout_ms": 300}, **SECURE) as gateway, joined(gateway) as other:
        async with await trio.open_tcp_stream(*gateway.address) as stream:
            try:
                await stream.send_all(junk)
                if end:
                    await stream.send_eof()
                with trio.fail_after(PATIENCE):
                    while await stream.receive_some():
                        pass
            except trio.BrokenResourceError:
                pass
        await eventually(lambda: gateway.statistics().pending_handshakes == 0)
        await other.ask("ping", "pong")
        assert gateway.statistics().crashed_connections == 0


async def test_a_plain_websocket_client_is_told_what_to_do() -> None:
    async with gateway_of(**SECURE) as gateway:
        async with open_session(gateway.url.replace("wss://", "ws://"), "echo") as session:
            with trio.fail_after(PATIENCE):
                async for state in session.connection_states():
                    if state.phase == "waiting":
                        break
        assert "HTTP 400" in state.reason
        assert "use wss://" in state.reason


async def test_stalled_handshakes_are_counted_bounded_in_time_and_in_nobodys_way() -> None:
    limits = {"handshake_timeout_ms": 1_000, "max_pending_handshakes_per_peer": 3}
    async with gateway_of(limits=limits, **SECURE) as gateway:
        stalled = [await trio.open_tcp_stream(*gateway.address) for _ in range(3)]
        for stream in stalled[1:]:
            await stream.send_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        await eventually(lambda: gateway.statistics().pending_handshakes == 3)
        # One more is not let in, and costs no handshake.
        more = await trio.open_tcp_stream(*gateway.address)
        with trio.fail_after(PATIENCE):
            assert await more.receive_some() == b""
        assert gateway.statistics().refused_sockets == 1
        await eventually(lambda: gateway.statistics().pending_handshakes == 0)
        async with joined(gateway) as client:
            await client.ask("ping", "pong")
        for stream in (*stalled, more):
            await trio.aclose_forcefully(stream)


async def test_a_drain_does_not_wait_for_a_stalled_handshake() -> None:
    async with gateway_of(limits={"handshake_timeout_ms": 600_000}, **SECURE) as gateway:
        stream = await trio.open_tcp_stream(*gateway.address)
        await stream.send_all(b"\x16\x03\x01")
        await eventually(lambda: gateway.statistics().pending_handshakes == 1)
        with trio.fail_after(PATIENCE):
            await gateway.drain()
            assert await stream.receive_some() == b""
        await stream.aclose()


async def test_a_client_that_stops_in_the_middle_of_the_close_is_dropped() -> None:
    async def flood(turn: Turn) -> None:
        await turn.send("x" * 2_000_000)

    limits = {"send_buffer_bytes": 4096, "send_timeout_ms": 200, "close_timeout_ms": 200}
    async with gateway_of(flood, limits=limits, **SECURE) as gateway, joined(gateway, small=True) as client:
        await client.send("message", request_id="r", content="go")
        await eventually(lambda: gateway.statistics().closes == {"1013 slow_consumer": 1})
        await eventually(lambda: gateway._serving == 0)


async def test_the_end_of_a_connection_is_said_in_tls_too() -> None:
    """A client whose library takes a missing close_notify for an attack gets one, after the close frames."""
    async with gateway_of(**SECURE) as gateway:
        sock = trio.socket.socket()
        await sock.connect(gateway.address)
        client = Plain(
            trio.SSLStream(trio.SocketStream(sock), certificates.client_context(), server_hostname="localhost")
        )
        await client.upgrade()
        await client.send(**hello())
        await client.ask("leave", "left")
        closed = await client.until_closed()
        assert closed.code == 1000
        with trio.fail_after(PATIENCE):
            assert await client.stream.receive_some() == b""  # an end without one would be a BrokenResourceError
        await client.stream.aclose()


async def test_old_versions_of_tls_are_refused() -> None:
    context = certificates.client_context()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    async with gateway_of(**SECURE) as gateway:
        async with open_session(trusted(gateway), "echo", ssl_context=context) as session:
            with trio.fail_after(PATIENCE):
                async for state in session.connection_states():
                    if state.phase == "waiting":
                        break
        assert "no TLS with" in state.reason


async def test_the_certificate_may_be_replaced_while_connections_are_open() -> None:
    async def shown(gateway: Gateway) -> bytes:
        stream = trio.SSLStream(
            trio.SocketStream(await _connected(gateway)), certificates.client_context(), server_hostname="localhost"
        )
        await stream.do_handshake()
        der = stream.getpeercert(binary_form=True)
        await trio.aclose_forcefully(stream)
        assert isinstance(der, bytes)
        return der

    async with gateway_of(**SECURE) as gateway, joined(gateway) as client:
        before = await shown(gateway)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificates.issue().configure_cert(context)
        gateway.ssl_context = context
        assert await shown(gateway) != before
        await client.ask("ping", "pong")


async def _connected(gateway: Gateway) -> trio.socket.SocketType:
    sock = trio.socket.socket(socket.AF_INET)
    await sock.connect(gateway.address)
    return sock


async def test_a_gateway_in_memory_needs_no_certificate() -> None:
    config = Config(server=Server(tls_certificate="/no/such", tls_key="/no/such"))
    async with open_gateway(config, {"echo": answer}, listen=False) as gateway:
        stream = gateway.connect()
        await stream.send_all(b"GET /elsewhere HTTP/1.1\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 400")
        await stream.aclose()


async def answer(turn: Turn) -> str:
    return "yes"
