"""Idempotency keys: which inputs count as the same, and for how long they are remembered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steady import steady

from gateway.protocol.keys import Key, Keys, digest_of
from gateway.testing.strategies import json_values
from gateway.testing.strategies import texts as text


def key(at: int, seq: int = 1) -> Key:
    return Key(seq, b"", at)


def test_the_order_of_metadata_does_not_count_at_any_depth() -> None:
    one = digest_of("hi", {"a": 1, "b": [{"c": 1, "d": 2}]})
    assert one == digest_of("hi", {"b": [{"d": 2, "c": 1}], "a": 1})


@pytest.mark.parametrize(
    ("content", "metadata"),
    [
        ("hi ", {"a": [1, 2]}),
        ("hi", {"a": [2, 1]}),
        ("hi", {"a": [1, "2"]}),
        ("hi", {"a": [1, 2], "b": None}),
        ("hi", {}),
        ("", {"hi": {"a": [1, 2]}}),
    ],
)
def test_other_content_or_metadata_is_another_input(content: str, metadata: dict[str, object]) -> None:
    assert digest_of(content, metadata) != digest_of("hi", {"a": [1, 2]})


@pytest.mark.parametrize("glue", ["", "\0", ":"])
def test_content_cannot_pass_for_metadata(glue: str) -> None:
    assert digest_of("hi" + glue + '{"a":1}', {}) != digest_of("hi", {"a": 1})


@steady
@given(text, st.dictionaries(text, json_values))
def test_a_digest_is_16_bytes_and_the_same_every_time(content: str, metadata: dict[str, object]) -> None:
    digest = digest_of(content, metadata)
    assert len(digest) == 16
    assert digest == digest_of(content, dict(reversed(metadata.items())))


def test_a_key_is_found_until_its_window_is_over() -> None:
    keys = Keys(window_ms=100)
    keys.add("a", key(at=1000))
    keys.expire(now=1100)
    assert keys.get("a") == key(at=1000)
    keys.expire(now=1101)
    assert keys.get("a") is None


def test_only_what_is_too_old_expires() -> None:
    keys = Keys(window_ms=100)
    for at in range(0, 300, 50):
        keys.add(f"k{at}", key(at))
    keys.expire(now=250)
    assert [name for name, _ in keys] == ["k150", "k200", "k250"]
    assert len(keys) == 3


def test_an_id_used_again_is_as_old_as_its_last_use() -> None:
    keys = Keys(window_ms=100)
    keys.add("again", key(0))
    keys.add("other", key(50))
    keys.add("again", key(200))
    keys.expire(now=260)
    assert [name for name, _ in keys] == ["again"]


def test_a_clock_set_back_forgets_nothing_early() -> None:
    keys = Keys(window_ms=100)
    keys.add("late", key(1000))
    keys.add("early", key(500))
    keys.expire(now=600)
    assert len(keys) == 2


@steady
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 30)), max_size=30), st.integers(0, 20))
def test_like_a_plain_list(steps: list[tuple[str, int]], window: int) -> None:
    keys, model, now = Keys(window), dict[str, int](), 0
    for name, passed in steps:
        now += passed
        keys.expire(now)
        model = {other: at for other, at in model.items() if at >= now - window}
        keys.add(name, key(now))
        model[name] = now
        assert {other: found.at for other, found in keys} == model
