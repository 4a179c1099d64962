"""What the gateway costs, measured beside its peers: ``python -m benchmarks``.

Three kinds of processes:

- this one installs what is missing, starts the others, and writes the report;
- a server (`systems`), pinned to the first core: the gateway as ``trio-gateway run``, or one of `peers`, most of which
  have an environment of their own (`environments`);
- the load generator (`load`), pinned to the second core: picows on uvloop, which checks every byte that it counts.

`workloads` says what is measured and what the targets are, `report` makes tables of it.

Only the standard library may be imported here and in `texts`: every environment uses them.
"""
