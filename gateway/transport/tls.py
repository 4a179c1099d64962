"""TLS beneath a WebSocket: the server's side as one more byte stream, and the certificate it shows.

Theory of operation
-------------------
`trio.SSLStream` can only be written to by waiting, which would cost every connection a writer task. The standard
library's `ssl.SSLObject` does the same cryptography between two buffers and never waits, so `TlsByteStream` keeps the
one promise that the flusher is built on, the non-blocking write:

    send_nowait(data) ── encrypt up to CHUNK ──▶ ciphertext ──▶ the stream below, as far as that takes it

What is encrypted cannot be taken back or be sent later, so a piece of `data` counts as taken only once all of its
ciphertext is; until then the caller offers it again, as with any write that was refused, and it is not encrypted twice.
So flow control sees the same as without TLS: a connection is blocked exactly while the kernel refuses something.

The handshake happens in the first read: it is part of the upgrade request for whoever counts and limits those.
"""

from __future__ import annotations

import ssl
from contextlib import suppress

import trio

from gateway.errors import ConfigError
from gateway.transport.streams import READ_BYTES, ByteStream, read_size

CHUNK = 64 * 1024
"""Bytes encrypted at a time: what the flusher writes to one connection in a pass. A client that does not read keeps so
much ciphertext in memory, besides what it stands for."""

MAX_ANSWERS = 64 * 1024
"""Bytes that TLS itself has to say to a peer (answers to its key updates) and that it does not read."""

_PLAIN_REQUEST = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n"
    b"Content-Length: 41\r\n\r\nthis port speaks TLS; use wss:// instead\n"
)


class TlsByteStream(ByteStream):
    """The server's end of TLS over `stream`, which it owns from now on. Errors of TLS are `trio.BrokenResourceError`.

    Until the first `receive_some` has returned, nothing can be sent.

    `send_nowait` and `send_some`: what they did not take must be what the next call begins with.
    """

    def __init__(self, stream: ByteStream, context: ssl.SSLContext) -> None:
        self._stream = stream
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._handshaken = False
        self._ended = False
        self._failed = ""
        self._unsent = memoryview(b"")
        # Invariant: while this is not 0, the first so many bytes of what the caller offers next are encrypted already.
        self._encrypted = 0

    @property
    def peer(self) -> str:
        return self._stream.peer

    # outwards

    def _drain(self) -> bool:
        """Hand ciphertext down without waiting; says whether all of it went."""
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return True
                self._unsent = memoryview(self._outgoing.read())
            sent = self._stream.send_nowait(self._unsent)
            self._unsent = self._unsent[sent:]
            if self._unsent:
                return False

    async def _drain_all(self) -> None:
        while not self._drain():
            await self._stream.wait_send_all_might_not_block()

    def send_nowait(self, data: bytes | memoryview) -> int:
        if self._ended:
            raise trio.ClosedResourceError("this side has sent its end")
        if not data:
            return self._stream.send_nowait(b"")
        if self._failed or not self._handshaken:
            raise trio.BrokenResourceError(self._failed or "TLS is not established")
        taken, size = 0, len(data)
        while self._drain():
            taken += self._encrypted
            self._encrypted = 0
            if taken >= size:
                return size
            try:
                piece = data if size <= CHUNK and not taken else memoryview(data)[taken : taken + CHUNK]
                self._encrypted = self._tls.write(piece)
            except ssl.SSLError as exc:
                raise self._broken(exc) from exc
        return taken

    async def send_some(self, data: bytes | memoryview) -> int:
        while True:
            await self._stream.wait_send_all_might_not_block()
            left = len(self._unsent)
            sent = self.send_nowait(data)
            if sent or not data or len(self._unsent) < left:
                return sent

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Say, in TLS as well, that nothing more will be sent."""
        if not self._ended:
            self._ended = True
            self._say_goodbye()
            await self._drain_all()
        await self._stream.send_eof()

    def _say_goodbye(self) -> None:
        if self._handshaken and not self._failed:
            with suppress(ssl.SSLError):  # that the peer has yet to say its own is one, too
                self._tls.unwrap()

    async def aclose(self) -> None:
        """Close at once. That this is the end of TLS is said as far as one non-blocking write goes."""
        if not self._ended:
            self._ended = True
            self._say_goodbye()
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._drain()
        await self._stream.aclose()

    # inwards

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As `ByteStream`; the first call establishes TLS. ``b""`` is also a line that ended without TLS saying so: a
        WebSocket has an end of its own, whose absence is noticed."""
        size = read_size(max_bytes)
        if not self._handshaken:
            await self._handshake()
        if self._incoming.pending or self._tls.pending():
            await trio.lowlevel.checkpoint()  # before anything is taken, so that cancelling loses nothing
        while True:
            data, over = self._decrypt(size)
            if self._outgoing.pending:
                self._answer()
            if data or over:
                return data
            received = await self._stream.receive_some(READ_BYTES)
            if not received:
                return b""
            self._incoming.write(received)

    def _decrypt(self, size: int) -> tuple[bytes, bool]:
        """What can be decrypted at once, at most `size` bytes; and whether it is the end."""
        parts: list[bytes] = []
        try:
            while size:
                part = self._tls.read(size)  # one record, so at most 16 KiB
                if not part:
                    return b"".join(parts), True
                parts.append(part)
                size -= len(part)
                if not self._incoming.pending and not self._tls.pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:  # what `read` has for the peer's end once ours was said
            return b"".join(parts), True
        except ssl.SSLError as exc:
            raise self._broken(exc) from exc
        return b"".join(parts), False

    def _answer(self) -> None:
        self._drain()
        if self._outgoing.pending > MAX_ANSWERS:
            raise trio.BrokenResourceError("the peer asks TLS for answers and does not read them")

    async def _handshake(self) -> None:
        tls = self._tls
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._drain_all()
            except ssl.SSLError as exc:
                if exc.reason == "HTTP_REQUEST":
                    self._stream.send_nowait(_PLAIN_REQUEST)
                raise self._broken(exc) from exc
            received = await self._stream.receive_some(READ_BYTES)
            if not received:
                self._failed = "the peer closed during the TLS handshake"
                raise trio.BrokenResourceError(self._failed)
            self._incoming.write(received)
        await self._drain_all()
        self._handshaken = True

    def _broken(self, exc: ssl.SSLError) -> trio.BrokenResourceError:
        """TLS cannot go on; the peer is told why, in an alert."""
        self._failed = f"no TLS with this peer: {exc.reason or exc}"
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._drain()
        return trio.BrokenResourceError(self._failed)


def load_certificate(certificate: str, key: str) -> ssl.SSLContext:
    """A server's TLS context that shows the certificate (with its chain) in one PEM file, whose key is in the other.

    Raises:
        ConfigError: a file cannot be read, is no PEM, the key is encrypted or belongs to another certificate.
    """
    for name, path, what in (
        ("server.tls_certificate", certificate, b"CERTIFICATE-----"),
        ("server.tls_key", key, b"PRIVATE KEY-----"),
    ):
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as exc:
            raise ConfigError(name, f"cannot read {path}: {exc.strerror}") from None
        if what not in content:
            raise ConfigError(name, f"expected a PEM file with -----BEGIN ...{what.decode()}, and {path} has none")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    # A peer that has the keys made anew again and again would cost much more than it pays.
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])

    def no_password() -> str:
        raise ConfigError("server.tls_key", f"{key} is encrypted; expected a key without a password (openssl pkey)")

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError("server.tls_key", f"{key} is not the key of the certificate in {certificate}") from None
        raise ConfigError(
            "server.tls_certificate", f"OpenSSL does not take {certificate} with {key}: {exc.reason or exc}"
        ) from None
    return context


def expired(context: ssl.SSLContext, certificate: str) -> bool:
    """Whether clients refuse the certificate for its dates. `context` is of `load_certificate`, from the same file.

    A server does not look at its own certificate, so this is a handshake with a client that trusts exactly that one.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(certificate)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [context.wrap_bio(up, down, server_side=True), client.wrap_bio(down, up)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as exc:
                return exc.verify_code in (9, 10)  # not yet valid, expired
            except ssl.SSLError:
                return False
    return False
