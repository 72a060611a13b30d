"""The sizes that attention is compiled for, and what follows from them."""

from dataclasses import dataclass

LANES_MAX = 16  # of float32: the widest registers there are
REGISTERS = 16  # for weighted values while a tile is computed; half of those there are


@dataclass(frozen=True, slots=True)
class Sizes:
    """What attention is compiled for. page_size is a multiple of 8, head_dim too.

    group: query heads that share a kv head. bfloat16: float32 otherwise.
    """

    head_dim: int
    group: int
    page_size: int
    bfloat16: bool
    soft_cap: bool
    sinks: bool

    @property
    def lanes(self) -> int:
        """Of the vectors along head_dim."""
        elements = self.head_dim // (2 if self.bfloat16 else 1)
        return next(n for n in (LANES_MAX, LANES_MAX // 2, LANES_MAX // 4) if elements % n == 0)

    @property
    def tile(self) -> int:
        """Positions computed together; at most `lanes`."""
        return self.lanes if self.page_size % self.lanes == 0 else LANES_MAX // 2

    @property
    def chunks(self) -> int:
        """Vectors along head_dim."""
        return self.head_dim // self.lanes

    @property
    def vectors_a_load(self) -> int:
        """bfloat16 comes in pairs."""
        return 2 if self.bfloat16 else 1

    @property
    def blocks(self) -> int:
        """A group is computed in so many parts, for want of registers."""
        return -(-self.group // max(1, REGISTERS // self.chunks))

    @property
    def together(self) -> int:
        """Query heads of a part."""
        return -(-self.group // self.blocks)

    @property
    def group_records(self) -> int:
        """Records of a group: its last part may have some to spare."""
        return self.blocks * self.together

    @property
    def record_elements(self) -> int:
        """float32 of a record."""
        return 2 * self.head_dim + 2 * self.tile

    @property
    def element_bytes(self) -> int:
        """Of queries, keys, values and results."""
        return 2 if self.bfloat16 else 4
