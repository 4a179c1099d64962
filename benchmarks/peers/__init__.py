"""Bare servers that do the workloads' work and nothing else: no session, no numbers of a log, no limits, no resume.

They all speak the dialect of `benchmarks.load.clients.Client`: ``hello`` → ``hello_ok``; ``ask`` → `count` times
``delta``, then ``end``; ``ping`` → ``pong``; ``go`` → `count` times ``delta`` to everyone. Compression is off.

An ``ask`` has an ``interval_ms``: with null, the producer goes on at once; with 0, it lets every other task run between
two deltas, as one does that gets its tokens from elsewhere; with more, it waits for the clock.
"""
