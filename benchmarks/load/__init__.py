"""The load generator: a process of its own: picows on uvloop (extra ``benchmarks``).

``python -m benchmarks.load`` reads what to do as JSON from stdin and writes what it measured to stdout, or says on
stderr why the run does not count and exits with 1.
"""
