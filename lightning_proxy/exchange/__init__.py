"""What was recorded, out into other tools' formats, and what others recorded, in.

Read ``rows.py`` first: the columns that a rollout or a span has outside.

``records``        walks the store in order and in bounded memory, by what one selects
``messages``       requests and answers of all four APIs as one list of messages (no I/O)
``rows``           rollouts and spans as rows of named, typed columns (no I/O)
``jsonl``          rows as JSON lines
``parquet``        rows as Parquet
``conversations``  whole conversations, each once, however many calls it took (no I/O)
``llama_factory``  conversations and preferences for LLaMA-Factory
``dspy``           examples for DSPy
``otel``           rollouts and calls as OpenTelemetry spans, by the GenAI conventions (no I/O)
``otlp``           sends them to a collector
``otel_import``    spans that others traced become ours
``otel_dialects``  the attributes that tracers have for one and the same thing (no I/O)
``formats``        the formats by name
``files``          files that are there whole or not at all

May import ``errors``, ``config``, ``store`` and ``redaction``. pyarrow and OpenTelemetry's protobuf classes
come with the extra ``export`` and are imported only where they are used.
"""
