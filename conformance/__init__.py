"""Real, unmodified agents, run through a real proxy and judged.

================  ==============================================================================
``clients``       the table of clients: what to install, what to run, what to expect
``replies``       what the model says, by what it is asked
``environments``  an environment for each client, made once under ``.conformance/``
``judge``         one client: straight to the engine, then through the proxy, then compared
``report``        ``results.json``, and docs/conformance.md made from it
``agents/``       the agents. They import nothing of ours and know nothing of a proxy
================  ==============================================================================

``python -m conformance`` runs all of it. An agent is a program that takes tasks as arguments, carries
them out concurrently in one process, and prints a JSON line for each: ``{"line": "amber", "called":
["amber-0", "amber-1"], "answer": "The terminus is amber-2."}``. ``amber:stream`` asks for streaming.
"""
