"""How far two versions of a policy are apart: in updates, not in numbers.

Numbers only grow. After a rollback from 12 to 1 the next version is 13, one update from what 1 answered; and
rejected versions use up numbers without an update of what serves. So an age is counted along parents: the
updates between a version and the one that an update starts from, up to their nearest common ancestor and
down again. For an ancestor that is how many updates ago it served; one of a branch that was left is as old as
both ways together, for that is how much its weights differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lightning_proxy.store import PolicyVersion


class Ages:
    """Ages of the versions of a policy, seen from the one that an update starts from."""

    def __init__(self, start: PolicyVersion, versions: Iterable[PolicyVersion], most: int) -> None:
        """``versions``: all that the policy has. ``most``: updates, beyond which a version is too old."""
        self._start = start.version
        self._most = most
        self._parents = {each.version: each.parent for each in (*versions, start)}
        self._above = {version: steps for steps, version in enumerate(self._line(self._start))}
        self._found: dict[int, int] = {}

    def too_old(self, version: int | None) -> bool:
        """Whether what this version answered is not trained on any more; of an unknown one nobody can say."""
        return version is not None and self.age(version) > self._most

    @property
    def near(self) -> frozenset[int | None]:
        """All versions that are not too old, the unknown one among them."""
        return frozenset((None, *(each for each in self._parents if not self.too_old(each))))

    def age(self, version: int) -> int:
        """Updates between this version and the start.

        Where no common ancestor is known (versions of another database), the difference of the numbers.
        """
        if version not in self._found:
            ways = (
                steps + self._above[ancestor]
                for steps, ancestor in enumerate(self._line(version))
                if ancestor in self._above
            )
            self._found[version] = next(ways, abs(self._start - version))
        return self._found[version]

    def _line(self, version: int) -> Iterator[int]:
        """A version and its ancestors, nearest first."""
        seen: set[int] = set()
        at: int | None = version
        while at is not None and at not in seen:
            seen.add(at)
            yield at
            at = self._parents.get(at)
