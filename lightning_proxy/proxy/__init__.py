"""The proxy: forwards calls, captures them, takes rewards, changes weights behind itself.

Read ``forward.py`` first: one call, from the agent's first byte to its last.

==================  ==============================================================================
``app``             puts the parts together; ``serve`` is the process
``forward``         one call on its way through
``websocket``       upgrades: relayed byte for byte, or refused so that agents go on over HTTP
``keys``            whose call it is: all the ways, in their order
``attribution``     what the path and the headers say of it (no I/O)
``native_ids``      what agents' own ids say of it (no I/O)
``lineage``         what the conversation says of it (no I/O); ``conversation`` is its normal form,
                    ``prompts`` and ``passages`` are for what does not come in messages
``roles``           which of several agents it is, by system prompt and tools (no I/O)
``exploration``     which rollouts are sampled at a temperature of ours (no I/O)
``wires``           what each API adds, takes out and records (no I/O)
``sse``             server-sent events, incrementally (no I/O)
``encoding``        compressed bodies, taken apart for the record (no I/O)
``encoded``         an answer that came compressed (no I/O)
``redaction``       keys that came with a request, kept out of the record (no I/O)
``upstreams``       which endpoint takes a call, and what its wire must know of it
``upstream``        connections to one endpoint; which headers travel
``providers``       endpoints that litellm makes speak the OpenAI API
``failures``        which class of failure a call ended in (no I/O)
``findings``        what is wrong in calls that ended well (no I/O): ``tool_schemas``, ``tool_results``,
                    ``loops``
``sweep``           rollouts that died in silence
``recorder``        a finished call becomes a committed span
``hold``            calls wait here while weights change
``engine``          the control routes of vLLM: pause, reload, resume, probe
``responses_probe`` how the engine repeats a request in its Responses
``engine_process``  vLLM as our child
``switch``          promotion and rollback of a policy's versions
``served``          the policies that are served here, each with its engine, gate and switch
``reader``          questions to the store
``control``         ``/api/`` and ``/reward``
``auth``            who may do what
``problem``         errors of our own, in OpenAI's shape
``metrics``         ``/metrics``
==================  ==============================================================================

May import ``errors``, ``config``, ``store`` and ``redaction``; never the trainer or the runner, and
never torch.
"""
