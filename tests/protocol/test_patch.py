"""Merge patch: the examples of RFC 7396, appendix A, and what a session relies on beyond them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steady import steady

from gateway.protocol.patch import merge_patch
from gateway.testing.strategies import json_values
from gateway.testing.strategies import texts as text

RFC_7396: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "expected"), RFC_7396)
def test_rfc_example(target: Any, patch: Any, expected: Any) -> None:
    assert merge_patch(target, patch) == expected


objects = st.dictionaries(text, json_values, max_size=4)


@steady
@given(objects, objects)
def test_neither_argument_is_changed(target: Any, patch: Any) -> None:
    before = copy.deepcopy((target, patch))
    merge_patch(target, patch)
    assert (target, patch) == before


@steady
@given(objects, st.lists(objects, max_size=5), st.data())
def test_the_newest_patches_once_more_change_nothing(target: Any, patches: list[Any], data: st.DataObject) -> None:
    # A session comes back with its state and the retained `state` events, which the state already contains.
    state = target
    for patch in patches:
        state = merge_patch(state, patch)
    again = state
    for patch in patches[data.draw(st.integers(0, len(patches))) :]:
        again = merge_patch(again, patch)
    assert again == state
