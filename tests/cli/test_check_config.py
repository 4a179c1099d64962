"""``trio-gateway check-config``."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from click.testing import CliRunner, Result

from gateway.cli import main
from gateway.config import Limits


def check(*args: str, **env: str) -> Result:
    return CliRunner().invoke(main, ["check-config", *args], env={"TRIO_GATEWAY_STORE_URL": "memory", **env})


def write(directory: Path, toml: str) -> str:
    file = directory / "gateway.toml"
    file.write_text(toml)
    return str(file)


def test_an_empty_file_is_ok(tmp_path: Path) -> None:
    result = check(write(tmp_path, ""))
    assert (result.exit_code, result.output) == (0, "ok\n")


def test_it_shows_what_is_not_the_default_and_where_it_is_from(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        [limits]
        max_inbox = 12
        max_asks = 16
        [server]
        allowed_origins = ["https://a.org"]
        tokens = {alice = "0123456789abcdef"}
        [agents.helper]
        run = "openai"
        model = "small"
        max_tokens = 100
        api_key = "hidden-key"
        api_key_env = "MY_KEY"
        """,
    )
    result = check(file, TRIO_GATEWAY_LIMITS_MAX_PAYLOAD="2000000")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "ok",
        f"server.allowed_origins = ['https://a.org']  ({file})",
        f"server.tokens = (a secret for each of alice)  ({file})",
        "limits.max_payload = 2_000_000  (TRIO_GATEWAY_LIMITS_MAX_PAYLOAD)",
        f"limits.max_inbox = 12  ({file})",
        f"agents.helper.run = 'openai'  ({file})",
        f"agents.helper.model = 'small'  ({file})",
        f"agents.helper.max_tokens = 100  ({file})",
        f"agents.helper.api_key = (a secret)  ({file})",
        f"agents.helper.api_key_env = 'MY_KEY'  ({file})",
    ]


def test_every_problem_has_a_line(tmp_path: Path) -> None:
    file = write(tmp_path, "[limits]\nmax_inbx = 3\nmax_asks = -1\n[agents.x]\n")
    result = check(file, TRIO_GATEWAY_SERVER_PROT="1")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"trio-gateway: limits.max_inbx: unknown setting; did you mean max_inbox? ({file})",
        f"trio-gateway: limits.max_asks: must be from 1 to 1,024, got -1 ({file})",
        f"trio-gateway: agents.x.run: missing; expected MODULE:ATTR or a built-in kind ({file})",
        "trio-gateway: TRIO_GATEWAY_SERVER_PROT: unknown variable; did you mean TRIO_GATEWAY_SERVER_PORT?",
    ]


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[store]\nurl = 'mysql:x'", "store.url: expected 'memory' or 'sqlite:PATH', got 'mysql:x'"),
        ("[agents.'a b']\nrun = 'a:b'", "an agent's name is 1 to 128"),
    ],
)
def test_what_only_run_would_notice(tmp_path: Path, toml: str, message: str) -> None:
    result = check(write(tmp_path, toml), TRIO_GATEWAY_STORE_URL="")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_explain_lists_every_limit() -> None:
    lines = check("--explain").output.splitlines()
    assert "limits.max_inbox = 256  (1 to 10_000)" in lines
    for field in attrs.fields(Limits):
        assert any(line.startswith(f"limits.{field.name} = ") for line in lines)
        assert f"    {field.metadata['why']}" in lines
