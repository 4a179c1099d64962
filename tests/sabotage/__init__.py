"""Sabotage: each property is taken away on purpose, one mechanism at a time, and the tests named for it must fail.

`python -m tests.sabotage` runs all of it; `mutations` is the table, `runner` what applies it. Nothing here touches the
checkout: every mutation is made in a scratch copy.
"""
