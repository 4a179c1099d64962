"""Loads `Config`: a TOML file, then the environment, then flags; what comes later wins.

typed-settings lists the options, names their environment variables, reads TOML and merges the sources. Its conversion
is too lenient for a gateway (``true`` for a port, ``"12"`` for a limit) and names neither range nor source, so values
are checked here: first the type, then the validator of the attrs field, each source on its own. A bad value in the
file is thus reported even where a flag overrides it, and everything that is wrong is reported at once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs
from attrs import frozen
from typed_settings.cls_utils import deep_options
from typed_settings.dict_utils import merge_settings, set_path
from typed_settings.exceptions import TsError
from typed_settings.loaders import EnvLoader, TomlFormat
from typed_settings.types import LoadedSettings, LoaderMeta, OptionInfo

from gateway.config import AgentConfig, Config, Limits, Log, Server, Store
from gateway.errors import ConfigError

PREFIX = "TRIO_GATEWAY_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
TOKEN_VARIABLE = f"{PREFIX}TOKEN"

OTHER_VARIABLES = frozenset({CONFIG_VARIABLE, TOKEN_VARIABLE})
"""Variables with the prefix that are no settings: the file to load, and the token that `chat` presents."""

SERVICE_LINKS = re.compile(rf"{PREFIX}(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
"""What Kubernetes puts into every pod when a service is called ``trio-gateway``."""

TABLES: Mapping[str, type] = {cls.TABLE: cls for cls in (Server, Limits, Store, Log)}
OPTIONS: Mapping[str, OptionInfo] = {option.path: option for option in deep_options(Config)}
_SETTABLE = {path: option for path, option in OPTIONS.items() if path != "agents"}
_ENV = EnvLoader(PREFIX)
VARIABLES: Mapping[str, OptionInfo] = {_ENV.get_envvar(option): option for option in _SETTABLE.values()}

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@frozen(kw_only=True)
class Flag:
    """A value given on the command line: the flag's name, the setting's path, the value (a text is converted)."""

    name: str
    path: str
    value: Any


@frozen(kw_only=True)
class Loaded:
    """The settings, and where each one that was set came from: path → file name, variable or flag."""

    config: Config
    sources: Mapping[str, str]


def load(
    file: str | Path | None = None, *, environ: Mapping[str, str] | None = None, flags: Iterable[Flag] = ()
) -> Loaded:
    """Load the settings: `file` < `environ` (by default the process's) < `flags`.

    Raises:
        ExceptionGroup: of `ConfigError`, one for each thing that is wrong, in every source.
    """
    loading = _Loading()
    if file is not None:
        loading.read_file(Path(file))
    loading.read_environment(os.environ if environ is None else environ)
    for flag in flags:
        option = OPTIONS[flag.path]
        value = _from_text(option.cls, flag.value) if isinstance(flag.value, str) else flag.value
        loading.read_value(option, value, flag.name)
    return loading.result()


class _Loading:
    """One run of `load`: what was found so far, lowest precedence first, and what is wrong with it."""

    def __init__(self) -> None:
        self.found: list[LoadedSettings] = []
        self.problems: list[ConfigError] = []

    def problem(self, key: str, message: str, source: str = "") -> None:
        self.problems.append(ConfigError(key, f"{message} ({source})" if source else message))

    @contextmanager
    def collecting(self, source: str = "") -> Iterator[None]:
        """Keep a `ConfigError` of the block, with its source, and go on after the block."""
        try:
            yield
        except ConfigError as exc:
            self.problem(exc.key, str(exc).removeprefix(f"{exc.key}: "), source)

    def read_value(self, option: OptionInfo, value: Any, source: str) -> None:
        with self.collecting(source):
            settings: dict[str, Any] = {}
            set_path(settings, option.path, _checked(option, value))
            self.found.append(LoadedSettings(settings, LoaderMeta(source)))

    def read_file(self, file: Path) -> None:
        source = str(file)
        try:
            tables = TomlFormat(None)(file, Config, tuple(OPTIONS.values()))
        except (TsError, OSError, UnicodeDecodeError, RecursionError) as exc:
            cause = exc.__cause__ or exc
            if isinstance(cause, OSError):
                self.problem("", f"{file}: cannot be read: {cause.strerror or cause}")
            else:
                self.problem("", f"{file}: not valid TOML: {cause}")
            return
        for name, content in tables.items():
            if name == "agents":
                self.read_agents(content, source)
            elif name not in TABLES:
                known = {**{table: f"[{table}]" for table in (*TABLES, "agents")}, **_homes()}
                kind = "table" if isinstance(content, dict) else "setting"
                self.problem(name, f"unknown {kind}{_hint(name, known)}", source)
            elif not isinstance(content, dict):
                self.problem(name, f"expected a table [{name}], got {content!r}", source)
            else:
                self.read_table(name, content, source)

    def read_table(self, table: str, content: Mapping[str, Any], source: str) -> None:
        for name, value in content.items():
            path = f"{table}.{name}"
            if path in _SETTABLE:
                self.read_value(_SETTABLE[path], value, source)
            else:
                homes = _homes()
                own = {option.name: option.name for option in _options_of(table)}
                hint = _hint(name, {name: homes[name]} if name in homes else own) or _hint(name, homes)
                self.problem(path, f"unknown setting{hint}", source)

    def read_agents(self, content: Any, source: str) -> None:
        if not isinstance(content, dict):
            self.problem("agents", f"expected tables [agents.NAME], got {content!r}", source)
            return
        agents: dict[str, AgentConfig] = {}
        for name, table in content.items():
            with self.collecting(source):
                agents[name] = _agent(name, table)
        self.found.append(LoadedSettings({"agents": agents}, LoaderMeta(source)))

    def read_environment(self, environ: Mapping[str, str]) -> None:
        for name, text in sorted(environ.items()):
            if not name.startswith(PREFIX) or name in OTHER_VARIABLES:
                continue
            if option := VARIABLES.get(name):
                # An empty variable is what `${UNSET:-}` leaves behind: the same as none.
                if text:
                    self.read_value(option, _from_text(option.cls, text), name)
            elif name.startswith(f"{PREFIX}AGENTS"):
                self.problem(name, "agents are set in the file ([agents.NAME]) or on the command line")
            elif not _is_service_link(name, text):
                known = {**{variable: variable for variable in VARIABLES}, CONFIG_VARIABLE: CONFIG_VARIABLE}
                self.problem(name, f"unknown variable{_hint(name, known, cutoff=0.8)}")

    def result(self) -> Loaded:
        merged = merge_settings(tuple(OPTIONS.values()), self.found)
        tables: dict[str, dict[str, Any]] = {name: {} for name in TABLES}
        for path, (value, _) in merged.items():
            table, _, name = path.partition(".")
            if table in tables:
                tables[table][name] = value
        built: dict[str, Any] = {}
        wrong = {problem.key.partition(".")[0] for problem in self.problems}
        for name, values in tables.items():
            # For the checks across fields, which mean something only where each field is right.
            if name not in wrong:
                with self.collecting():
                    built[name] = TABLES[name](**values)
        if self.problems:
            raise ExceptionGroup("the settings are wrong", self.problems)
        agents = merged["agents"][0] if "agents" in merged else {}
        sources = {path: meta.name for path, (_, meta) in merged.items()}
        return Loaded(config=Config(**built, agents=agents), sources=sources)


def _checked(option: OptionInfo, value: Any) -> Any:
    """`value` as the option's type, in range. Strict: no conversion but list → tuple."""
    path, kind = option.path, option.cls
    origin = get_origin(kind)
    if kind is str and not isinstance(value, str):
        raise ConfigError(path, f"expected a text, got {value!r}")
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(path, f"expected true or false, got {value!r}")
    if origin is Literal and value not in get_args(kind):
        raise ConfigError(path, f"expected one of {', '.join(get_args(kind))}, got {value!r}")
    if origin is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(path, f"expected a list of texts, got {value!r}")
        value = tuple(value)
    if origin is Mapping and not (isinstance(value, dict) and all(isinstance(item, str) for item in value.values())):
        # The value is not shown: it holds secrets.
        raise ConfigError(path, "expected a table of texts: NAME = TEXT (in the environment NAME=TEXT,NAME=TEXT)")
    table = TABLES[path.partition(".")[0]]
    field = attrs.fields_dict(table)[option.name]
    if field.validator is not None:
        # Validators look at the value and at the class's TABLE, so the class stands in for an instance.
        field.validator(table, field, value)
    return value


def _agent(name: str, table: Any) -> AgentConfig:
    """``[agents.NAME]``. Options are open, each kind has its own, so only a near miss of our own names is refused."""
    path = f"agents.{name}"
    if not isinstance(table, dict):
        raise ConfigError(path, f"expected a table [agents.{name}] with `run`, got {table!r}")
    own = ("run", *(field.name for field in attrs.fields(AgentConfig) if field.name not in ("run", "options")))
    options = {key: value for key, value in table.items() if key not in own}
    for key in options:
        if hint := _hint(key, {known: known for known in own}, cutoff=0.85):
            raise ConfigError(f"{path}.{key}", f"unknown setting{hint}")
    if "run" not in table:
        raise ConfigError(f"{path}.run", "missing; expected MODULE:ATTR or a built-in kind")
    try:
        return AgentConfig(**{key: table[key] for key in own if key in table}, options=options)
    except ConfigError as exc:
        name_of_field = exc.key.rpartition(".")[2]
        raise ConfigError(f"{path}.{name_of_field}", str(exc).removeprefix(f"{exc.key}: ")) from None


def _from_text(kind: Any, text: str) -> Any:
    """A variable's text as a value of `kind`; what does not convert stays a text, which `_checked` then refuses."""
    origin = get_origin(kind)
    if kind is int:
        try:
            return int(text)
        except ValueError:
            return text
    if kind is bool:
        return _WORDS.get(text.lower(), text)
    if origin is tuple:
        return [part.strip() for part in text.split(",") if part.strip()]
    if origin is Mapping:
        pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
        return {name: value for name, _, value in pairs} if all(equals for _, equals, _ in pairs) else text
    return text


def _is_service_link(name: str, text: str) -> bool:
    """Whether Kubernetes set it. A typo of ``TRIO_GATEWAY_SERVER_PORT`` looks similar but is no URL."""
    return SERVICE_LINKS.fullmatch(name) is not None and (name != f"{PREFIX}PORT" or "://" in text)


def _options_of(table: str) -> list[OptionInfo]:
    return [option for path, option in _SETTABLE.items() if path.startswith(f"{table}.")]


def _homes() -> dict[str, str]:
    """Every setting by its bare name, for what was written into the wrong table or none."""
    return {option.name: path for path, option in _SETTABLE.items()}


def _hint(name: str, known: Mapping[str, str], *, cutoff: float = 0.6) -> str:
    """``; did you mean X?`` for the nearest of the names in `known`, shown as its value; empty if none is near."""
    folded = {key.lower(): shown for key, shown in known.items()}
    near = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=cutoff)
    return f"; did you mean {folded[near[0]]}?" if near else ""
