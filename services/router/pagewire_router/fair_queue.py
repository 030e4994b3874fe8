"""Who is next: priorities first, and among equals a deficit round robin over tenants, in tokens.

    bands       one for each priority in the queue; the lowest number goes first. Every AGEING-th turn belongs to the
                band of whoever waits longest, so that no priority can starve another.
    in a band   tenants stand in a ring. Whose turn begins gets QUANTUM tokens; the turn lasts while they pay for its
                oldest request. What its requests generate is charged later and may leave it in debt, which the
                turns that follow pay off. It is charged only while another tenant waits: nobody owes for tokens that
                nobody else wanted.

Since two tenants of a band wait, the one that goes has had at most 2 * (QUANTUM + the longest request) tokens more
than the other, beside what the other owed before. Deficit round robin: Shreedhar and Varghese, 1995; tokens as the
measure of service: Sheng et al., 2024.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

QUANTUM = 256  # tokens: a turn is about one request
AGEING = 8

_arrivals = itertools.count()


@dataclass(eq=False)
class Waiting:
    """A request in the queue; `tokens` are those of its prompt."""

    tokens: int
    tenant: str = ""
    priority: int = 0
    arrival: int = field(default_factory=lambda: next(_arrivals))


class _Tenant:
    def __init__(self) -> None:
        self.deficit = 0
        self.tokens = 0  # of those that wait
        self.waiting: OrderedDict[Waiting, None] = OrderedDict()

    @property
    def oldest(self) -> Waiting:
        return next(iter(self.waiting))

    @property
    def newest(self) -> Waiting:
        return next(reversed(self.waiting))


class _Band:
    """The tenants that wait or owe, in the order of their turns; the first one's turn has begun."""

    def __init__(self) -> None:
        self._ring: OrderedDict[str, _Tenant] = OrderedDict()

    @property
    def tenants(self) -> Iterator[_Tenant]:
        """Those that wait."""
        return (tenant for tenant in self._ring.values() if tenant.waiting)

    @property
    def tokens(self) -> int:
        return sum(tenant.tokens for tenant in self._ring.values())

    @property
    def oldest(self) -> Waiting:
        return min((tenant.oldest for tenant in self.tenants), key=lambda waiting: waiting.arrival)

    def put(self, waiting: Waiting) -> None:
        tenant = self._join(waiting.tenant)
        tenant.waiting[waiting] = None
        tenant.tokens += waiting.tokens

    def remove(self, waiting: Waiting) -> None:
        tenant = self._ring[waiting.tenant]
        del tenant.waiting[waiting]
        tenant.tokens -= waiting.tokens

    def next(self) -> Waiting:
        """Who goes next. Somebody must wait; turns that end on the way have ended."""
        while True:
            for _ in range(len(self._ring)):
                tenant = next(iter(self._ring.values()))
                if tenant.waiting and tenant.oldest.tokens <= tenant.deficit:
                    return tenant.oldest
                self._end_turn()
            # A round in which nobody could pay: those that would follow like it are added at once.
            rounds = min(-(-(tenant.oldest.tokens - tenant.deficit) // QUANTUM) for tenant in self.tenants)
            skipped = max(rounds - 1, 0) * QUANTUM
            for tenant in self._ring.values():
                tenant.deficit += skipped
                if not tenant.waiting:
                    tenant.deficit = min(tenant.deficit, 0)

    def charge(self, name: str, tokens: int) -> None:
        if any(tenant.waiting and other != name for other, tenant in self._ring.items()):
            self._join(name).deficit -= tokens

    def share(self, name: str) -> int:
        """Tokens that go before a request of this tenant which comes now."""
        num_tenants = sum(1 for _ in self.tenants)
        own = self._ring.get(name)
        if own is None or not own.waiting:
            return min(self.tokens, QUANTUM * num_tenants)
        return min(self.tokens, own.tokens * num_tenants)

    def _join(self, name: str) -> _Tenant:
        if name not in self._ring:
            self._ring[name] = tenant = _Tenant()
            tenant.deficit = QUANTUM if len(self._ring) == 1 else 0
        return self._ring[name]

    def _end_turn(self) -> None:
        name, tenant = next(iter(self._ring.items()))
        if tenant.waiting or tenant.deficit < 0:
            self._ring.move_to_end(name)
        else:  # what is left of a turn is not saved up
            del self._ring[name]
        if self._ring:
            following = next(iter(self._ring.values()))
            following.deficit += QUANTUM


class FairQueue:
    """Bounds are the caller's: it asks for whom to `shed`."""

    def __init__(self) -> None:
        self._bands: dict[int, _Band] = {}
        self._size = 0
        self._turn = 0
        self.tokens = 0

    def __len__(self) -> int:
        return self._size

    def put(self, waiting: Waiting) -> None:
        self._bands.setdefault(waiting.priority, _Band()).put(waiting)
        self._size += 1
        self.tokens += waiting.tokens

    def remove(self, waiting: Waiting) -> None:
        """Takes out one that is in the queue."""
        band = self._bands[waiting.priority]
        band.remove(waiting)
        if not any(band.tenants):
            del self._bands[waiting.priority]  # nobody waits: what was owed is of no use to anyone
        self._size -= 1
        self.tokens -= waiting.tokens

    def next(self) -> Waiting | None:
        """Who goes next, the same until something changes."""
        if not self._bands:
            return None
        if self._turn % AGEING == AGEING - 1:
            band = min(self._bands.values(), key=lambda band: band.oldest.arrival)
        else:
            band = self._bands[min(self._bands)]
        return band.next()

    def take(self, waiting: Waiting) -> None:
        """`waiting`, which is next, goes; its tokens are charged."""
        self._turn += 1
        self._bands[waiting.priority].charge(waiting.tenant, waiting.tokens)
        self.remove(waiting)

    def charge(self, waiting: Waiting, tokens: int) -> None:
        """One that has gone has generated so many tokens."""
        band = self._bands.get(waiting.priority)
        if band is not None:
            band.charge(waiting.tenant, tokens)

    def ahead_of(self, waiting: Waiting) -> int:
        """About how many tokens go before one that comes now."""
        before = sum(band.tokens for priority, band in self._bands.items() if priority < waiting.priority)
        own = self._bands.get(waiting.priority)
        return before + (own.share(waiting.tenant) if own else 0)

    def shed(self) -> Waiting:
        """Whom a full queue can best do without: the newest of the tenant that has most in the last band."""
        band = self._bands[max(self._bands)]
        most = max(band.tenants, key=lambda tenant: (tenant.tokens, tenant.newest.arrival))
        return most.newest
