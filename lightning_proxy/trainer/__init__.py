"""The trainer: from recorded rollouts to a published policy version, in one pass made for cron.

Read ``run.train_once`` first: its body is the summary; ``steps`` are its steps, ``lease`` what keeps
a run alive and gives back on failure, ``warm`` the update engine between passes. Then along the way
the data goes:

``algorithms/``   what a pass learns by: RL, SFT or DPO, each with the steps that are its own
``automatic``     rewards from the traffic itself, and by the user's function (``judged``)
``grouped``       all that comes before the update engine: its top function is the summary of what follows
``transitions``   a recorded rollout -> one transition per generation; what is left out, counted
``ages``          how many updates lie between the version that answered and the present one
``failures``      what failures do: rollouts dropped, calls masked, scaled or penalised
``groups``        which rollouts are compared with one another (GRPO's group); ``prompts``: by a prompt's text
``credit``        what each transition is credited with of its rollout's return
``advantages``    credit relative to the group, once per rollout or per step
``advice``        what to say where there is nothing to learn from
``trajectories``  transitions that extend one another, merged into one row by their token ids
``drift``         how prompts go on from what was generated before, counted
``sampling``      what a response was really sampled from
``batches``       rows as packed arrays; weights; mini-batches and micro-batches
``backend/``      the update itself: the only place that imports verl, torch and ray
``guard``         refuses an update that must not be published
``checkpoint``    what lies on disk, and whether an engine may be pointed at it
``publish``       writes, validates and promotes a version; clears away old ones
``report``        what a pass did, as a record

Everything outside ``backend/`` is NumPy and the standard library. This room imports the store,
the settings and the errors, never the proxy or the runner: those are met over HTTP and in the store.
"""
