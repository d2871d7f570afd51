"""The proxy: forwards calls, captures them, takes rewards, changes weights behind itself.

Read ``forward.py`` first: one call, from the agent's first byte to its last.

==================  ==============================================================================
``app``             puts the parts together; ``serve`` is the process
``forward``         one call on its way through
``attribution``     whose call it is: path, headers, key (no I/O)
``wires``           what each API adds, takes out and records (no I/O)
``sse``             server-sent events, incrementally (no I/O)
``upstream``        connections to the engine; which headers travel
``recorder``        a finished call becomes a committed span
``hold``            calls wait here while weights change
``engine``          the control routes of vLLM: pause, reload, resume, probe
``engine_process``  vLLM as our child
``switch``          promotion and rollback of policy versions
``control``         ``/api/`` and ``/reward``
``auth``            who may do what
``metrics``         ``/metrics``
==================  ==============================================================================

May import ``errors``, ``config`` and ``store``; never the trainer or the runner, and never torch.
"""
