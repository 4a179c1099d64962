"""Loading settings: three sources, strict, everything that is wrong at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli.settings import OPTIONS, VARIABLES, Flag, Loaded, load
from gateway.config import AgentConfig, Config, Limits
from gateway.errors import ConfigError

SECRET = "0123456789abcdef"
LIMITS = {field.name: field for field in attrs.fields(Limits)}


def write(directory: Path, toml: str) -> Path:
    file = directory / "gateway.toml"
    file.write_text(toml, encoding="utf-8")
    return file


def problems(
    file: Path | None = None, environ: dict[str, str] | None = None, flags: list[Flag] | None = None
) -> list[str]:
    with pytest.raises(ExceptionGroup) as caught:
        load(file, environ=environ or {}, flags=flags or [])
    assert all(isinstance(exc, ConfigError) for exc in caught.value.exceptions)
    return [str(exc) for exc in caught.value.exceptions]


def env(**variables: str) -> Loaded:
    return load(environ={f"TRIO_GATEWAY_{name}": value for name, value in variables.items()})


# --- sources ---------------------------------------------------------------------------------------------------------


def test_nothing_given_is_the_default() -> None:
    loaded = load(environ={"PATH": "/bin", "TRIO_GATEWAYS": "no prefix of ours"})
    assert loaded.config == Config()
    assert loaded.sources == {}


def test_later_sources_win(tmp_path: Path) -> None:
    file = write(tmp_path, "[limits]\nmax_inbox = 1\nmax_asks = 1\nmax_channels = 1\n[store]\nurl = 'sqlite:a'")
    loaded = load(
        file,
        environ={"TRIO_GATEWAY_LIMITS_MAX_INBOX": "2", "TRIO_GATEWAY_LIMITS_MAX_ASKS": "2"},
        flags=[Flag(name="--asks", path="limits.max_asks", value="3")],
    )
    limits = loaded.config.limits
    assert (limits.max_channels, limits.max_inbox, limits.max_asks) == (1, 2, 3)
    assert loaded.config.store.url == "sqlite:a"
    assert loaded.sources["limits.max_channels"] == str(file)
    assert loaded.sources["limits.max_inbox"] == "TRIO_GATEWAY_LIMITS_MAX_INBOX"
    assert loaded.sources["limits.max_asks"] == "--asks"


def test_every_setting_but_agents_has_a_variable() -> None:
    assert {option.path for option in VARIABLES.values()} == set(OPTIONS) - {"agents"}
    assert VARIABLES["TRIO_GATEWAY_SERVER_HTTP_PORT"].path == "server.http_port"


@pytest.mark.parametrize(
    ("variable", "text", "path", "value"),
    [
        ("SERVER_PORT", "0", "server.port", 0),
        ("SERVER_PORT", " 1_000 ", "server.port", 1000),
        ("SERVER_HTTP", "off", "server.http", False),
        ("SERVER_HTTP", "True", "server.http", True),
        ("SERVER_HOST", "::1", "server.host", "::1"),
        ("SERVER_ALLOWED_ORIGINS", "http://a, http://b,", "server.allowed_origins", ("http://a", "http://b")),
        ("SERVER_TOKENS", f"al={SECRET}=,bo={SECRET}", "server.tokens", {"al": f"{SECRET}=", "bo": SECRET}),
        ("LOG_LEVEL", "debug", "log.level", "debug"),
        ("STORE_URL", "sqlite:/x", "store.url", "sqlite:/x"),
        ("STORE_URL", "", "store.url", "memory"),
        ("LIMITS_MAX_INBOX", "", "limits.max_inbox", 256),
    ],
)  # fmt: skip
def test_texts_of_the_environment_are_converted(variable: str, text: str, path: str, value: object) -> None:
    table, _, name = path.partition(".")
    assert getattr(getattr(env(**{variable: text}).config, table), name) == value


def test_agents_take_any_option(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [agents.helper]
        run = "openai"
        max_detached_ms = 0
        base_url = "http://127.0.0.1/v1"
        stop = ["a", "b"]
        [agents."a.b"]
        run = "my_module:agent"
        """,
    )
    helper = AgentConfig(
        run="openai", max_detached_ms=0, options={"base_url": "http://127.0.0.1/v1", "stop": ["a", "b"]}
    )
    assert load(file, environ={}).config.agents == {"helper": helper, "a.b": AgentConfig(run="my_module:agent")}


# --- what is refused -------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, str]] = [
    # unknown names
    ("max_inbox = 3", "max_inbox: unknown setting; did you mean limits.max_inbox?"),
    ("[limit]\nmax_inbox = 3", "limit: unknown table; did you mean [limits]?"),
    ("[agent.x]\nrun = 'a:b'", "agent: unknown table; did you mean [agents]?"),
    ("[zzzz]", "zzzz: unknown table"),
    ("[limits]\nmax_inbx = 3", "limits.max_inbx: unknown setting; did you mean max_inbox?"),
    ("[limits]\nmax-inbox = 3", "limits.max-inbox: unknown setting; did you mean max_inbox?"),
    ("[limits]\nMAX_INBOX = 3", "limits.MAX_INBOX: unknown setting; did you mean max_inbox?"),
    ("[limits]\nslow_grace = 3", "limits.slow_grace: unknown setting; did you mean slow_grace_ms?"),
    ("[limits]\nhttp_port = 3", "limits.http_port: unknown setting; did you mean server.http_port?"),
    ("[limits]\nqqqq = 3", "limits.qqqq: unknown setting"),
    ("[limits]\nmax_inbox = {x = 1}", "limits.max_inbox: expected an integer from 1 to 10,000, got {'x': 1}"),
    # shapes and types
    ("limits = 3", "limits: expected a table [limits], got 3"),
    ("[[limits]]", "limits: expected a table [limits], got [{}]"),
    ("[limits]\nmax_inbox = true", "limits.max_inbox: expected an integer from 1 to 10,000, got True"),
    ("[limits]\nmax_inbox = '12'", "limits.max_inbox: expected an integer from 1 to 10,000, got '12'"),
    ("[limits]\nmax_inbox = 12.0", "limits.max_inbox: expected an integer from 1 to 10,000, got 12.0"),
    ("[limits]\nmax_inbox = nan", "limits.max_inbox: expected an integer from 1 to 10,000, got nan"),
    ("[limits]\nmax_inbox = 1979-05-27", "limits.max_inbox: expected an integer from 1 to 10,000"),
    ("[server]\nhttp = 1", "server.http: expected true or false, got 1"),
    ("[server]\nhost = 3", "server.host: expected a text, got 3"),
    ("[server]\nhost = ' '", "server.host: expected a text that is not empty, got ' '"),
    ("[server]\nallowed_origins = 'x'", "server.allowed_origins: expected a list of texts, got 'x'"),
    ("[server]\nallowed_origins = [1]", "server.allowed_origins: expected a list of texts, got [1]"),
    ("[server]\ntokens = ['secret-of-someone']", "server.tokens: expected a table of texts"),
    ("[server.tokens]\nal = 1", "server.tokens: expected a table of texts"),
    ("[log]\nlevel = 'loud'", "log.level: expected one of debug, info, warning, error, got 'loud'"),
    ("[log]\nformat = ['json']", "log.format: expected one of console, json, got ['json']"),
    # ranges
    ("[limits]\nmax_inbox = 0", "limits.max_inbox: must be from 1 to 10,000, got 0"),
    ("[limits]\nmax_inbox = -5", "limits.max_inbox: must be from 1 to 10,000, got -5"),
    ("[server]\nport = 65536", "server.port: must be from 0 to 65,535, got 65,536"),
    ("[server]\npath = 'ws'", "server.path: expected a path that starts with '/', got 'ws'"),
    ("[server.tokens]\nal = 'short'", "server.tokens.al: expected a secret of at least 16 characters"),
    ("[limits]\nmax_frame_bytes = 262144\nsegment_bytes = 1048576", "limits.max_frame_bytes: must be at least"),
    ("[limits]\nmax_inbox = 1490", "limits.max_inbox: must be at most max_frame_bytes / 704 = 1,489, got 1,490"),
    # agents
    ("agents = 3", "agents: expected tables [agents.NAME], got 3"),
    ("[agents]\nx = 'a:b'", "agents.x: expected a table [agents.x] with `run`, got 'a:b'"),
    ("[agents.x]", "agents.x.run: missing; expected MODULE:ATTR or a built-in kind"),
    ("[agents.x]\nrun = 3", "agents.x.run: expected a text that is not empty, got 3"),
    ("[agents.x]\nrun = 'a:b'\nmax_detached_ms = -1", "agents.x.max_detached_ms: must be from 0 to 604,800,000, got"),
    ("[agents.x]\nrun = 'a:b'\nmax_detatched_ms = 1", "agents.x.max_detatched_ms: unknown setting; did you mean max_d"),
]  # fmt: skip


@pytest.mark.parametrize(("toml", "message"), WRONG)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, toml: str, message: str) -> None:
    file = write(tmp_path, toml)
    [problem] = problems(file)
    assert problem.startswith(message)
    if "must be at " not in message:  # a check across fields has no one place
        assert problem.endswith(f"({file})")


def test_all_problems_of_all_sources_come_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path, "\n".join(["typo = 1", "[limits]", "max_inbox = -1", "max_asks = true", "[log]", "level = 'x'"])
    )
    found = problems(
        file,
        # It overrides the file's, which is wrong all the same.
        {"TRIO_GATEWAY_LIMITS_MAX_INBOX": "9", "TRIO_GATEWAY_SERVER_PORT": "http", "TRIO_GATEWAY_LOG_LEVELS": "x"},
        [Flag(name="--port", path="server.port", value="-1")],
    )
    assert [problem.partition(":")[0] for problem in found] == [
        "typo", "limits.max_inbox", "limits.max_asks", "log.level", "TRIO_GATEWAY_LOG_LEVELS", "server.port",
        "server.port",
    ]  # fmt: skip
    assert found[-1].endswith("(--port)")
    assert found[-2].endswith("got 'http' (TRIO_GATEWAY_SERVER_PORT)")


def test_secrets_are_not_in_messages(tmp_path: Path) -> None:
    secret = "s3cr3t"
    assert secret not in problems(write(tmp_path, f"[server.tokens]\nal = '{secret}'"))[0]
    assert secret not in problems(write(tmp_path, f"[server]\ntokens = '{secret}'"))[0]
    assert secret not in problems(environ={"TRIO_GATEWAY_SERVER_TOKENS": secret})[0]
    assert secret not in repr(env(SERVER_TOKENS=f"al={secret}{secret}{secret}"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[limits]\nmax_inbox = \n", "not valid TOML: Invalid value (at line 2, column 13)"),
        (b"[limits]\n[limits]\n", "not valid TOML: Cannot declare ('limits',) twice (at line 2, column 8)"),
        (b"\xff\xfe", "not valid TOML: 'utf-8' codec can't decode"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_files_that_are_no_toml(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "gateway.conf"
    if content is not None:
        file.write_bytes(content)
    [problem] = problems(file)
    assert problem.startswith(f"{file}: {message}")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("TRIO_GATEWAY_LIMITS_MAX_INBX", "; did you mean TRIO_GATEWAY_LIMITS_MAX_INBOX?"),
        ("TRIO_GATEWAY_STORE", "; did you mean TRIO_GATEWAY_STORE_URL?"),
        ("TRIO_GATEWAY_CONFG", "; did you mean TRIO_GATEWAY_CONFIG?"),
        ("TRIO_GATEWAY_QQQQQQQQQQQQQQQQ", ""),
    ],
)
def test_unknown_variables_are_refused(variable: str, hint: str) -> None:
    assert problems(environ={variable: "1"}) == [f"{variable}: unknown variable{hint}"]


def test_agents_cannot_come_from_the_environment() -> None:
    [problem] = problems(environ={"TRIO_GATEWAY_AGENTS_X_RUN": "a:b"})
    assert problem.startswith("TRIO_GATEWAY_AGENTS_X_RUN: agents are set in the file")


def test_what_an_orchestrator_adds_is_no_typo() -> None:
    # A Kubernetes service of the name trio-gateway puts these into every pod of its namespace.
    loaded = env(
        SERVICE_HOST="10.0.0.1", SERVICE_PORT="8765", SERVICE_PORT_WS="8765", PORT="tcp://10.0.0.1:8765",
        PORT_8765_TCP="tcp://10.0.0.1:8765", PORT_8765_TCP_PROTO="tcp", PORT_8765_TCP_PORT="8765",
        PORT_8765_TCP_ADDR="10.0.0.1",
    )  # fmt: skip
    assert loaded.config == Config()
    [problem] = problems(environ={"TRIO_GATEWAY_PORT": "8765"})
    assert problem.endswith("did you mean TRIO_GATEWAY_SERVER_PORT?")


# --- every limit -----------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(LIMITS)), st.data())
def test_a_limit_out_of_range_is_refused_by_its_key(name: str, data: st.DataObject) -> None:
    low, high = LIMITS[name].metadata["low"], LIMITS[name].metadata["high"]
    value = data.draw(st.integers(max_value=low - 1) | st.integers(min_value=high + 1))
    for problem in (
        problems(environ={f"TRIO_GATEWAY_LIMITS_{name.upper()}": str(value)}),
        problems(flags=[Flag(name="--x", path=f"limits.{name}", value=value)]),
    ):
        assert len(problem) == 1
        assert problem[0].startswith(f"limits.{name}: must be from {low:,} to {high:,}, got {value:,} ")


@given(st.sampled_from(sorted(LIMITS)), st.data())
def test_a_limit_in_range_is_taken(name: str, data: st.DataObject) -> None:
    low, high = LIMITS[name].metadata["low"], LIMITS[name].metadata["high"]
    value = data.draw(st.integers(low, high))
    # The one check across limits must be satisfied as well.
    others = {
        "MAX_FRAME_BYTES": "67108864",
        "SEGMENT_BYTES": "256",
        "MAX_STATE_BYTES": "1024",
        name.upper(): str(value),
    }
    loaded = env(**{f"LIMITS_{other}": text for other, text in others.items()})
    assert getattr(loaded.config.limits, name) == value


@given(
    st.sampled_from(sorted(LIMITS)),
    st.booleans() | st.none() | st.floats() | st.text() | st.lists(st.integers()) | st.binary(),
)
def test_a_limit_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^limits\.{name}: expected an integer from "):
        Limits(**{name: value})


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_every_limit_says_why(name: str) -> None:
    assert {"low", "high", "why"} <= set(LIMITS[name].metadata)
    assert LIMITS[name].metadata["low"] <= LIMITS[name].default <= LIMITS[name].metadata["high"]
