"""The sizes that attention is compiled for, and what follows from them."""

from dataclasses import dataclass

LANES_MAX = 16  # of float32: the widest registers there are
# Rows and vectors of a product of matrices computed together: their sums, and a row of vectors, fit
# into the registers of AVX-512, or of AVX2.
WIDE_ROWS, WIDE_VECTORS = 4, 4
NARROW_ROWS, NARROW_VECTORS = 6, 1
REGISTERS = 16  # for weighted values while a tile is computed; half of those there are


@dataclass(frozen=True, slots=True)
class Sizes:
    """What attention is compiled for. page_size is a multiple of 8, head_dim too.

    group: query heads that share a kv head. bfloat16: float32 otherwise. wide: whether there are 32
    registers of 512 bits; pair_dots: whether the processor has AVX512_BF16.
    """

    head_dim: int
    group: int
    page_size: int
    bfloat16: bool
    soft_cap: bool
    sinks: bool
    wide: bool
    pair_dots: bool

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
    def matrices(self) -> bool:
        """Whether a tile can be turned over in registers, for products of matrices."""
        return self.tile == self.lanes

    @property
    def dots(self) -> bool:
        """Whether matrices are multiplied as bfloat16, in the widest registers."""
        return self.pair_dots and self.bfloat16 and self.matrices and self.lanes == LANES_MAX

    @property
    def matrix_rows(self) -> int:
        """Rows of a matrix computed together."""
        return WIDE_ROWS if self.wide else NARROW_ROWS

    @property
    def matrix_vectors(self) -> int:
        """Vectors that they meet at once: tiles of positions, or chunks of head_dim."""
        return WIDE_VECTORS if self.wide else NARROW_VECTORS

    @property
    def positions_together(self) -> int:
        """That many rows meet at once."""
        return self.tile * self.matrix_vectors

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
