"""An authority of our own, a server's certificate of it, and what trusts it."""

from __future__ import annotations

import datetime
import ssl
from functools import cache
from pathlib import Path
from typing import Any

import trustme


@cache
def authority() -> trustme.CA:
    return trustme.CA(key_type=trustme.KeyType.ECDSA)


def issue(**options: Any) -> trustme.LeafCert:
    """A certificate for this machine's loopback names."""
    return authority().issue_cert("localhost", "127.0.0.1", key_type=trustme.KeyType.ECDSA, **options)


def long_expired() -> trustme.LeafCert:
    return issue(not_after=datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))


@cache
def server_context() -> ssl.SSLContext:
    """As an application would make it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    issue().configure_cert(context)
    return context


def client_context() -> ssl.SSLContext:
    """Trusts our authority, and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    return context


def write(directory: Path, certificate: trustme.LeafCert) -> dict[str, str]:
    """The settings that name its files."""
    files = {"tls_certificate": directory / "certificate.pem", "tls_key": directory / "key.pem"}
    files["tls_certificate"].write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    files["tls_key"].write_bytes(certificate.private_key_pem.bytes())
    return {name: str(path) for name, path in files.items()}


def write_authority(directory: Path) -> str:
    authority().cert_pem.write_to_path(str(directory / "ca.pem"))
    return str(directory / "ca.pem")
