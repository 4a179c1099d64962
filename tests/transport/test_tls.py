"""`TlsByteStream` keeps the promises of a byte stream, over a line in memory that can be narrow, stalled and cut."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import tls_certificates as certificates
import trio
import trio.testing

from gateway.errors import ConfigError
from gateway.transport.memory import MemoryByteStream, memory_pair
from gateway.transport.streams import end_gently
from gateway.transport.tls import MAX_ANSWERS, TlsByteStream, expired, load_certificate

MIB = 1024 * 1024


@asynccontextmanager
async def pair(
    capacity: int = 256 * 1024, *, goodbye: bool = False, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[trio.SSLStream[MemoryByteStream], TlsByteStream, MemoryByteStream]]:
    """A client and a server that know each other, and the client's end of the line below them."""
    near, far = memory_pair(capacity=capacity)
    client = trio.SSLStream(
        near, context or certificates.client_context(), server_hostname="localhost", https_compatible=not goodbye
    )
    server = TlsByteStream(far, certificates.server_context())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send_all, b"hello")
        assert await server.receive_some() == b"hello"
    yield client, server, near
    await trio.aclose_forcefully(client)
    await trio.aclose_forcefully(server)


async def read(client: trio.SSLStream[MemoryByteStream], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = await client.receive_some(65_536)
        assert more
        data += more
    return bytes(data)


def noise(size: int) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in range(size // 4 + 1))[:size]


async def test_a_small_write_needs_no_waiting() -> None:
    async with pair() as (client, server, _):
        for size in (1, 90, 16_384, 65_536):
            assert server.send_nowait(noise(size)) == size
            assert await read(client, size) == noise(size)


@pytest.mark.parametrize("capacity", [1000, 20_000, 256 * 1024])
async def test_what_the_line_refuses_is_offered_again_and_arrives_once(capacity: int) -> None:
    async with pair(capacity) as (client, server, _):
        data = noise(MIB)
        got = bytearray()
        sent = server.send_nowait(data)
        assert sent < MIB

        async def reading() -> None:
            got.extend(await read(client, MIB + 4))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reading)
            rest = memoryview(data)[sent:]
            while rest:
                rest = rest[await server.send_some(rest) :]
            await server.send_all(b"last")
        assert bytes(got) == data + b"last"


async def test_a_piece_counts_as_taken_when_its_ciphertext_is() -> None:
    async with pair(10_000) as (client, server, near):
        taken = server.send_nowait(noise(9_000))
        assert taken == 9_000
        # The line is nearly full: what is refused now was encrypted, and must not be again.
        assert server.send_nowait(b"a" * 5_000) == 0
        assert server.send_nowait(b"a" * 5_000) == 0
        assert near.incoming.transferred < 20_000
        await read(client, 9_000)
        assert server.send_nowait(b"a" * 5_000) == 5_000
        assert await read(client, 5_000) == b"a" * 5_000


async def test_send_some_reports_a_part_of_a_piece_as_progress(autojump_clock: trio.testing.MockClock) -> None:
    """Otherwise a slow but steady reader of a large piece would look like one that has stopped."""
    async with pair(1000) as (client, server, _):
        data = noise(20_000)
        rest = memoryview(data)
        rounds = 0

        async def drip() -> None:
            while True:
                await client.transport_stream.receive_some(500)
                await trio.sleep(1)

        with trio.move_on_after(5) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drip)
                while True:
                    rest = rest[await server.send_some(rest) :]
                    rounds += 1
        assert scope.cancelled_caught
        assert len(rest) == 20_000
        assert rounds >= 4


async def test_a_cancelled_send_some_repeats_and_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with pair(5_000) as (client, server, near):
        near.incoming.stall()
        rest = memoryview(noise(100_000))
        rest = rest[server.send_nowait(rest) :]
        for _ in range(3):
            with trio.move_on_after(1):
                await server.send_some(rest)
                raise AssertionError("the line is stalled")
        near.incoming.resume()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, rest)
            assert await read(client, 100_000) == noise(100_000)


async def test_a_cancelled_read_loses_nothing() -> None:
    async with pair() as (client, server, _):
        await client.send_all(b"0123456789")
        assert await server.receive_some(4) == b"0123"
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.receive_some(4)
        assert scope.cancelled_caught
        assert await server.receive_some(100) == b"456789"


async def test_a_read_takes_several_records() -> None:
    async with pair() as (client, server, _):
        await client.send_all(noise(60_000))
        assert await server.receive_some() == noise(60_000)


async def test_both_ends_are_said() -> None:
    async with pair(goodbye=True) as (client, server, _):
        server.send_nowait(b"last words")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_gently, server, 5)
            assert await read(client, 10) == b"last words"
            assert await client.receive_some() == b""  # not an error: TLS said that it ends
            await client.aclose()
        with pytest.raises(trio.ClosedResourceError):
            server.send_nowait(b"x")


async def test_a_close_says_goodbye_as_well() -> None:
    async with pair(goodbye=True) as (client, server, _):
        await server.aclose()
        await server.aclose()
        assert await client.receive_some() == b""


async def test_unread_bytes_do_not_keep_the_goodbye_from_being_said() -> None:
    async with pair(goodbye=True) as (client, server, _):
        await client.send_all(b"nobody reads this")
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_gently, server, 60)
                assert await client.receive_some() == b""
                await client.aclose()


async def test_a_peer_may_go_on_after_our_end_and_is_read_to_its_own() -> None:
    """Else the socket would be closed over unread bytes, which is a reset that may overtake what was sent last."""
    async with pair(goodbye=True) as (client, server, _):
        await client.send_all(b"before")
        await server.send_eof()
        await client.send_all(b"after")
        await client.aclose()
        got = b""
        with trio.fail_after(5):
            while data := await server.receive_some():
                got += data
        assert got == b"beforeafter"


@pytest.mark.parametrize("goodbye", [True, False])
async def test_the_peer_ends_with_a_goodbye_or_without(goodbye: bool) -> None:
    async with pair(goodbye=goodbye) as (client, server, _):
        await client.send_all(b"x")
        await client.aclose()
        assert await server.receive_some() == b"x"
        assert await server.receive_some() == b""
        assert await server.receive_some() == b""


async def test_a_cut_line_is_a_broken_one_on_every_side() -> None:
    async with pair() as (_, server, near):
        near.cut()
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            server.send_nowait(b"x")
        await server.aclose()


async def test_garbage_on_the_line_is_a_broken_one_and_the_peer_gets_an_alert() -> None:
    async with pair() as (client, server, near):
        await near.send_all(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(trio.BrokenResourceError, match=r"BAD_RECORD|DECRYPTION_FAILED"):
            await server.receive_some()
        with pytest.raises(trio.BrokenResourceError):
            server.send_nowait(b"x")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await client.receive_some()
        assert "alert" in str(caught.value.__cause__).lower()


async def test_nothing_is_sent_before_tls_is_there() -> None:
    near, far = memory_pair()
    server = TlsByteStream(far, certificates.server_context())
    with pytest.raises(trio.BrokenResourceError, match="not established"):
        server.send_nowait(b"secret")
    assert near.incoming.transferred == 0


async def test_plain_http_gets_told_in_plain_http() -> None:
    near, far = memory_pair()
    server = TlsByteStream(far, certificates.server_context())
    await near.send_all(b"GET /ws HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(trio.BrokenResourceError, match="HTTP_REQUEST"):
        await server.receive_some()
    with trio.fail_after(5):
        head, _, body = bytes(await near.receive_some()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"wss://" in body
    assert b"Content-Length: %d\r" % len(body) in head + b"\r"


@pytest.mark.parametrize("junk", [b"\0" * 64, b"\x16\x03\x01\xff\xff" + b"x" * 200, b"SSH-2.0-x\r\n"])
async def test_junk_instead_of_a_handshake(junk: bytes) -> None:
    near, far = memory_pair()
    server = TlsByteStream(far, certificates.server_context())
    await near.send_all(junk)
    with pytest.raises(trio.BrokenResourceError, match="no TLS with this peer"):
        await server.receive_some()


async def test_the_line_ends_within_the_handshake() -> None:
    near, far = memory_pair()
    server = TlsByteStream(far, certificates.server_context())
    await near.send_all(b"\x16\x03\x01")
    await near.aclose()
    with pytest.raises(trio.BrokenResourceError, match="closed during the TLS handshake"):
        await server.receive_some()


async def test_a_client_that_asks_for_new_keys_for_ever_and_does_not_read() -> None:
    """Each request makes TLS answer; what is not read must not pile up."""
    async with pair(2_000) as (client, server, _):
        server.send_nowait(b"x" * 10_000)  # fills the line

        async def answer(count: int) -> None:
            for _ in range(count):
                server._outgoing.write(bytes(64))  # what a key update would leave there
                await client.send_all(b"y")
                await server.receive_some()

        await answer(MAX_ANSWERS // 64)
        with pytest.raises(trio.BrokenResourceError, match="does not read"):
            await answer(1)


# --- the certificate -------------------------------------------------------------------------------------------------


def refused(**files: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_certificate(files["tls_certificate"], files["tls_key"])
    return caught.value


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    good = certificates.write(tmp_path, certificates.issue())
    other = tmp_path / "other"
    other.mkdir()
    others = certificates.write(other, certificates.issue())
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing\n")
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for files, key, says in (
        ({**good, "tls_certificate": "/no/such"}, "server.tls_certificate", "cannot read /no/such: No such file"),
        ({**good, "tls_key": str(tmp_path)}, "server.tls_key", "Is a directory"),
        ({**good, "tls_certificate": str(empty)}, "server.tls_certificate", "BEGIN ...CERTIFICATE-----"),
        ({**good, "tls_key": good["tls_certificate"]}, "server.tls_key", "BEGIN ...PRIVATE KEY-----"),
        ({**good, "tls_key": others["tls_key"]}, "server.tls_key", "is not the key of the certificate in"),
        ({**good, "tls_certificate": str(damaged)}, "server.tls_certificate", "OpenSSL does not take"),
    ):
        error = refused(**files)
        assert error.key == key
        assert says in str(error)


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_a_password(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    files = certificates.write(tmp_path, certificates.issue())
    plain = serialization.load_pem_private_key(Path(files["tls_key"]).read_bytes(), None)
    secret = plain.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    Path(files["tls_key"]).write_bytes(secret)
    error = refused(**files)
    assert error.key == "server.tls_key"
    assert "encrypted" in str(error)


def test_dates(tmp_path: Path) -> None:
    for leaf, over in ((certificates.issue(), False), (certificates.long_expired(), True)):
        files = certificates.write(tmp_path, leaf)
        context = load_certificate(files["tls_certificate"], files["tls_key"])
        assert expired(context, files["tls_certificate"]) is over
