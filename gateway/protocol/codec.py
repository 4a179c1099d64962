"""Bytes to messages and back: the only place that knows JSON, cattrs and orjson.

Strict at the edge, so that nothing behind it has to check again: a bool is no int, ``"3"`` is no number, and whatever
is wrong comes out as one `FrameError` that names the field. Unknown fields are ignored (PROTOCOL section 1).

JSON that orjson would take but that does not mean one thing to everyone is refused too: a repeated ``type``, an integer
beyond 64 bits (it would become a float), nesting beyond `MAX_DEPTH` (it could be read but not written again). Finding
those costs a second, slow parse, so cheap scans of the raw bytes decide whether a frame can contain them at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn, get_args, get_origin

import attrs
import cattrs
import orjson
from cattrs.fns import identity
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override
from cattrs.preconf.orjson import make_converter

from gateway.errors import FrameError
from gateway.protocol import messages as m

MAX_DEPTH = 64
"""Levels of nesting in a frame of the gateway. orjson reads 1,024 but writes 254."""

MAX_GIVEN_DEPTH = MAX_DEPTH - 8
"""The same in what a client sends or an agent writes: events, snapshots and dialects wrap it a few levels deeper."""

MAX_REQUEST_ID = 128
_SESSION_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    float: "a number",
    dict: "an object",
    list: "an array",
    type(None): "null",
}


class _Mismatch(ValueError):
    """A value of the wrong kind; carries what was expected. Turned into a `FrameError` with the field's path."""


def _describe(value: object) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _exactly(kind: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise _Mismatch(f"expected {_NAMES[kind]}, got {_describe(value)}")
        return value

    return structure


def _structure_float(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise _Mismatch(f"expected a number, got {_describe(value)}")
    return float(value)


def _structure_request_id(value: Any, _: Any) -> Any:
    if type(value) is not str or not 1 <= len(value) <= MAX_REQUEST_ID:
        got = f"{len(value)} characters" if type(value) is str else _describe(value)
        raise _Mismatch(f"expected a string of 1 to {MAX_REQUEST_ID} characters, got {got}")
    return value


def _structure_session_id(value: Any, _: Any) -> Any:
    if type(value) is not str or not _SESSION_ID.fullmatch(value):
        raise _Mismatch("expected 1 to 128 of the characters A-Z a-z 0-9 . _ : -")
    return value


def _origin(kind: Any) -> Any:
    return get_origin(kind)


def _is_json(kind: Any) -> bool:
    return kind is Any or kind in (dict[str, Any], list[Any], list[str], list[m.RequestId])


def _make_converter() -> cattrs.Converter:
    converter = make_converter(detailed_validation=True)
    for kind in (str, int, bool):
        converter.register_structure_hook(kind, _exactly(kind))
    converter.register_structure_hook(float, _structure_float)
    converter.register_structure_hook(m.RequestId, _structure_request_id)
    converter.register_structure_hook(m.SessionId, _structure_session_id)

    def literal(kind: Any) -> Callable[[Any, Any], Any]:
        allowed = get_args(kind)
        expected = "expected one of " + ", ".join(allowed)

        def structure(value: Any, _: Any) -> Any:
            if value not in allowed:
                raise _Mismatch(expected)
            return value

        return structure

    converter.register_structure_hook_factory(lambda kind: _origin(kind) is Literal, literal)

    def container(kind: Any) -> Callable[[Any, Any], Any]:
        origin = _origin(kind)
        exactly = _exactly(origin)
        args = get_args(kind)
        inner = converter.get_structure_hook(args[-1]) if args[-1] is not Any else None

        def structure(value: Any, _: Any) -> Any:
            exactly(value, None)
            if inner is None:
                return value
            if origin is list:
                return [inner(item, args[-1]) for item in value]
            return {key: inner(item, args[-1]) for key, item in value.items()}

        return structure

    converter.register_structure_hook_factory(lambda kind: _origin(kind) in (list, dict), container)

    exactly_dict = _exactly(dict)

    def class_of(kind: Any) -> Callable[[Any, Any], Any]:
        # cattrs itself would take any sequence for a class whose fields all have defaults.
        renamed: Any = {"from_": override(rename="from")} if kind is m.Signal else {}
        inner: Callable[[Any, Any], Any] = make_dict_structure_fn(
            kind, converter, _cattrs_detailed_validation=True, **renamed
        )

        def structure(value: Any, _: Any) -> Any:
            exactly_dict(value, None)
            return inner(value, kind)

        return structure

    converter.register_structure_hook_factory(attrs.has, class_of)

    def structure_event(value: Any, _: Any) -> Any:
        exactly_dict(value, None)
        tag = value.get("type")
        cls = m.EVENTS.get(tag) if type(tag) is str else None
        if cls is None:
            raise _Mismatch("expected an event of a known type")
        return converter.structure(value, cls)

    converter.register_structure_hook_func(lambda kind: kind == m.AnyEvent, structure_event)

    # JSON is its own form already; cattrs would look at every value in it, and copy what contains any.
    converter.register_unstructure_hook_func(_is_json, identity)

    # Unstructuring puts `type` first.
    def unstructure(cls: type, **overrides: Any) -> None:
        inner: Callable[[Any], dict[str, Any]] = make_dict_unstructure_fn(cls, converter, **overrides)
        tag = cls.type  # type: ignore[attr-defined]
        converter.register_unstructure_hook(cls, lambda value: {"type": tag, **inner(value)})

    for family in (m.EVENTS, m.CLIENT_FRAMES):
        for cls in family.values():
            unstructure(cls)
    for frame in m.SERVER_FRAMES.values():
        if frame is m.Error:
            # What says nothing is left out; `retryable` is always there.
            optional = [field.name for field in attrs.fields(m.Error) if field.default is None]
            unstructure(frame, **{name: override(omit_if_default=True) for name in optional})
        elif frame is m.Signal:
            unstructure(frame, from_=override(rename="from"))
        else:
            unstructure(frame)
    return converter


_converter = _make_converter()
_structure: dict[type, Callable[[Any, Any], Any]] = {}
_unstructure: dict[type, Callable[[Any], Any]] = {}


def _refuse(code: str, message: str) -> NoReturn:
    raise FrameError(code, message)


# --- reading ---------------------------------------------------------------------------------------------------------


def _depth(value: Any) -> int:
    """Levels of nesting in `value`, found without recursion."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        item, level = todo.pop()
        if type(item) is dict:
            children = item.values()
        elif type(item) is list:
            children = item  # type: ignore[assignment]
        else:
            continue
        deepest = max(deepest, level)
        todo.extend((child, level + 1) for child in children)
    return deepest


def _check_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs) and sum(key == "type" for key, _ in pairs) > 1:
        _refuse("invalid_json", "field 'type': appears twice; expected it once")
    return result


def _check_int(text: str) -> int:
    # The range that orjson reads and writes. It has refused what overflows a double, so these are a few hundred digits.
    number = int(text)
    if not -(2**63) <= number < 2**64:
        _refuse("invalid_json", "an integer does not fit into 64 bits; send it as a string")
    return number


def parse_json(raw: bytes, max_depth: int = MAX_DEPTH) -> Any:
    """Parse one JSON text strictly.

    Raises:
        FrameError: ``invalid_json``: not JSON, not UTF-8, a repeated `type`, an integer beyond 64 bits, or nested
            deeper than `max_depth`.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        _refuse("invalid_json", f"expected one JSON text in UTF-8: {exc}")
    if raw.count(b"{") + raw.count(b"[") > max_depth and _depth(value) > max_depth:
        _refuse("invalid_json", f"expected at most {max_depth} levels of nesting")
    if raw.count(b'"type"') > 1 or b"\\u" in raw or _LONG_NUMBER.search(raw):
        json.loads(raw, object_pairs_hook=_check_pairs, parse_int=_check_int)
    return value


def structure(value: dict[str, Any], cls: type[Any]) -> Any:
    """Make a `cls` of a parsed JSON object.

    Raises:
        FrameError: ``invalid_frame``, naming the first wrong field and what was expected there.
    """
    hook = _structure.get(cls)
    if hook is None:
        hook = _structure[cls] = _converter.get_structure_hook(cls)
    try:
        return hook(value, cls)
    except Exception as exc:
        path, why = _locate(exc)
        request_id = value.get("request_id")
        raise FrameError(
            "invalid_frame",
            f"field {path!r}: {why}" if path else why,
            request_id if type(request_id) is str and 1 <= len(request_id) <= MAX_REQUEST_ID else None,
        ) from None


def _locate(exc: BaseException) -> tuple[str, str]:
    """Path and expectation of the first leaf error in what cattrs raised."""
    path: list[str] = []
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
        notes = getattr(exc, "__notes__", ())
        path += [note.name.rstrip("_") for note in notes if isinstance(note, cattrs.AttributeValidationNote)]
    if isinstance(exc, KeyError):
        name = str(exc.args[0])
        return ".".join([*path[:-1], name] if path and path[-1] == name else [*path, name]), "is required"
    return ".".join(path), str(exc) if isinstance(exc, _Mismatch) else "has a value of the wrong kind"


def read_object(value: Any) -> tuple[str, dict[str, Any]]:
    """Return the ``type`` and the object of a parsed frame.

    Raises:
        FrameError: ``invalid_frame`` if it is no object or has no string ``type``.
    """
    if type(value) is not dict:
        _refuse("invalid_frame", f"expected a JSON object, got {_describe(value)}")
    tag = value.get("type")
    if type(tag) is not str:
        problem = "is required" if "type" not in value else f"expected a string, got {_describe(tag)}"
        _refuse("invalid_frame", f"field 'type': {problem}")
    return tag, value


def _read(value: Any, family: dict[str, type[Any]]) -> Any:
    tag, fields = read_object(value)
    cls = family.get(tag)
    if cls is None:
        shown = tag if len(tag) <= 40 else tag[:40] + "…"
        _refuse("unknown_type", f"field 'type': {shown!r} is not one of {', '.join(sorted(family))}")
    return structure(fields, cls)


def decode_client(raw: bytes) -> list[m.ClientFrame | FrameError]:
    """Decode one text message of a client: its frames in order, each either a message or what is wrong with it.

    A JSON array is a batch; one bad member does not spoil the others.
    """
    return list(iter_client(raw))


def iter_client(raw: bytes) -> Iterator[m.ClientFrame | FrameError]:
    """`decode_client`, one frame at a time: a batch of 1 MiB may hold half a million, and take seconds as a whole."""
    try:
        value = parse_json(raw, MAX_GIVEN_DEPTH)
    except FrameError as exc:
        yield exc
        return
    for item in value if type(value) is list else (value,):
        try:
            frame = _read(item, m.CLIENT_FRAMES)
        except FrameError as exc:
            yield exc
        else:
            yield frame


_FROM_SERVER: dict[str, type[Any]] = {**m.EVENTS, **m.SERVER_FRAMES}


def decode_server(raw: bytes) -> list[m.Event | m.ServerFrame]:
    """Decode one text message of the gateway (what a client does). Frames of unknown types are skipped.

    Raises:
        FrameError: the gateway sent something that is not of this protocol.
    """
    value = parse_json(raw)
    result = []
    for item in value if type(value) is list else (value,):
        tag, fields = read_object(item)
        cls = _FROM_SERVER.get(tag)
        if cls is not None:
            result.append(structure(fields, cls))
    return result


def decode_event(raw: bytes) -> m.Event:
    """Decode one event, as `encode_event` wrote it (a store reads it back with this)."""
    event: m.Event = _read(parse_json(raw), m.EVENTS)
    return event


# --- writing ---------------------------------------------------------------------------------------------------------


def to_builtins(message: Any) -> Any:
    """The message as dicts, lists and scalars."""
    cls = type(message)
    hook = _unstructure.get(cls)
    if hook is None:
        hook = _unstructure[cls] = _converter.get_unstructure_hook(cls)
    return hook(message)


def dump_json(value: Any) -> bytes:
    """JSON of plain values, on one line.

    Raises:
        ValueError: the value has no JSON form (a set, a lone surrogate, nested too deep, an integer beyond 64 bits).
    """
    try:
        return orjson.dumps(value)
    except (TypeError, orjson.JSONEncodeError) as exc:
        raise ValueError(str(exc)) from None


def check_json(value: Any) -> bytes:
    """`dump_json` for a value that will become part of a frame: also bounds its nesting.

    Raises:
        ValueError: as `dump_json`, or the value is nested deeper than a peer would accept.
    """
    encoded = dump_json(value)
    # Measured on what was written: orjson also writes tuples and dataclasses, which `_depth` does not look into.
    if encoded.count(b"{") + encoded.count(b"[") > MAX_GIVEN_DEPTH and _depth(orjson.loads(encoded)) > MAX_GIVEN_DEPTH:
        raise ValueError(f"nested deeper than {MAX_GIVEN_DEPTH} levels")
    return encoded


def encode_frame(message: m.ServerFrame | m.ClientFrame) -> bytes:
    """One frame without a number, as JSON in UTF-8."""
    return orjson.dumps(to_builtins(message))


_DELTA = b'{"type":"delta","seq":%d,"first":%d,"at":%d,"turn_id":%b,"channel":%b,"text":%b}'


def encode_event(event: m.Event, first: int) -> bytes:
    """An event as JSON in UTF-8, with `first` as it is served.

    Deltas are most of what a gateway writes; a format string does them in a third of the time of the general way.
    """
    if type(event) is m.Delta:
        return _DELTA % (
            event.seq,
            first,
            event.at,
            orjson.dumps(event.turn_id),
            orjson.dumps(event.channel),
            orjson.dumps(event.text),
        )
    fields = to_builtins(event)
    fields["first"] = first
    # Copied, because logs keep it: what orjson returns may sit in a block of many times its length.
    return bytes(memoryview(orjson.dumps(fields)))


def encode_snapshot(snapshot: m.Snapshot, transcript: list[bytes], asks: list[bytes]) -> bytes:
    """A snapshot whose events are already encoded; its own `transcript` and `asks` are not looked at."""
    fields = attrs.asdict(snapshot, recurse=False)
    fields["turn"] = None if snapshot.turn is None else attrs.asdict(snapshot.turn)
    fields["queue"] = [attrs.asdict(item) for item in snapshot.queue]
    fields["transcript"] = [orjson.Fragment(item) for item in transcript]
    fields["asks"] = [orjson.Fragment(item) for item in asks]
    return orjson.dumps({"type": "snapshot", **fields})


def structure_all() -> None:
    """Build every hook now rather than at the first frame of each kind (a gateway does it before it listens)."""
    for cls in (*m.CLIENT_FRAMES.values(), *m.EVENTS.values()):
        _structure[cls] = _converter.get_structure_hook(cls)
    for cls in (*m.EVENTS.values(), *m.SERVER_FRAMES.values()):
        _unstructure[cls] = _converter.get_unstructure_hook(cls)
