"""The engine: `Session` (busy modes, abort, asks, the turn loop), `Turn` (what an agent sees), `Publisher` (numbers,
storage, visibility), `Older` (what is not in memory), `Registry` (which sessions are in memory), `Sources` (time, ids,
chance)."""

from gateway.session.publisher import Publisher
from gateway.session.reader import Reader
from gateway.session.registry import Registered, Registry
from gateway.session.session import Agent, Session
from gateway.session.sources import Sources
from gateway.session.turn import Turn

__all__ = ["Agent", "Publisher", "Reader", "Registered", "Registry", "Session", "Sources", "Turn"]
