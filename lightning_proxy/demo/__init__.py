"""The demo: a tiny model learns text-to-SQL behind the proxy, on this machine, in minutes.

``loop``        runs an experiment: serve, sample, reward, train, swap, again (read this first)
``text_to_sql`` the demo's experiment; ``examples/`` has others
``curve``       what comes of one: numbers and the picture
``agent``       the agent, an ordinary script that knows nothing of us
``tasks``       seeded tasks: table, question, gold query; training and held-out
``sample``      the driver: rollouts registered, each run as a process of its own
``agent_host``  the warm process that forks for each run
``grade``       the grader: posts rewards afterwards, from its own process
``processes``   child processes that are never left behind
``model``       made ``weights/``, the warm-started model that is shipped; nothing here imports it

May import errors, config and store, and uses only HTTP, processes and files. torch is imported in
``model`` alone.
"""
