"""TLS as an operator has it: `run` with files, a reload by signal, `chat --ca`, `check-config`."""

from __future__ import annotations

import datetime
import signal
import socket
import ssl
from pathlib import Path

import pytest
import tls_certificates as certificates
import trio
from chat_process import piped
from click.testing import CliRunner
from run_process import PATIENCE, refused, running

from gateway import open_session
from gateway.cli import main


def flags(files: dict[str, str]) -> list[str]:
    return [part for name, path in files.items() for part in (f"--{name.replace('_', '-')}", path)]


def shown_at(url: str) -> bytes:
    """The certificate that new connections see."""
    host, port = url.split("/")[2].split(":")
    context = certificates.client_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection((host, int(port)), timeout=PATIENCE)) as sock:
        return sock.getpeercert(binary_form=True) or b""


async def test_run_serves_wss_and_chat_verifies(tmp_path: Path) -> None:
    files = certificates.write(tmp_path, certificates.issue())
    ca = certificates.write_authority(tmp_path)
    async with running(*flags(files), "--no-http") as gateway:
        assert gateway.url.startswith("wss://127.0.0.1:")
        assert f"chat {gateway.url} " in gateway.out
        done = await piped(gateway.url, "--ca", ca, stdin="hi there\n")
        assert (done.returncode, b"hi there" in done.stdout) == (0, True), done
        strange = await piped(gateway.url, stdin="hi there\n")
        assert strange.returncode == 2
        assert b"certificate verify failed" in strange.stderr.lower()
        gateway.signal()
        assert await gateway.ended() == 0


async def test_a_hangup_reads_the_files_again_and_wrong_ones_change_nothing(tmp_path: Path) -> None:
    files = certificates.write(tmp_path, certificates.issue())
    async with running(*flags(files), "--no-http") as gateway:
        first = await trio.to_thread.run_sync(shown_at, gateway.url)
        async with open_session(gateway.url, "echo", ssl_context=certificates.client_context()) as session:
            with trio.fail_after(PATIENCE):
                await session.wait_joined()
                certificates.write(tmp_path, certificates.issue())
                gateway.signal(signal.SIGHUP)
                await gateway.said("certificate_reloaded")
                second = await trio.to_thread.run_sync(shown_at, gateway.url)
                assert second != first
                await trio.Path(files["tls_key"]).write_text("damaged")
                gateway.signal(signal.SIGHUP)
                await gateway.said("certificate_kept.*server.tls_key")
                assert await trio.to_thread.run_sync(shown_at, gateway.url) == second
                await session.send("still here")
        gateway.signal()
        assert await gateway.ended() == 0


async def test_an_expired_certificate_is_shown_with_a_warning(tmp_path: Path) -> None:
    files = certificates.write(tmp_path, certificates.long_expired())
    async with running(*flags(files), "--no-http") as gateway:
        await gateway.said("certificate_expired")
        assert await trio.to_thread.run_sync(shown_at, gateway.url)


async def test_a_good_certificate_needs_no_warning(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    soon = certificates.issue(not_after=now + datetime.timedelta(days=1))
    async with running(*flags(certificates.write(tmp_path, soon)), "--no-http") as gateway:
        gateway.signal()
        assert await gateway.ended() == 0
    assert "certificate" not in gateway.err


async def test_files_that_are_wrong_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    files = certificates.write(tmp_path, certificates.issue())
    line = await refused("--tls-certificate", files["tls_certificate"])
    assert line == "trio-gateway: server.tls_key: missing; TLS needs it beside server.tls_certificate"
    line = await refused(*flags({**files, "tls_key": "/no/such"}))
    assert line == "trio-gateway: server.tls_key: cannot read /no/such: No such file or directory"


def test_check_config_looks_into_the_files(tmp_path: Path) -> None:
    files = certificates.write(tmp_path, certificates.issue())
    file = tmp_path / "gateway.toml"
    file.write_text("[server]\n" + "".join(f'{name} = "{path}"\n' for name, path in files.items()))
    result = CliRunner().invoke(main, ["check-config", str(file)], env={"TRIO_GATEWAY_STORE_URL": "memory"})
    assert result.output.splitlines() == [
        "ok",
        f"server.tls_certificate = {files['tls_certificate']!r}  ({file})",
        f"server.tls_key = {files['tls_key']!r}  ({file})",
    ]
    Path(files["tls_key"]).unlink()
    result = CliRunner().invoke(main, ["check-config", str(file)], env={"TRIO_GATEWAY_STORE_URL": "memory"})
    assert result.exit_code == 2
    assert "server.tls_key: cannot read" in result.output


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot read"), ("nothing", "holds no certificate; expected a PEM file")]
)
async def test_an_authority_that_is_none(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    done = await piped("wss://127.0.0.1:1/ws", "--ca", str(file))
    assert done.returncode == 2
    assert done.stderr.decode().startswith("trio-gateway: --ca: ")
    assert says in done.stderr.decode()
