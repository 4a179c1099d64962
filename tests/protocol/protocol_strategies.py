"""Hypothesis for these tests: strategies for every message class, built from its annotations; and the settings."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gateway.protocol import messages as m

steady = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
"""The same examples at every run, however busy the machine is."""

text = st.text(st.characters(codec="utf-8"), max_size=8)
integers = st.integers(-(2**63), 2**64 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)

_SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    Any: json_values,
    str: text,
    int: integers,
    bool: st.booleans(),
    type(None): st.none(),
    m.RequestId: st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
    m.SessionId: st.text("aZ0._:-", min_size=1, max_size=8),
}


@cache
def of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation, or instances of a message class."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of([of(arg) for arg in args])
    if origin is list:
        return st.lists(of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(text, of(args[1]), max_size=3)
    hints = get_type_hints(kind)
    names = [field.name for field in attrs.fields(kind)]
    return st.builds(kind, **{name: of(hints[name]) for name in names})


def any_of(*families: dict[str, type[Any]]) -> st.SearchStrategy[Any]:
    """Instances of any class of these families."""
    return st.one_of([of(cls) for family in families for cls in family.values()])
