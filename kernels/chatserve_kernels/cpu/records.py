"""What attention over a part of a context leaves of each query head, until the parts are joined.

    record of a query head, float32:   query [head_dim] | values, weighted [head_dim]
                                       | sums of weights [tile lanes] | reference [tile lanes]

Values are in the order of the vectors that keys come in (`Program.load_pairs`), and the query too:
scaled, or as it came where dots of pairs are taken with it.
"""

from typing import Any

from chatserve_kernels.cpu.language import Program, integer
from chatserve_kernels.cpu.sizes import Sizes

NOTHING = -1e30  # below every score


class Records:
    """Their addresses."""

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self._p, self._sizes = program, sizes
        self._records = program.field("records")
        self._kv_heads = program.field("kv_heads")
        self.scale = program.splat(program.float_field("scale"), sizes.lanes)  # of scores

    def group(self, slot: Any, head: Any) -> Any:
        """Of a row's part (slot) and a kv head: the records of its query heads."""
        b = self._p.b
        place = b.add(b.mul(slot, self._kv_heads), head)
        size = 4 * self._sizes.group_records * self._sizes.record_elements
        return b.add(self._records, b.mul(place, integer(size)))

    def of(self, group: Any, index: Any) -> Any:
        """One query head's."""
        b = self._p.b
        return b.add(group, b.mul(index, integer(4 * self._sizes.record_elements)))

    def take_query(self, source: Any, record: Any) -> None:
        """A query head's, from an address to its record, scaled."""
        sizes = self._sizes
        vectors = self._p.row(source, sizes.chunks, sizes.lanes, sizes.bfloat16)
        for chunk, vector in vectors:
            self._p.store(self._p.b.fmul(vector, self.scale), self.query(record, chunk))

    def query(self, record: Any, chunk: int) -> Any:
        return self._p.b.add(record, integer(4 * chunk * self._sizes.lanes))

    def values(self, record: Any, chunk: int) -> Any:
        return self.query(record, self._sizes.chunks + chunk)

    def sums(self, record: Any) -> Any:
        return self._p.b.add(record, integer(8 * self._sizes.head_dim))

    def reference(self, record: Any) -> Any:
        return self._p.b.add(record, integer(8 * self._sizes.head_dim + 4 * self._sizes.tile))
