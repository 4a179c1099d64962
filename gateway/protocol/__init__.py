"""The protocol core, sans-I/O: data in, data out. No clock, no randomness, no await; time and ids are arguments.

Read in this order: `messages` (what goes over the wire), `codec` (how it becomes bytes), `log` (what a session
remembers, and how a reader continues), `view` (what its events add up to; snapshots), `handshake` (joining),
`states` (a connection's life), `keys` (idempotency), `cursor` (the client's side), `patch` (RFC 7396).
"""
