"""Every error this package raises on purpose, as one tree.

LightningError
├── ConfigError            a setting is unknown, malformed or contradicts another
├── RequestError           what a client sent cannot be done; carries the HTTP status
│   ├── InvalidInput       400: malformed or out of range
│   ├── UnknownTarget      404: names something that is not there
│   └── Conflict           409: fits the schema, not the present state
├── StoreError             the database
│   ├── StoreUnavailable   locked, full or unreadable at the moment
│   ├── LeaseHeld          another training run of the same policy is in progress
│   └── LeaseLost          this run's lease ran out and somebody else may have its spans
├── EngineError            the model engine behind the proxy
│   ├── EngineUnreachable  no connection, or it ended without an answer
│   ├── EngineRefused      it answered, with an error
│   └── EngineDied         the supervised process ended
├── ExportFailed           another system did not take what we export
└── TrainingError          a training run that cannot go on
    ├── MissingExtra       an optional dependency is not installed
    ├── NothingToTrain     nothing eligible (an outcome for `train`, exit 0)
    ├── CheckpointInvalid  weights that must not reach the engine
    └── PublishFailed      the engine did not take the new version, or took it wrongly

Messages say what is wrong and what would be right; they are printed as they are.
"""

from __future__ import annotations


class LightningError(Exception):
    """Root of every error raised on purpose."""


class ConfigError(LightningError):
    """A setting is unknown, malformed or contradicts another."""


class RequestError(LightningError):
    """What a client sent cannot be done."""

    status = 400
    code = "invalid_request"


class InvalidInput(RequestError):
    """Malformed, or out of range."""

    status = 400
    code = "invalid_input"


class UnknownTarget(RequestError):
    """Names something that is not there."""

    status = 404
    code = "not_found"


class Conflict(RequestError):
    """Well-formed, but at odds with the present state."""

    status = 409
    code = "conflict"


class StoreError(LightningError):
    """The database."""


class StoreUnavailable(StoreError):
    """The database is locked, full or unreadable at the moment."""


class LeaseHeld(StoreError):
    """Another training run of the same policy is in progress."""


class LeaseLost(StoreError):
    """This training run's lease ran out before it could commit."""


class EngineError(LightningError):
    """The model engine behind the proxy."""


class EngineUnreachable(EngineError):
    """No connection to the engine, or one that ended without an answer."""


class EngineRefused(EngineError):
    """The engine answered with an error."""


class EngineDied(EngineError):
    """The engine process that we supervise has ended."""


class ExportFailed(LightningError):
    """Another system did not take what we export."""


class TrainingError(LightningError):
    """A training run that cannot go on."""


class MissingExtra(TrainingError):
    """An optional dependency is not installed."""


class NothingToTrain(TrainingError):
    """Nothing eligible was recorded since the last run."""


class CheckpointInvalid(TrainingError):
    """Weights that must not reach the engine."""


class PublishFailed(TrainingError):
    """The engine did not take the new version, or took it wrongly."""
