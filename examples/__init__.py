"""The experiments: unmodified agents of three frameworks that learn behind the proxy, and live traffic.

``sql/``         three roles in LangGraph, two of them trained
``search/``      the OpenAI Agents SDK with a search tool, questions of two hops
``calculator/``  AutoGen with a calculator
``live/``        no tasks, no groups, no ids: users at work, and thumbs that come late
``model/``       the tiny model that all of them begin with, and how it was made
``full_size/``   the same with real models on GPUs: configurations

In each: ``agent.py``, which imports nothing of lightning-proxy; ``prompts.py``, what it tells the model;
``tasks.py``, seeded tasks in two splits. ``experiment.py`` runs one of them; ``report.py`` draws the curves.
"""
