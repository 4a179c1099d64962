"""Tools that test a gateway, and what you build on it. Public; only `trio-gateway` itself uses them besides you.

Layout::

    strategies        Hypothesis strategies for frames, damage and dialogues (extra `testing`)
    simulate          one seed, one history: the command, plans, replay, minimising
    gateway_machine   a Hypothesis state machine of a whole gateway (extra `testing`)
    core_machine      the same of the sans-I/O core
    world             what both are made of: a gateway, its disk, its clients, and what happens to them
    actors, scripted  the clients, and an agent that does what its messages say
    disk              a store that survives crashes, and fails as told
    model, invariants what must be true of everything that is seen
    stage             trio, driven step by step from synchronous code
    determinism       one seed for trio's scheduler

Nothing is imported here, so that each part costs only what it needs.
"""
