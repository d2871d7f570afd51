"""What training makes of failures: which rollouts are dropped, which calls masked, scaled or penalised.

Faults of engine, network and proxy never count against the policy: a rollout that failed by one is
dropped, whatever its reward. What the policy itself did wrong is left to the given reward, unless
``failures.training`` in the settings says otherwise:

- ``train``    nothing.
- ``mask``     the tokens of calls with the class are context, not trained; the rollout counts.
- ``partial f``  credit and advantage of such calls are multiplied by ``f``; the rollout's return, and with it
  the group's statistics, stay. Where the rollout failed by the class and no such call can be trained, all
  of its calls are.
- ``penalty p``  ``p`` is added to the rollout's return once per such call, or once where it failed by the
  class without one, before groups are formed: the others of its group are compared with that.
- ``drop``     rollouts with such a call, or that failed by the class, are left out before groups are formed.

Only calls to the trained policy count, but for the classes of the infrastructure; a call that an SDK
tried again counts for neither. A failed tool counts for the call that called it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lightning_proxy.config.consequences import Consequence, Kind, consequence_of
from lightning_proxy.store import (
    INFRASTRUCTURE,
    ErrorClass,
    Finding,
    Payment,
    RecordedRollout,
    RolloutState,
    Span,
    failed_by_infrastructure,
)
from lightning_proxy.trainer.transitions import (
    LeftOut,
    Reason,
    Terms,
    TrainableRollout,
    superseded,
    to_compare_with,
)

_TRAIN = Consequence(Kind.TRAIN)
_DEFAULTS = {
    **dict.fromkeys(INFRASTRUCTURE, Consequence(Kind.MASK)),
    ErrorClass.CAPTURE_FAULT: Consequence(Kind.DROP),  # what the agent saw next is not known
}


@dataclass(slots=True)
class FailureCounts:
    """What was seen, and what was done about it, by class; for the report."""

    calls: Counter[str] = field(default_factory=Counter)  # with the class, in all rollouts drained
    dropped: Counter[str] = field(default_factory=Counter)  # rollouts
    masked: Counter[str] = field(default_factory=Counter)  # calls
    partial: Counter[str] = field(default_factory=Counter)  # calls
    penalised: Counter[str] = field(default_factory=Counter)  # penalties

    def as_dict(self) -> dict[str, dict[str, int]]:
        """``{"calls": {class: n}, "dropped": ...}``, without what there was none of."""
        counts = {
            "calls": self.calls,
            "dropped": self.dropped,
            "masked": self.masked,
            "partial": self.partial,
            "penalised": self.penalised,
        }
        return {name: dict(sorted(of.items())) for name, of in counts.items() if of}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one rollout."""

    dropped_for: ErrorClass | None = None
    masked: Mapping[int | None, ErrorClass] = field(default_factory=dict)  # span id -> for what
    parts: Mapping[int | None, float] = field(default_factory=dict)  # span id -> part of its credit
    everywhere: float = 1.0  # part of the credit of all calls
    penalties: tuple[Payment, ...] = ()


class Consequences:
    """The settings' consequences, applied to one run's rollouts; counts what it does."""

    def __init__(self, training: Mapping[str, str], terms: Terms, left_out: LeftOut) -> None:
        """``training``: ``failures.training``. ``left_out`` gets what is dropped and masked."""
        self._training = training
        self._terms = terms
        own = {ErrorClass(name): consequence_of(name, text) for name, text in training.items()}
        self._of: Mapping[ErrorClass, Consequence] = {**_DEFAULTS, **own}
        self._left_out = left_out
        self._verdicts: dict[str, Verdict] = {}
        self._former: dict[str, Sequence[RecordedRollout]] = {}  # companions, by rollout id
        self.counts = FailureCounts()

    def keep(self, recorded: Iterable[RecordedRollout]) -> list[RecordedRollout]:
        """The rollouts that are not dropped. Comes before groups are formed, so that these stay honest."""
        kept = []
        for each in recorded:
            verdict = self._verdicts[each.rollout.rollout_id] = self._judge(each)
            if verdict.dropped_for is None:
                kept.append(each)
                if each.companions:
                    self._former[each.rollout.rollout_id] = each.companions
            else:
                self.counts.dropped[verdict.dropped_for.value] += 1
                self._left_out.rollouts[f"failure_{verdict.dropped_for.value}"] += 1
        return kept

    def apply(self, rollouts: Iterable[TrainableRollout]) -> list[TrainableRollout]:
        """What is kept, with its masks, parts and penalties; a rollout with nothing left to train is out."""
        applied = (self._applied(each, self._verdicts[each.rollout_id]) for each in rollouts)
        return [each for each in applied if each is not None]

    def compared_with(self, former: Iterable[RecordedRollout]) -> list[TrainableRollout]:
        """Members of earlier runs' groups, for comparison only, with the same said of their failures.

        So all of a group have the penalties that these settings give. Nothing of it is counted: it was, by
        the runs that trained on them.
        """
        others = Consequences(self._training, self._terms, LeftOut())
        verdicts = [(each, others._judge(each)) for each in former]
        return [
            _with_penalties(to_compare_with(each, self._terms), verdict)
            for each, verdict in verdicts
            if verdict.dropped_for is None
        ]

    def _judge(self, recorded: RecordedRollout) -> Verdict:
        calls = classes_of(recorded.spans)
        for classes in calls.values():
            self.counts.calls.update(each.value for each in classes)
        if recorded.rollout.incomplete is not None:
            return Verdict()  # left out for that
        failed_by = None
        if recorded.rollout.state is RolloutState.FAILED:
            failed_by = recorded.rollout.error_class
            if (fault := failed_by_infrastructure(failed_by, recorded.spans)) is not None:
                return Verdict(dropped_for=fault)
        own = {position for position, span in enumerate(recorded.spans) if span.policy == self._terms.policy}
        counting = {
            position: [each for each in classes if position in own or each in INFRASTRUCTURE]
            for position, classes in calls.items()
        }
        everything = [each for classes in counting.values() for each in classes]
        for each in (*everything, *([failed_by] if failed_by else ())):
            if self._consequence(each).kind is Kind.DROP:
                return Verdict(dropped_for=each)
        return self._milder(recorded.spans, counting, failed_by)

    def _milder(
        self,
        spans: Sequence[Span],
        counting: Mapping[int, Sequence[ErrorClass]],
        failed_by: ErrorClass | None,
    ) -> Verdict:
        """Masks, parts and penalties."""
        masked: dict[int | None, ErrorClass] = {}
        parts: dict[int | None, float] = {}
        penalties: list[Payment] = []
        everywhere = 1.0
        for position, classes in counting.items():
            span = spans[position]
            for each in dict.fromkeys(classes):  # once per call, however often it is in it
                consequence = self._consequence(each)
                if consequence.kind is Kind.MASK and span.error_class is None:
                    masked.setdefault(span.span_id, each)
                elif consequence.kind is Kind.PARTIAL and span.error_class is None:
                    parts[span.span_id] = parts.get(span.span_id, 1.0) * consequence.number
                    self.counts.partial[each.value] += 1
                elif consequence.kind is Kind.PENALTY:
                    penalties.append(Payment(consequence.number, span.span_id))
                    self.counts.penalised[each.value] += 1
        if failed_by is not None:
            consequence = self._consequence(failed_by)
            with_it = [spans[position] for position, classes in counting.items() if failed_by in classes]
            if consequence.kind is Kind.PENALTY and not with_it:
                penalties.append(Payment(consequence.number))
                self.counts.penalised[failed_by.value] += 1
            elif consequence.kind is Kind.PARTIAL and all(span.error_class is not None for span in with_it):
                everywhere = consequence.number
                self.counts.partial[failed_by.value] += len(spans)
        return Verdict(None, masked, parts, everywhere, tuple(penalties))

    def _consequence(self, error_class: ErrorClass) -> Consequence:
        return self._of.get(error_class, _TRAIN)

    def _applied(self, rollout: TrainableRollout, verdict: Verdict) -> TrainableRollout | None:
        rollout = _with_penalties(rollout, verdict)
        for span_id in dict.fromkeys(each.span_id for each in rollout.transitions):
            if (why := verdict.masked.get(span_id)) is not None:
                self.counts.masked[why.value] += 1
                self._left_out.calls[f"failure_{why.value}"] += 1
        trained = tuple(
            replace(each, part=verdict.everywhere * verdict.parts.get(each.span_id, 1.0))
            for each in rollout.transitions
            if each.span_id not in verdict.masked
        )
        if not trained:
            self._left_out.rollouts[Reason.NO_TRANSITION] += 1
            return None
        former = self.compared_with(self._former.get(rollout.rollout_id, ()))
        return replace(rollout, transitions=trained, companions=tuple(former))


def _with_penalties(rollout: TrainableRollout, verdict: Verdict) -> TrainableRollout:
    if not verdict.penalties:
        return rollout
    return replace(
        rollout,
        value=rollout.value + sum(penalty.value for penalty in verdict.penalties),
        payments=(*rollout.payments, *verdict.penalties),
    )


def classes_of(spans: Sequence[Span]) -> dict[int, list[ErrorClass]]:
    """What is wrong in each call, by its place among ``spans``: its error, and what it is to blame for.

    Without what an SDK tried again. A failed tool is blamed on the call whose reply has its id, else on
    the one before (whose ids the agent may have changed); where there is none, on nobody.
    """
    unseen = superseded(spans)
    classes: dict[int, list[ErrorClass]] = {}
    for position, span in enumerate(spans):
        if position in unseen:
            continue
        if isinstance(span.error_class, ErrorClass):
            classes.setdefault(position, []).append(span.error_class)
        for found in span.findings:
            of_call = found.error_class is not ErrorClass.TOOL_FAILURE
            to_blame = position if of_call else _caller(spans[:position], found)
            if to_blame is not None:
                classes.setdefault(to_blame, []).append(found.error_class)
    return classes


def _caller(earlier: Sequence[Span], failure: Finding) -> int | None:
    answered = [position for position, span in enumerate(earlier) if span.response is not None]
    if failure.call_id:
        mark = failure.call_id.encode()
        for position in reversed(answered):
            if mark in (earlier[position].response or b""):
                return position
    return answered[-1] if answered else None
