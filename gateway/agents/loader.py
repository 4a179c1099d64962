"""From a name to an agent: ``MODULE:ATTR``, ``NAME=MODULE:ATTR``, ``FILE.py:ATTR``, or a built-in kind.

Everything that can be wrong with a name comes out as one error of one line that says what to do. The operator's own
traceback is of no use here: what failed is said, with file and line where a module raised.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import trio

from gateway.agents.options import check_keywords, make_options, suggest
from gateway.agents.shapes import Agent, as_agent
from gateway.config import AgentConfig
from gateway.errors import AgentLoadError, ConfigError

_NAME = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


def load_agent(spec: str, *, limiter: trio.CapacityLimiter | None = None) -> tuple[str, Agent]:
    """Load what one argument of ``trio-gateway run`` names.

    Args:
        spec: ``[NAME=]MODULE:ATTR``, ``[NAME=]FILE.py:ATTR`` or ``[NAME=]KIND``. Without ``NAME=`` the agent's id is
            the attribute's or the kind's name.
        limiter: see `as_agent`.

    Returns:
        The agent's id and the agent.

    Raises:
        AgentLoadError: `spec` names no agent. ConfigError: a built-in kind needs options.
    """
    name, run = split_spec(spec)
    return name, build_agent(name, AgentConfig(run=run), limiter=limiter)


def split_spec(spec: str) -> tuple[str, str]:
    """Split ``[NAME=]WHAT`` into the agent's id and what it runs, without loading anything.

    Raises:
        AgentLoadError: the id is not one.
    """
    name, equals, run = spec.partition("=")
    if not equals:
        run = spec
        name = run if run in KINDS else run.rpartition(":")[2].rpartition(".")[2]
    if not run or not name:
        raise AgentLoadError(f"{spec!r}: expected MODULE:ATTR or NAME=MODULE:ATTR, for example chat=my_agents:chat")
    if not _NAME.fullmatch(name):
        raise AgentLoadError(
            f"{spec!r}: an agent's name is 1 to 128 of the characters A-Z a-z 0-9 . _ : -, got {name!r}"
        )
    return name, run


def build_agent(name: str, config: AgentConfig, *, limiter: trio.CapacityLimiter | None = None) -> Agent:
    """Make the agent that ``[agents.NAME]`` describes.

    Options go to the built-in kind; to the constructor, if ``run`` names a class; else to the function, as keyword
    arguments with every turn.

    Raises:
        AgentLoadError: what ``run`` names cannot be imported or is no agent. ConfigError: an option is wrong.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"agents.{name}", "a name is 1 to 128 of the characters A-Z a-z 0-9 . _ : -")
    kind = KINDS.get(config.run)
    if kind is not None:
        return as_agent(kind(f"agents.{name}", config.options), name=name, limiter=limiter)
    obj = import_attribute(config.run)
    if not callable(obj):
        what = _article(type(obj).__name__)
        raise AgentLoadError(f"{config.run!r} is {what}, no agent; expected a function, a class or a callable object")
    if config.options:
        obj = _with_options(obj, name, config)
    return as_agent(obj, name=name, limiter=limiter)


def _with_options(obj: Callable[..., Any], name: str, config: AgentConfig) -> object:
    key = f"agents.{name}"
    if not inspect.isclass(obj):
        check_keywords(obj, key, config.options, after=1)
        return functools.partial(obj, **config.options)
    check_keywords(obj, key, config.options, after=0)
    try:
        return obj(**config.options)
    except ConfigError:
        raise
    except Exception as exc:
        raise ConfigError(key, f"{config.run} refused these options: {_describe(exc)}") from None


# --- importing -------------------------------------------------------------------------------------------------------


def import_attribute(spec: str) -> object:
    """Import ``MODULE:ATTR`` or ``FILE.py:ATTR``; `ATTR` may be dotted. Puts the working directory on `sys.path`.

    Raises:
        AgentLoadError: there is no such module, it fails while it is imported, or it has no such attribute.
    """
    where, colon, path = spec.rpartition(":")
    if not colon or not where or not path:
        kinds = ", ".join(sorted(KINDS))
        example = f"{spec}:agent" if spec.endswith(".py") else f"{spec.rstrip(':') or 'my_agents'}:agent"
        raise AgentLoadError(f"{spec!r}: expected MODULE:ATTR, for example {example!r}, or a built-in kind ({kinds})")
    module = _import_file(where) if where.endswith(".py") else _import_module(where)
    obj: Any = module
    for part in path.split("."):
        try:
            obj = getattr(obj, part)
        except AttributeError:
            raise AgentLoadError(f"{spec!r}: {where} has no {part!r}{_candidates(obj, part)}") from None
    return cast("object", obj)


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise AgentLoadError(f"{name!r} is no module name; for a file write its path with .py, as in ./agents.py:chat")
    _add_to_path(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        missing = exc.name or name
        if name == missing or name.startswith(f"{missing}."):
            raise AgentLoadError(
                f"no module named {missing!r} in {os.getcwd()} or the installed packages; "
                "start in the directory that has it, or install it"
            ) from None
        raise AgentLoadError(f"module {name!r} needs {missing!r}, which is not installed") from None
    except (Exception, SystemExit) as exc:
        raise AgentLoadError(f"module {name!r} failed while it was imported: {_describe(exc)}") from None


def _import_file(text: str) -> ModuleType:
    path = Path(text).expanduser().resolve()
    if not path.is_file():
        raise AgentLoadError(f"no file {text!r} in {os.getcwd()}")
    # Its own name, so that a file called like an installed module stands in nobody's way.
    name = f"{path.stem}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    _add_to_path(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a name that ends with .py has a loader
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loaded = False
    try:
        spec.loader.exec_module(module)
        loaded = True
    except ModuleNotFoundError as exc:
        raise AgentLoadError(f"{text!r} needs {exc.name!r}, which is not installed") from None
    except (Exception, SystemExit) as exc:
        raise AgentLoadError(f"{text!r} failed while it was imported: {_describe(exc)}") from None
    finally:
        if not loaded:
            del sys.modules[name]
    return module


def _add_to_path(directory: str) -> None:
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)


def _describe(exc: BaseException) -> str:
    """The exception on one line, with the innermost place that is not the import system's."""
    if isinstance(exc, SyntaxError):
        return f"{exc.msg} ({os.path.basename(exc.filename or '?')}, line {exc.lineno})"
    said = " ".join(str(exc).split())
    frames = [
        frame
        for frame in traceback.extract_tb(exc.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(exc).__name__}{': ' if said else ''}{said}{place}"


def _candidates(obj: object, wanted: str) -> str:
    own = getattr(obj, "__name__", None)
    names = [
        name
        for name, value in vars(obj).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", own) == own
    ] if hasattr(obj, "__dict__") else []  # fmt: skip
    if not names:
        return ""
    return f"; {suggest(wanted, names).replace('it takes', 'it has')}"


def _article(word: str) -> str:
    return f"an {word}" if word[:1].lower() in "aeiou" else f"a {word}"


# --- built-in kinds --------------------------------------------------------------------------------------------------


def _demo(key: str, options: Mapping[str, Any]) -> object:
    from gateway.agents.demo import Demo, DemoOptions

    return Demo(make_options(DemoOptions, key, options))


def _openai(key: str, options: Mapping[str, Any]) -> object:
    from gateway.agents.openai import OpenAI, OpenAIOptions

    return OpenAI(make_options(OpenAIOptions, key, options), key=key)


def _process(key: str, options: Mapping[str, Any]) -> object:
    from gateway.agents.process import Process, ProcessOptions

    return Process(make_options(ProcessOptions, key, options), key=key)


# Imported when used: `openai` needs an extra.
KINDS: dict[str, Callable[[str, Mapping[str, Any]], object]] = {
    "demo": _demo,
    "openai": _openai,
    "process": _process,
}
