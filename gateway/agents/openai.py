"""The kind ``openai``: any server with OpenAI's chat-completions API (OpenAI, vLLM, llama.cpp, Ollama, proxies).

One streamed request per turn. Tokens become deltas, reasoning goes to its own channel, tool calls are shown once they
are complete. What goes wrong upstream ends the turn with one of these codes; what the server said about it goes to the
operator's log only, because it may name keys, hosts and quotas:

======================== ========= ======================================================================
code                     retryable when
======================== ========= ======================================================================
``upstream_auth``        no        401, 403
``upstream_rate_limited`` yes      429; the message has the server's ``Retry-After``. No, if a quota is used up
``upstream_timeout``     yes       no answer, or silence in mid-answer, for `timeout_s`; 408, 504
``upstream_unavailable`` yes       connection refused or lost, also in mid-answer; 5xx
``upstream_error``       no        any other status; something that is not of this API; an error in mid-answer
======================== ========= ======================================================================

This module is the only one that knows httpx2.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog
from attrs import define, field, frozen

from gateway._version import __version__
from gateway.agents import options as opt
from gateway.agents.chat import to_chat
from gateway.agents.sse import EventParser, EventTooLarge, ServerSentEvent
from gateway.errors import AgentLoadError, ConfigError, FrameError, TurnFailed
from gateway.protocol import codec

if TYPE_CHECKING:
    import httpx2

    from gateway.session import Turn

_log = structlog.get_logger(__name__)

DEFAULT_URL = "https://api.openai.com/v1"
DEFAULT_KEY_ENV = "OPENAI_API_KEY"

CONNECT_TIMEOUT_S = 10.0
"""A server that is there accepts sooner; `timeout_s` is for models that think."""

MAX_BODY_BYTES = 1024 * 1024
"""An answer that is not a stream, or an error's body: more is not read."""

MAX_TOOL_BYTES = 256 * 1024
"""Names and arguments of one answer's tool calls: a quarter of ``limits.max_frame_bytes``."""


@frozen(kw_only=True)
class OpenAIOptions:
    """Options of the kind ``openai``.

    Args:
        model: the model's name, as the server knows it.
        base_url: up to and without ``/chat/completions``.
        system: the system prompt.
        api_key_env: the environment variable that holds the key. Without it the request has no key, which only
            OpenAI's own server minds; naming one that is not set is an error.
        temperature, max_tokens: sent only if given.
        timeout_s: seconds of silence after which the server is given up.
        headers: sent with every request.
        max_history: messages of the conversation sent at most, newest kept.
        extra_body: more fields of the request (``top_p``, ``tools``, …).
    """

    model: str = field(validator=opt.text)
    base_url: str = field(default=DEFAULT_URL, validator=opt.text)
    system: str | None = field(default=None, validator=opt.optional_text)
    api_key_env: str = field(default=DEFAULT_KEY_ENV, validator=opt.text)
    temperature: float | None = field(default=None, validator=opt.number(0, 2, whole=False, optional=True))
    max_tokens: int | None = field(default=None, validator=opt.number(1, 10_000_000, optional=True))
    timeout_s: float = field(default=60.0, validator=opt.number(0.01, 86_400, whole=False))
    headers: Mapping[str, str] = field(factory=dict, validator=opt.text_table, repr=False)
    max_history: int = field(default=100, validator=opt.number(1, 100_000))
    extra_body: Mapping[str, Any] = field(factory=dict, validator=opt.table)


class OpenAI:
    """The agent. Stateless: one serves every session.

    Each turn opens its own connection: it is closed with the turn, so cancelling a turn stops the upstream's work, and
    no pool needs an owner. A handshake is small beside a model's first token.

    Raises (when made):
        AgentLoadError: httpx2 is not installed. ConfigError: a URL, key or header cannot be used.
    """

    def __init__(self, options: OpenAIOptions, *, key: str = "openai") -> None:
        try:
            import httpx2
        except ImportError:
            raise AgentLoadError(f"{key}: the kind 'openai' needs httpx2: pip install 'trio-gateway[openai]'") from None
        self._httpx = httpx2
        self._options = options
        self._url = self._check_url(options.base_url, key)
        self._headers = self._make_headers(key)
        # Loading the certificates takes longer than a local model's first token, so once.
        self._tls = httpx2.create_ssl_context()

    def _check_url(self, text: str, key: str) -> httpx2.URL:
        try:
            url = self._httpx.URL(text.rstrip("/").removesuffix("/chat/completions") + "/chat/completions")
        except self._httpx.InvalidURL:
            url = self._httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{key}.base_url", "expected an http or https URL such as http://localhost:8080/v1")
        return url

    def _make_headers(self, key: str) -> dict[str, str]:
        options = self._options
        headers = {
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
            "User-Agent": f"trio-gateway/{__version__}",
        }
        secret = os.environ.get(options.api_key_env, "").strip()
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        elif options.api_key_env != DEFAULT_KEY_ENV or self._url.host == "api.openai.com":
            raise ConfigError(f"{key}.api_key_env", f"the environment variable {options.api_key_env} is not set")
        headers |= options.headers
        for name, value in headers.items():
            if not (name.isascii() and value.isascii() and name.isprintable() and value.isprintable()):
                where = options.api_key_env if name == "Authorization" else f"header {name!r}"
                raise ConfigError(key, f"{where} holds characters that no HTTP header can carry")
        return headers

    async def __call__(self, turn: Turn) -> None:
        answer = _Answer(turn)
        async with self._request(turn) as response:
            if "text/event-stream" in response.headers.get("content-type", "text/event-stream"):
                parser = EventParser()
                async with aclosing(response.aiter_bytes()) as chunks:
                    async for chunk in chunks:
                        for event in parser.feed(chunk):
                            await answer.take(event)
                        if answer.done:
                            break
            else:
                await answer.take_whole(await _read_body(response))
            await answer.finish()

    @asynccontextmanager
    async def _request(self, turn: Turn) -> AsyncIterator[httpx2.Response]:
        """The response of a request for this turn's answer, with a good status; its errors come out as `TurnFailed`."""
        httpx2 = self._httpx
        options = self._options
        body: dict[str, Any] = {
            "model": options.model,
            "messages": to_chat(turn.transcript, system=options.system, max_history=options.max_history),
            "stream": True,
        }
        if options.temperature is not None:
            body["temperature"] = options.temperature
        if options.max_tokens is not None:
            body["max_tokens"] = options.max_tokens
        body |= options.extra_body
        timeout = httpx2.Timeout(options.timeout_s, connect=min(options.timeout_s, CONNECT_TIMEOUT_S))
        try:
            async with httpx2.AsyncClient(headers=self._headers, timeout=timeout, verify=self._tls) as client:
                async with client.stream("POST", self._url, json=body) as response:
                    if response.status_code != 200:
                        raise self._refused(turn, response, await _read_body(response))
                    yield response
        except httpx2.TimeoutException as exc:
            raise self._failed(turn, exc, "upstream_timeout", "the model server did not answer in time", True) from None
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as exc:
            said = "cannot be reached" if isinstance(exc, httpx2.ConnectError) else "closed the connection too early"
            raise self._failed(turn, exc, "upstream_unavailable", f"the model server {said}", True) from None
        except _CutOff as exc:
            message = "the model server closed the connection in the middle of its answer"
            raise self._failed(turn, exc, "upstream_unavailable", message, True) from None
        except httpx2.HTTPError as exc:
            raise self._failed(turn, exc, "upstream_error", "the request to the model server failed", False) from None
        except (_Malformed, EventTooLarge) as exc:
            raise self._failed(turn, exc, "upstream_error", "the model server's answer cannot be read", False) from None
        except _UpstreamSaidError as exc:
            message = "the model server reported an error while it answered"
            raise self._failed(turn, exc, "upstream_error", message, False) from None

    def _failed(self, turn: Turn, exc: Exception, code: str, message: str, retryable: bool) -> TurnFailed:
        self._report(turn, code, f"{type(exc).__name__}: {exc}")
        return TurnFailed(code, message, retryable=retryable)

    def _refused(self, turn: Turn, response: httpx2.Response, body: bytes) -> TurnFailed:
        status = response.status_code
        said = body.decode("utf-8", "replace")
        retryable = False
        if status in (401, 403):
            code, message = "upstream_auth", f"the model server refused the gateway's credentials ({status})"
        elif status == 429:
            code, retryable = "upstream_rate_limited", "insufficient_quota" not in said
            wait = response.headers.get("retry-after", "").strip()
            when = f"in {wait} seconds" if wait.isdecimal() and len(wait) < 7 else "later"
            message = f"the model server is over its rate limit; try again {when}"
            if not retryable:
                message = "the gateway's quota at the model server is used up"
        elif status in (408, 504):
            code, message, retryable = "upstream_timeout", f"the model server did not answer in time ({status})", True
        elif status >= 500:
            code, message, retryable = "upstream_unavailable", f"the model server is not available ({status})", True
        elif status == 404:
            code, message = "upstream_error", "the model server knows no such model or address (404)"
        elif status == 413 or "context_length" in said or "exceed_context" in said:
            code, message = "upstream_error", f"the conversation is too long for the model ({status})"
        else:
            code, message = "upstream_error", f"the model server refused the request ({status})"
        self._report(turn, code, f"{status} {said}")
        return TurnFailed(code, message, retryable=retryable)

    def _report(self, turn: Turn, code: str, detail: str) -> None:
        for name, value in self._headers.items():
            if name not in ("Accept", "Accept-Encoding", "User-Agent"):
                detail = detail.replace(value.removeprefix("Bearer "), "***")
        _log.warning(
            "upstream_failed",
            session_id=turn.session_id,
            turn_id=turn.turn_id,
            host=self._url.netloc.decode("ascii"),
            code=code,
            detail=" ".join(detail[:1000].split()),
        )


class _Malformed(Exception):
    """The server sent something that is not of this API."""


class _CutOff(Exception):
    """The stream ended in good order on the wire, but before the answer did."""


class _UpstreamSaidError(Exception):
    """The server reported an error inside its answer."""


@define(eq=False)
class _Answer:
    """What has come of one answer, and where it goes."""

    turn: Turn
    done: bool = False
    _finish: str | None = None
    _calls: dict[int, dict[str, str]] = field(factory=dict)
    _tool_bytes: int = 0

    async def take(self, event: ServerSentEvent) -> None:
        if event.data.strip() == "[DONE]":
            self.done = True
            return
        chunk = _parse(event.data)
        if event.name == "error" or "error" in chunk:
            raise _UpstreamSaidError(event.data)
        await self._take_choices(chunk, "delta")

    async def take_whole(self, body: bytes) -> None:
        """Take an answer of a server that does not stream."""
        answer = _parse(body.decode("utf-8", "replace"))
        if "error" in answer:
            raise _UpstreamSaidError(str(answer["error"]))
        if not answer.get("choices"):
            raise _Malformed("neither a stream nor choices")
        await self._take_choices(answer, "message")
        self.done = True

    async def _take_choices(self, chunk: dict[str, Any], part: str) -> None:
        for choice in _list(chunk.get("choices")):
            if not isinstance(choice, dict) or choice.get("index", 0) != 0:
                continue
            delta = choice.get(part) or {}
            if not isinstance(delta, dict):
                raise _Malformed(f"{part} is no object")
            if reasoning := _text(delta.get("reasoning_content")) or _text(delta.get("reasoning")):
                await self.turn.reason(reasoning)
            for name in ("content", "refusal"):
                if text := _text(delta.get(name)):
                    await self.turn.send(text)
            for position, call in enumerate(_list(delta.get("tool_calls"))):
                self._take_call(call, position)
            self._finish = _text(choice.get("finish_reason")) or self._finish

    def _take_call(self, call: object, position: int) -> None:
        """Add a piece of a tool call: the first has its id and name, each some of the arguments."""
        if not isinstance(call, dict):
            raise _Malformed("a tool call is no object")
        index = call.get("index", position)
        function = call.get("function") or {}
        if not isinstance(index, int) or not isinstance(function, dict):
            raise _Malformed("a tool call has no index or function")
        known = self._calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
        pieces = {"id": _text(call.get("id")), "name": _text(function.get("name"))}
        for name, piece in pieces.items():
            known[name] = known[name] or piece
        arguments = function.get("arguments")
        known["arguments"] += json.dumps(arguments) if isinstance(arguments, dict) else _text(arguments)
        # Every piece counts, empty ones too: it is also a bound on how many calls there are.
        self._tool_bytes += 64 + sum(map(len, pieces.values())) + len(_text(arguments))
        if self._tool_bytes > MAX_TOOL_BYTES:
            raise _Malformed(f"its tool calls are larger than {MAX_TOOL_BYTES:,} bytes")

    async def finish(self) -> None:
        """Show the tool calls. Raises `_CutOff` if the answer is not complete."""
        if not self.done and self._finish is None:
            raise _CutOff("neither finish_reason nor [DONE]")
        for _, call in sorted(self._calls.items()):
            await self.turn.tool_call(call["name"] or "unnamed", _arguments(call["arguments"]), call["id"] or None)
        if self._finish in ("length", "content_filter"):
            # The text ends early, and the client should know why.
            await self.turn.custom("finish", {"reason": self._finish})


def _parse(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _Malformed(f"expected a JSON object, got {text[:200]!r}")
    return value


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    if not isinstance(value, str):
        return ""
    if value.isascii():
        return value
    # Half a surrogate pair, of an emoji cut in two, has no UTF-8 form.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _arguments(text: str) -> Any:
    """The arguments as JSON if they are; models also write what is none, and then the text is what there is."""
    try:
        return codec.parse_json(text.encode() or b"{}", codec.MAX_GIVEN_DEPTH - 2)
    except FrameError:
        return text


async def _read_body(response: httpx2.Response) -> bytes:
    body = bytearray()
    async with aclosing(response.aiter_bytes()) as chunks:
        async for chunk in chunks:
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                break
    return bytes(body[:MAX_BODY_BYTES])
