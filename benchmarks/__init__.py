"""What a captured call costs. ``make bench`` runs ``run``; nothing here asserts on time.

``run``             starts everything, alternates between the serving processes, prints the table
``serving``         the serving processes, and the CPU time that they have used
``load``            the load generator, a process of its own
``bare_forwarder``  the least that aiohttp can do, for comparison
"""
