"""Tiles of keys and values laid out anew, so that many rows meet them as a product of matrices.

Theory: a row of query heads at a time against a column of positions. Keys are turned over: then a
vector holds one element of all positions, a query's element multiplies it, and no sum goes across
a vector. Laying a tile out costs about what one row's arithmetic does. Processors with AVX512_BF16
multiply two pairs of bfloat16 and add both products in one instruction, which doubles the pace;
weights are rounded to bfloat16 for it, as torch does it too.
"""

from typing import Any

from chatserve_kernels.cpu.language import I32, Program, integer
from chatserve_kernels.cpu.records import Records
from chatserve_kernels.cpu.sizes import Sizes

UNROLLED = 2  # steps of a loop along head_dim, or along positions


def matrices_for(program: Program, sizes: Sizes, records: Records) -> "Matrices":
    """The kind for these sizes."""
    kind = DottedMatrices if sizes.dots else Matrices
    return kind(program, sizes, records)


class Matrices:
    """So many tiles at a time, in float32. Built at the beginning of a program."""

    pairs = 1  # elements of head_dim, or positions, that one lane holds

    def __init__(self, program: Program, sizes: Sizes, records: Records) -> None:
        self.p, self.sizes, self.records = program, sizes, records
        lanes, tiles = sizes.lanes, sizes.matrix_vectors
        # [head_dim / pairs, tiles, positions of a tile], [positions / pairs, head_dim],
        # [rows, positions / pairs]
        self._keys = program.room(sizes.head_dim // self.pairs * tiles, lanes)
        self._values = program.room(tiles * sizes.tile // self.pairs * sizes.chunks, lanes)
        self._weights = program.room(sizes.matrix_rows * tiles, lanes)
        vectors = sizes.record_elements // lanes
        self.spare = program.room(vectors, lanes)  # the record of rows that are none
        with program.loop(integer(0), integer(vectors)) as index:
            program.store(program.constant(0.0, lanes), self._vector(self.spare, index))

    def take_query(self, source: Any, record: Any) -> None:
        """A query head's, from an address to its record."""
        self.records.take_query(source, record)

    def take_keys(self, tile: Any, keys: Any, row_bytes: Any) -> None:
        """Of all positions of a tile, from the address of the first one's. tile: its number."""
        sizes, b = self.sizes, self.p.b
        step = sizes.vectors_a_load
        with self.p.loop(integer(0), integer(sizes.chunks), step) as chunk:
            place = b.add(keys, b.mul(chunk, integer(sizes.lanes * sizes.element_bytes)))
            rows = [
                self._loaded(b.add(place, b.mul(row_bytes, integer(row))))
                for row in range(sizes.tile)
            ]
            for further, vectors in enumerate(zip(*rows, strict=True)):
                first = b.mul(b.add(chunk, integer(further)), integer(sizes.lanes))
                self._store_turned(vectors, tile, first)

    def take_values(self, tile: Any, values: Any, row_bytes: Any, low: Any, high: Any) -> None:
        """The same with values; zeros where a position is not from low to high: nobody may have
        written there."""
        b, sizes = self.p.b, self.sizes
        with self.p.loop(integer(0), integer(sizes.tile)) as row:
            first = b.mul(self._position(tile, row), integer(sizes.chunks))
            inside = self._inside(row, low, high)
            for chunk, vector in self._chunks(b.add(values, b.mul(row_bytes, row))):
                kept = b.select(inside, vector, self.p.constant(0.0, sizes.lanes))
                self.p.store(kept, self._vector(self._values, b.add(first, integer(chunk))))

    def take_weights(self, row: int, weights: list[Any]) -> None:
        """Of one of the rows, a vector for each tile."""
        place = self._weights_of(row)
        for vector in weights:
            place = self._put_weights(vector, place)

    def scores(self, records: list[Any]) -> list[list[Any]]:
        """Of each record's query with every position of the tiles, a vector for each tile."""
        tiles = self.sizes.matrix_vectors
        zeros = [self.p.constant(0.0, self.sizes.lanes)] * (len(records) * tiles)
        steps = integer(self.sizes.head_dim // self.pairs)
        with self.p.folding(integer(0), steps, zeros, UNROLLED) as (element, sums, after):
            after += sums
            for further in range(UNROLLED):
                index = self.p.b.add(element, integer(further))
                keys = self._vectors(self._keys, self.p.b.mul(index, integer(tiles)), tiles)
                places = [
                    self.p.b.add(record, self.p.b.mul(index, integer(4))) for record in records
                ]
                self._add_products(places, keys, after)
        return [sums[first : first + tiles] for first in range(0, len(sums), tiles)]

    def mix(self, records: list[Any], positions: Any) -> None:
        """Add the values of the first positions, a multiple of a tile's, by the rows' weights, to
        what the records hold."""
        p, b, sizes = self.p, self.p.b, self.sizes
        for first in range(0, sizes.chunks, sizes.matrix_vectors):
            chunks = range(first, min(first + sizes.matrix_vectors, sizes.chunks))
            places = [self.records.values(record, chunk) for record in records for chunk in chunks]
            sums = [p.load(place, sizes.lanes) for place in places]
            steps = b.sdiv(positions, integer(self.pairs))
            with p.folding(integer(0), steps, sums, UNROLLED) as (step, sums, after):
                after += sums
                for further in range(UNROLLED):
                    index = b.add(step, integer(further))
                    vector = b.add(b.mul(index, integer(sizes.chunks)), integer(first))
                    values = self._vectors(self._values, vector, len(chunks))
                    weights = [
                        b.add(self._weights_of(row), b.mul(index, integer(4)))
                        for row in range(len(records))
                    ]
                    self._add_products(weights, values, after)
            for place, mixed in zip(places, sums, strict=True):
                p.store(mixed, place)

    def _add_products(self, places: list[Any], vectors: list[Any], sums: list[Any]) -> None:
        """The number at each place times each vector, to the sums: [places, vectors]."""
        for row, place in enumerate(places):
            for column, vector in enumerate(vectors):
                index = row * len(vectors) + column
                sums[index] = self._add_product(place, vector, sums[index])

    def _vectors(self, base: Any, first: Any, count: int) -> list[Any]:
        """So many of an array of vectors, from the first on."""
        indices = (self.p.b.add(first, integer(index)) for index in range(count))
        return [self._load(self._vector(base, index)) for index in indices]

    def _position(self, tile: Any, row: Any) -> Any:
        """The number of a tile's row among all positions, or of its pair among all pairs."""
        return self.p.b.add(self.p.b.mul(tile, integer(self.sizes.tile // self.pairs)), row)

    def _weights_of(self, row: int) -> Any:
        """The address of a row's weights."""
        size = 4 * self.sizes.matrix_vectors * self.sizes.tile // self.pairs
        return self.p.b.add(self._weights, integer(row * size))

    def _put_weights(self, weights: Any, place: Any) -> Any:
        """A vector of weights to a place; where the next one goes."""
        self.p.store(weights, place)
        return self.p.b.add(place, integer(4 * self.sizes.tile))

    def _load(self, address: Any) -> Any:
        return self.p.load(address, self.sizes.lanes)

    def _loaded(self, address: Any) -> tuple[Any, ...]:
        """What `take_keys` turns over: the vectors of one load."""
        if self.sizes.bfloat16:
            return self.p.load_pairs(address, self.sizes.lanes)
        return (self._load(address),)

    def _add_product(self, place: Any, vector: Any, added: Any) -> Any:
        """The number at a place times a vector, and `added`."""
        one = self.p.splat(self.p.number(place), self.sizes.lanes)
        return self.p.multiply_add(one, vector, added)

    def _store_turned(self, vectors: tuple[Any, ...], tile: Any, first: Any) -> None:
        b, tiles = self.p.b, integer(self.sizes.matrix_vectors)
        for lane, vector in enumerate(self.p.turned(vectors)):
            index = b.add(b.mul(b.add(first, integer(lane)), tiles), tile)
            self.p.store(vector, self._vector(self._keys, index))

    def _chunks(self, row: Any) -> list[tuple[int, Any]]:
        return list(self.p.row(row, self.sizes.chunks, self.sizes.lanes, self.sizes.bfloat16))

    def _inside(self, row: Any, low: Any, high: Any) -> Any:
        b = self.p.b
        return b.and_(b.icmp_signed(">=", row, low), b.icmp_signed("<", row, high))

    def _vector(self, base: Any, index: Any) -> Any:
        """The address of one of an array of vectors."""
        return self.p.b.add(base, self.p.b.mul(index, integer(4 * self.sizes.lanes)))


class DottedMatrices(Matrices):
    """Pairs of bfloat16 in lanes of 32 bits: of neighbours along head_dim, and of positions."""

    pairs = 2

    def take_query(self, source: Any, record: Any) -> None:
        """As it is; the scores are scaled."""
        size = self.sizes.head_dim * self.sizes.element_bytes
        self.p.copy(source, self.records.query(record, 0), size)

    def take_keys(self, tile: Any, keys: Any, row_bytes: Any) -> None:
        """Of all positions of a tile, from the address of the first one's. tile: its number."""
        b, sizes = self.p.b, self.sizes
        with self.p.loop(integer(0), integer(sizes.chunks // 2)) as chunk:
            place = b.add(keys, b.mul(chunk, integer(4 * sizes.lanes)))
            rows = (
                self._load(b.add(place, b.mul(row_bytes, integer(r)))) for r in range(sizes.tile)
            )
            self._store_turned(tuple(rows), tile, b.mul(chunk, integer(sizes.lanes)))

    def take_values(self, tile: Any, values: Any, row_bytes: Any, low: Any, high: Any) -> None:
        """The same with values; zeros where a position is not from low to high."""
        p, b, sizes = self.p, self.p.b, self.sizes
        nothing = p.integers(0, sizes.lanes)
        with p.loop(integer(0), integer(sizes.tile), 2) as row:
            pair = self._position(tile, b.sdiv(row, integer(2)))
            first = b.mul(pair, integer(sizes.chunks))
            places = [b.add(values, b.mul(row_bytes, b.add(row, integer(n)))) for n in (0, 1)]
            inside = [self._inside(b.add(row, integer(n)), low, high) for n in (0, 1)]
            for load in range(sizes.chunks // 2):
                further = integer(4 * load * sizes.lanes)
                two = [
                    b.select(mine, self._load(b.add(place, further)), nothing)
                    for place, mine in zip(places, inside, strict=True)
                ]
                for odd, vector in enumerate(p.interleaved(*two)):
                    index = b.add(first, integer(2 * load + odd))
                    p.store(vector, self._vector(self._values, index))

    def scores(self, records: list[Any]) -> list[list[Any]]:
        """Of each record's query with every position of the tiles, a vector for each tile."""
        b, scale = self.p.b, self.records.scale
        return [[b.fmul(sums, scale) for sums in row] for row in super().scores(records)]

    def _put_weights(self, weights: Any, place: Any) -> Any:
        """A vector of weights, rounded, to a place; where the next one goes."""
        self.p.store(self.p.narrowed(weights), place)
        return self.p.b.add(place, integer(2 * self.sizes.tile))

    def _load(self, address: Any) -> Any:
        return self.p.load_integers(address, self.sizes.lanes)

    def _add_product(self, place: Any, vector: Any, added: Any) -> Any:
        """The pair at a place times each pair of a vector, and `added`."""
        pair = self.p.b.load(self.p.b.inttoptr(place, I32.as_pointer()))
        return self.p.dots(vector, self.p.splat(pair, self.sizes.lanes), added)
