"""Claims: in-flight de-duplication. A claim maps a name that is being computed to its leader.

The idea is Strata's (OSDI'26): of many requests with one new prefix, one computes it and the
others wait for the pages instead of computing them again.

A leader is an admitted, running sequence, a follower is a queued one, so there are no cycles. A
follower holds nothing: it waits for the last name of the run that it shares with the leader, and
is an ordinary queued request again when that name is sealed or the leader's claim is gone. Names
differ by tenant, but for those of public prompts, so of another tenant's work nobody waits for, or
learns of, anything else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prefix_store.names import PageName

Holder = int  # a sequence's id


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimStatistics:
    """Names claimed now, followers waiting now, and followers that ever waited."""

    claimed: int
    waiting: int
    waited: int


class Claims:
    """Who computes what. Synchronous; every method is O(names it is given)."""

    def __init__(self) -> None:
        self._leader: dict[PageName, Holder] = {}
        self._names: dict[Holder, list[PageName]] = {}
        self._followers: dict[PageName, dict[Holder, None]] = {}
        self._waits_for: dict[Holder, PageName] = {}
        self._waited = 0

    @property
    def waiting(self) -> int:
        """Followers that wait now."""
        return len(self._waits_for)

    def count_on(self, before: "Claims") -> None:
        """Go on from what another one counted."""
        self._waited = before._waited

    def leader(self, name: PageName) -> Holder | None:
        """The sequence that computes this name now."""
        return self._leader.get(name)

    def claim(self, holder: Holder, names: Sequence[PageName]) -> None:
        """`holder` will compute these names; those that have a leader keep it."""
        mine = self._names.setdefault(holder, [])
        for name in names:
            if name not in self._leader:
                self._leader[name] = holder
                mine.append(name)

    def follow(self, follower: Holder, names: Sequence[PageName]) -> Holder | None:
        """Wait for the run of `names` that one leader has claimed, if the first one is claimed.

        Returns the leader, or None where the follower must not wait.
        """
        leader = self._leader.get(names[0]) if names else None
        if leader is None or leader == follower:
            return None
        last = names[0]
        for name in names:
            if self._leader.get(name) != leader:
                break
            last = name
        self._followers.setdefault(last, {})[follower] = None
        self._waits_for[follower] = last
        self._waited += 1
        return leader

    def forget(self, follower: Holder) -> None:
        """A follower leaves (aborted). Harmless if it does not wait."""
        name = self._waits_for.pop(follower, None)
        if name is not None:
            waiting = self._followers[name]
            del waiting[follower]
            if not waiting:
                del self._followers[name]

    def sealed(self, name: PageName) -> list[Holder]:
        """The name is resident: its claim is fulfilled. Returns the followers to wake."""
        leader = self._leader.pop(name, None)
        if leader is not None:
            self._names[leader].remove(name)
            if not self._names[leader]:
                del self._names[leader]
        return self._wake(name)

    def drop(self, leader: Holder) -> list[Holder]:
        """The leader is gone (ended, aborted, preempted, failed). Returns followers to wake."""
        woken: list[Holder] = []
        for name in self._names.pop(leader, []):
            del self._leader[name]
            woken += self._wake(name)
        return woken

    def statistics(self) -> ClaimStatistics:
        """A frozen count."""
        return ClaimStatistics(
            claimed=len(self._leader), waiting=len(self._waits_for), waited=self._waited
        )

    def check(self) -> None:
        """Every invariant. For tests."""
        assert {n: h for h, names in self._names.items() for n in names} == self._leader
        pairs = {(f, name) for name, waiting in self._followers.items() for f in waiting}
        assert pairs == set(self._waits_for.items())
        for follower, name in self._waits_for.items():
            assert name in self._leader, "a follower waits for a claim that is gone"
            assert follower not in self._names, "a follower leads: waiting could be circular"

    def _wake(self, name: PageName) -> list[Holder]:
        woken = list(self._followers.pop(name, ()))
        for follower in woken:
            del self._waits_for[follower]
        return woken
