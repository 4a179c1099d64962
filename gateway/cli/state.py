"""Where `run` keeps sessions when nobody says where: an SQLite file in the platform's state directory.

The library's default is memory, because a program that embeds a gateway decides what it leaves on the disk. A command
that was started without a word about it must not lose what it said it had accepted.
"""

from __future__ import annotations

from pathlib import Path

import attrs
from platformdirs import user_state_path

from gateway.cli.settings import Loaded
from gateway.errors import ConfigError

SOURCE = "the default of `trio-gateway run`"
ADVICE = "say where to keep sessions: --store sqlite:PATH, or --store memory"


def default_file() -> Path:
    """The file, which need not exist.

    Raises:
        ConfigError: this user has no home directory.
    """
    file = user_state_path("trio-gateway") / "sessions.db"
    if not file.is_absolute():
        raise ConfigError("store.url", f"there is no home directory for {file}; {ADVICE}")
    return file


def with_default_store(loaded: Loaded) -> Loaded:
    """The settings as `run` uses them: with the default file where no source names a store. Touches no file."""
    if "store.url" in loaded.sources:
        return loaded
    store = attrs.evolve(loaded.config.store, url=f"sqlite:{default_file()}")
    return attrs.evolve(
        loaded,
        config=attrs.evolve(loaded.config, store=store),
        sources={**loaded.sources, "store.url": SOURCE},
    )


def make_folder(loaded: Loaded) -> None:
    """Create the default file's directory, for its owner only, if that is where sessions go.

    Raises:
        ConfigError: it cannot be created.
    """
    if loaded.sources.get("store.url") != SOURCE:
        return
    folder = default_file().parent
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise ConfigError("store.url", f"{folder}: cannot be created: {exc.strerror or exc}; {ADVICE}") from exc
