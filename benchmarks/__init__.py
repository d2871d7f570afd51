"""What a captured call costs. ``make bench`` runs ``run``; nothing here asserts on time.

``run``             starts everything, alternates between the serving processes, prints the table
``serving``         the serving processes, and the CPU time that they have used
``load``            the load generator, a process of its own
``bare_forwarder``  the least that aiohttp can do, for comparison
``cuda_update``     the update on a GPU: whether it is the CPU's, time and memory of full-size models
``memory``          counts the memory of vLLM and the update from a model's shape
"""
