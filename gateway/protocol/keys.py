"""Idempotency keys: what makes a repeated `message` the same message (PROTOCOL section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any

from attrs import frozen

from gateway.protocol.codec import dump_json


@frozen
class Key:
    """`seq` and `at` (ms) of the input that first used the id; `digest` of its content and metadata."""

    seq: int
    digest: bytes
    at: int


def digest_of(content: str, metadata: Mapping[str, Any]) -> bytes:
    """16 bytes that tell two inputs apart; the order of metadata's keys does not count."""
    text = content.encode()
    # The length comes first, or content that ends like metadata would pass for it.
    state = blake2b(b"%d:%b" % (len(text), text), digest_size=16)
    if metadata:
        state.update(dump_json(_sorted(metadata)))
    return state.digest()


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value


class Keys:
    """The ids used in one session, kept for `window_ms` after their input was accepted.

    Invariant: keys are in the order of their ``at``, so what is too old is at the front.
    """

    def __init__(self, window_ms: int) -> None:
        self._window_ms = window_ms
        self._keys: dict[str, Key] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[tuple[str, Key]]:
        return iter(self._keys.items())

    def get(self, request_id: str) -> Key | None:
        """The key, if the id was used within the window."""
        return self._keys.get(request_id)

    def add(self, request_id: str, key: Key) -> None:
        """Remember an accepted input."""
        self._keys.pop(request_id, None)  # a dict keeps the place of a key that is set again
        self._keys[request_id] = key

    def expire(self, now: int) -> None:
        """Forget the keys older than the window. `now` is in milliseconds."""
        limit = now - self._window_ms
        while self._keys:
            request_id = next(iter(self._keys))
            if self._keys[request_id].at >= limit:
                return
            del self._keys[request_id]
