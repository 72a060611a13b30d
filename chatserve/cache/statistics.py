"""What the cache floor counts: a frozen picture, and the one mutable book behind it."""

from dataclasses import dataclass, field

from chatserve.cache.claims import ClaimStatistics
from chatserve.cache.page_pool import PoolStatistics
from chatserve.cache.transit import TransitStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatistics:
    """The cache floor at one moment. *_tokens and *_total count from the start of the process.

    logical_pages counts every owner of a page, physical_pages each owned page once: their
    difference is what sharing saves. leased_pages: resident ones that others go before, for now.
    evicted_by_name_total: for an admin who named their conversation. draft_pages were computed
    ahead and wait for their request; draft_adopted_total: pages whose request came.
    forgotten_total: pages that lost their names because their conversation was deleted; ghosts: of
    those, the ones that still have owners.
    """

    page_size: int
    pages: PoolStatistics
    claims: ClaimStatistics
    transit: TransitStatistics = field(default_factory=TransitStatistics)
    named_pages: int
    logical_pages: int
    physical_pages: int
    query_tokens: int
    hit_tokens: int
    sealed_total: int
    twins_total: int
    copies_total: int
    evicted_for_space_total: int
    evicted_by_flush_total: int
    evicted_by_age_total: int = 0
    truncated_total: int
    evicted_by_name_total: int = 0
    leased_pages: int = 0
    draft_pages: int = 0
    draft_sealed_total: int = 0
    draft_adopted_total: int = 0
    forgotten_total: int = 0
    ghosts: int = 0


@dataclass(slots=True)
class CacheCounts:
    """The running sums behind the statistics."""

    query_tokens: int = 0
    hit_tokens: int = 0
    sealed: int = 0
    twins: int = 0
    copies: int = 0
    evicted: int = 0
    flushed: int = 0
    retired: int = 0
    dismissed: int = 0
    truncated: int = 0
    draft_sealed: int = 0
    draft_adopted: int = 0

    def picture(
        self,
        page_size: int,
        *,
        pages: PoolStatistics,
        claims: ClaimStatistics,
        transit: TransitStatistics,
        named: int,
        drafted: int,
        leased: int,
        forgotten: int,
        ghosts: int,
    ) -> CacheStatistics:
        """Frozen, with what there is now."""
        return CacheStatistics(
            page_size=page_size,
            pages=pages,
            claims=claims,
            transit=transit,
            named_pages=named,
            logical_pages=pages.references,
            physical_pages=pages.open + pages.loading + pages.sealed,
            query_tokens=self.query_tokens,
            hit_tokens=self.hit_tokens,
            sealed_total=self.sealed,
            twins_total=self.twins,
            copies_total=self.copies,
            evicted_for_space_total=self.evicted,
            evicted_by_flush_total=self.flushed,
            evicted_by_age_total=self.retired,
            evicted_by_name_total=self.dismissed,
            truncated_total=self.truncated,
            leased_pages=leased,
            draft_pages=drafted,
            draft_sealed_total=self.draft_sealed,
            draft_adopted_total=self.draft_adopted,
            forgotten_total=forgotten,
            ghosts=ghosts,
        )
