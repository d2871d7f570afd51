"""The demo: a tiny model learns text-to-SQL behind the proxy, on this machine, in minutes.

``text_to_sql`` the experiment (read this first); ``lightning_proxy.experiment`` runs it
``agent``       the agent, an ordinary script that knows nothing of us
``tasks``       seeded tasks: table, question, gold query; training and held-out
``model``       made ``weights/``, the warm-started model that is shipped; nothing here imports it

May import experiment.
"""
