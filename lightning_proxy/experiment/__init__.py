"""An agent, a model and tasks: the loop that lets the one learn from the other, on one machine.

``loop``        serve, sample, reward, train, swap, again (read this first)
``definition``  what an experiment is: agent, model, tasks, how much of each
``workdir``     the directory of one: a copy of the model, a configuration, the proxy that serves them
``sample``      the driver: rollouts registered, each run as a process of its own
``agent_host``  the warm process that forks for each run
``grade``       the grader: posts rewards afterwards, from its own process
``curve``       what comes of it: numbers and the picture
``processes``   child processes that are never left behind
``tiny_model``  makes models small enough for it; nothing here imports it

``demo`` is one experiment, ``examples/`` has others. May import errors, config and client; what it does, it
does by HTTP, processes and files. torch is imported in ``tiny_model`` alone.
"""
