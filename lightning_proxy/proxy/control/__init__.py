"""Our own routes, one file each kind.

``rewards``   ``POST /reward``
``rollouts``  ``/api/rollouts``, ``/api/spans``
``tasks``     ``/api/tasks``, claims, heartbeats and ends of attempts
``policies``  ``/api/policies``, ``/api/runs``
``state``     ``/api/stats``, ``/healthz``, ``/readyz``, ``/metrics``
``access``    their ways to the store
``requests``  reading what was sent, answering, and the status with which an error leaves the house

A file has a class with ``routes()``; ``app.py`` puts them together.
"""
