"""Attention over runs of pages, the joining of its parts, and KV append: the code.

Theory: a task of `attend` is a run and one kv head. The run's pages are read once, a tile of
positions at a time, for all rows of the run; softmax goes along as in FlashAttention (arXiv
2205.14135, section 3.1): for each query head a record holds a reference near the largest score so
far, the sum of weights relative to it and the weighted values. `join` brings the records of a row's
runs together.

    record of a query head, float32:   query, scaled [head_dim] | values [head_dim]
                                       | sums of weights [tile lanes] | reference [tile lanes]

Tiles never cross a page, and the next one is asked for while one is computed, row by row: a burst
of requests would hold up what comes from the nearer caches. What lies outside a run's positions may
be anything: its score is replaced and its value is not read. bfloat16 comes in pairs, the elements
at even places in one vector and those at odd ones in the next; records hold them in that order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from chatserve_kernels.cpu.language import F32, I32, I64, Program, integer
from chatserve_kernels.cpu.matrices import Matrices, matrices_for
from chatserve_kernels.cpu.records import NOTHING, Records
from chatserve_kernels.cpu.sizes import Sizes

SPANS = ("member_starts", "member_ends")
# A new reference changes all that a record holds: only for scores that are larger by so much, which
# sums of weights have room for.
SLACK = 8.0
COPIES_A_TASK = 32  # rows that one thread appends at a time

ATTEND_FIELDS = (
    *("attend_next", "attend_done", "attend_tasks", "join_next", "join_done", "join_tasks"),
    *("kv_heads", "query", "query_row", "query_head", "result"),
    *("pages", "page_bytes", "tables", "table_entries"),
    *("run_sequences", "run_starts", "run_ends", "run_matrices", "run_first_members"),
    *("members", "member_starts", "member_ends", "slots"),
    *("rows", "first_slots", "records", "scale", "soft_cap", "sinks"),
)
APPEND_FIELDS = (
    *(
        "append_next",
        "append_done",
        "append_tasks",
        "writes",
        "rows",
        "write_pages",
        "write_offsets",
    ),
    *("kv_heads", "key", "key_row", "key_head", "value", "value_row", "value_head"),
    *("pages", "page_bytes"),
)


def attention_text(sizes: Sizes) -> str:
    """The functions `attend` and `join`."""
    module = ir.Module("attention")
    fields = {name: index for index, name in enumerate(ATTEND_FIELDS)}
    _Attend(Program(module, "attend", fields), sizes).build()
    _Join(Program(module, "join", fields), sizes).build()
    return str(module)


class _Attend:
    """Each task: one run for one kv head."""

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self.p, self.sizes = program, sizes
        self.f = {name: program.field(name) for name in ATTEND_FIELDS if "next" not in name}
        self.records = Records(program, sizes)
        self.row_bytes = program.b.mul(
            self.f["kv_heads"], integer(sizes.head_dim * sizes.element_bytes)
        )
        self.value_bytes = program.b.mul(self.row_bytes, integer(sizes.page_size))
        # Where a lane can be looked up by a number.
        weight = ir.VectorType(F32, sizes.tile)
        self.weight_places = [program.b.alloca(weight) for _ in range(sizes.together)]
        self.matrices = matrices_for(program, sizes, self.records) if sizes.matrices else None

    def build(self) -> None:
        p, b, f = self.p, self.p.b, self.f
        with p.tasks("attend_next", f["attend_tasks"]) as task:
            run, head = b.sdiv(task, f["kv_heads"]), b.srem(task, f["kv_heads"])
            sequence = p.at(f["run_sequences"], run)
            start, end = p.at(f["run_starts"], run), p.at(f["run_ends"], run)
            first_member = p.at(f["run_first_members"], run)
            end_member = p.at(f["run_first_members"], b.add(run, integer(1)))
            table = b.add(f["tables"], b.mul(sequence, b.mul(f["table_entries"], integer(4))))
            members = _Members(first_member, end_member, head)
            if self.matrices is None:
                self._by_vectors(members, table, start, end)
                return
            as_matrices = b.icmp_signed("!=", p.at(f["run_matrices"], run), integer(0))
            with b.if_else(as_matrices) as (then, otherwise):
                with then:
                    self._by_matrices(self.matrices, members, table, start, end)
                with otherwise:
                    self._by_vectors(members, table, start, end)

    def _by_vectors(self, members: "_Members", table: Any, start: Any, end: Any) -> None:
        """Few rows, which see the same positions."""
        p, b, f, sizes = self.p, self.p.b, self.f, self.sizes
        self._begin(members, self.records.take_query)
        tile = integer(sizes.tile)
        with p.loop(b.mul(b.sdiv(start, tile), tile), end, sizes.tile) as position:
            keys = self._keys(table, position, members.head)
            next_keys = self._keys(table, self._after(position, end), members.head)
            bounds = self._bounds(position, start, end)
            with p.loop(members.first, members.end) as member:
                group = self.records.group(p.at(f["slots"], member), members.head)
                with p.loop(integer(0), integer(sizes.group_records), sizes.together) as index:
                    self._tile(self.records.of(group, index), keys, next_keys, bounds)

    def _by_matrices(
        self, matrices: Matrices, members: "_Members", table: Any, start: Any, end: Any
    ) -> None:
        """Many rows, each of which may see other positions."""
        p, b, sizes = self.p, self.p.b, self.sizes
        self._begin(members, matrices.take_query)
        tile = integer(sizes.tile)
        rows = b.mul(b.sub(members.end, members.first), integer(sizes.group))
        first = b.mul(b.sdiv(start, tile), tile)
        with p.loop(first, end, sizes.positions_together) as position:
            stop = p.smaller(b.add(position, integer(sizes.positions_together)), end)
            with p.loop(position, stop, sizes.tile) as place:
                keys = self._keys(table, place, members.head)
                next_keys = self._keys(table, self._after(place, end), members.head)
                with p.loop(integer(0), tile) as row:
                    self._ask(next_keys, row)
                    self._ask(b.add(next_keys, self.value_bytes), row)
                number = b.sdiv(b.sub(place, position), tile)
                low, high, _ = self._bounds(place, start, end)
                values = b.add(keys, self.value_bytes)
                matrices.take_keys(number, keys, self.row_bytes)
                matrices.take_values(number, values, self.row_bytes, low, high)
            with p.loop(integer(0), rows, sizes.matrix_rows) as row:
                self._block(matrices, members, row, position)

    def _block(self, matrices: Matrices, members: "_Members", first: Any, position: Any) -> None:
        """Some rows, over the tiles from a position on as far as they see them."""
        p, b, f, sizes = self.p, self.p.b, self.f, self.sizes
        rows = [b.add(first, integer(index)) for index in range(sizes.matrix_rows)]
        mine = [b.add(members.first, b.sdiv(row, integer(sizes.group))) for row in rows]
        there = [b.icmp_signed("<", member, members.end) for member in mine]
        last = b.sub(members.end, integer(1))
        mine = [b.select(is_one, member, last) for is_one, member in zip(there, mine, strict=True)]
        # Members come in the order of what they see.
        start, end = p.at(f["member_starts"], mine[0]), p.at(f["member_ends"], mine[-1])
        stop = b.add(position, integer(sizes.positions_together))
        sees = b.and_(b.icmp_signed("<", position, end), b.icmp_signed("<", start, stop))
        with b.if_then(sees):
            records: list[Any] = []
            for row, member, is_one in zip(rows, mine, there, strict=True):
                group = self.records.group(p.at(f["slots"], member), members.head)
                record = self.records.of(group, b.srem(row, integer(sizes.group)))
                records.append(b.select(is_one, record, matrices.spare))
            for index, scores in enumerate(matrices.scores(records)):
                span = [p.at(f[name], mine[index]) for name in SPANS]
                places = (b.add(position, integer(sizes.tile * n)) for n in range(len(scores)))
                seen = [self._seen(place, *span) for place in places]
                matrices.take_weights(index, self._weights(records[index], scores, seen))
            tile, seen_positions = integer(sizes.tile), b.sub(p.smaller(stop, end), position)
            tiles = b.sdiv(b.add(seen_positions, integer(sizes.tile - 1)), tile)
            matrices.mix(records, b.mul(tiles, tile))

    def _after(self, position: Any, end: Any) -> Any:
        """Where the next tile begins; the last one has none but itself."""
        b = self.p.b
        after = b.add(position, integer(self.sizes.tile))
        return b.select(b.icmp_signed("<", after, end), after, position)

    def _begin(self, members: "_Members", take_query: Callable[[Any, Any], None]) -> None:
        """The records of these rows: a query each, and nothing yet."""
        p, b, f, sizes, records = self.p, self.p.b, self.f, self.sizes, self.records
        with p.loop(members.first, members.end) as member:
            group = records.group(p.at(f["slots"], member), members.head)
            query = b.add(f["query"], b.mul(p.at(f["members"], member), f["query_row"]))
            first = b.mul(members.head, integer(sizes.group))
            with p.loop(integer(0), integer(sizes.group_records)) as index:
                record = records.of(group, index)
                # Records to spare take the last head's query: a second answer that nobody reads.
                last = integer(sizes.group - 1)
                mine = b.add(first, b.select(b.icmp_signed("<", index, last), index, last))
                take_query(b.add(query, b.mul(mine, f["query_head"])), record)
                for chunk in range(sizes.chunks):
                    p.store(p.constant(0.0, sizes.lanes), records.values(record, chunk))
                p.store(p.constant(0.0, sizes.tile), records.sums(record))
                p.store(p.constant(NOTHING, sizes.tile), records.reference(record))

    def _keys(self, table: Any, position: Any, head: Any) -> Any:
        """The address of a position's key; its value is `value_bytes` further."""
        b, f, sizes = self.p.b, self.f, self.sizes
        size = integer(sizes.page_size)
        entry = b.gep(b.inttoptr(table, I32.as_pointer()), [b.sdiv(position, size)])
        page = b.sext(b.load(entry), I64)
        place = b.add(f["pages"], b.mul(page, f["page_bytes"]))
        place = b.add(place, b.mul(b.srem(position, size), self.row_bytes))
        return b.add(place, b.mul(head, integer(sizes.head_dim * sizes.element_bytes)))

    def _ask(self, place: Any, row: Any) -> None:
        """For the key or the value of a tile's row."""
        row = self.p.b.add(place, self.p.b.mul(self.row_bytes, row))
        self.p.prefetch(row, self.sizes.head_dim * self.sizes.element_bytes)

    def _bounds(self, position: Any, start: Any, end: Any) -> tuple[Any, Any, Any]:
        """The rows of a tile that are inside the run: the first, the one behind the last, and for
        each whether it is."""
        b, zero, tile = self.p.b, integer(0), integer(self.sizes.tile)
        before, left = b.sub(start, position), b.sub(end, position)
        low = b.select(b.icmp_signed(">", before, zero), before, zero)
        high = self.p.smaller(left, tile)
        return low, high, self._seen(position, start, end)

    def _seen(self, position: Any, start: Any, end: Any) -> Any:
        """Which positions of a tile are not before start, and before end."""
        p, b, sizes = self.p, self.p.b, self.sizes
        places = ir.Constant(ir.VectorType(I32, sizes.tile), list(range(sizes.tile)))
        lows, highs = (
            p.splat(b.trunc(b.sub(bound, position), I32), sizes.tile) for bound in (start, end)
        )
        above = b.icmp_signed(">=", places, lows)
        return b.and_(above, b.icmp_signed("<", places, highs))

    def _tile(self, first: Any, keys: Any, next_keys: Any, bounds: tuple[Any, Any, Any]) -> None:
        """Some query heads, whose records lie from `first` on, over the positions of a tile."""
        p, b, sizes, records = self.p, self.p.b, self.sizes, self.records
        mine = [records.of(first, integer(index)) for index in range(sizes.together)]
        queries = [
            [p.load(records.query(record, chunk), sizes.lanes) for chunk in range(sizes.chunks)]
            for record in mine
        ]
        low, high, inside = bounds
        products: list[list[Any]] = [[] for _ in mine]
        for row in range(sizes.tile):
            place = b.add(keys, b.mul(self.row_bytes, integer(row)))
            self._ask(next_keys, integer(row))
            sums: list[Any] = [None] * len(mine)
            for chunk, key in self._chunks(place):
                for index, query in enumerate(queries):
                    sums[index] = (
                        b.fmul(query[chunk], key)
                        if chunk == 0
                        else p.multiply_add(query[chunk], key, sums[index])
                    )
            for index, each in enumerate(sums):
                products[index].append(each)
        for index, record in enumerate(mine):
            (weights,) = self._weights(record, [p.totals(products[index])], [inside])
            b.store(weights, self.weight_places[index])
        kept = [
            p.load(records.values(record, chunk), sizes.lanes)
            for record in mine
            for chunk in range(sizes.chunks)
        ]
        values = b.add(keys, self.value_bytes)
        with p.folding(low, high, kept) as (row, mixed, after):
            place = b.add(values, b.mul(self.row_bytes, row))
            self._ask(b.add(next_keys, self.value_bytes), row)
            chunks = self._chunks(place)
            for index, weights in enumerate(self.weight_places):
                lane = b.gep(b.bitcast(weights, F32.as_pointer()), [row])
                one = p.splat(b.load(lane), sizes.lanes)
                for chunk, value in chunks:
                    sum_before = mixed[index * sizes.chunks + chunk]
                    after.append(p.multiply_add(one, value, sum_before))
        for index, record in enumerate(mine):
            for chunk in range(sizes.chunks):
                p.store(mixed[index * sizes.chunks + chunk], records.values(record, chunk))

    def _chunks(self, row: Any) -> list[tuple[int, Any]]:
        """The vectors of a query, key or value, and their numbers in a record."""
        sizes = self.sizes
        return list(self.p.row(row, sizes.chunks, sizes.lanes, sizes.bfloat16))

    def _weights(self, record: Any, scores: list[Any], seen: list[Any]) -> list[Any]:
        """exp(score - reference) of tiles. A score above the reference by more than `SLACK` is the
        next reference, and what the record holds is made relative to it."""
        p, b, sizes, records = self.p, self.p.b, self.sizes, self.records
        if sizes.soft_cap:
            scores = [self._capped(each) for each in scores]
        nothing = p.constant(NOTHING, sizes.tile)
        scores = [
            b.select(inside, each, nothing) for inside, each in zip(seen, scores, strict=True)
        ]
        before = p.load(records.reference(record), sizes.tile)
        most = scores[0]
        for each in scores[1:]:
            most = b.select(b.fcmp_ordered(">", each, most), each, most)
        limit = b.fadd(before, p.constant(SLACK, sizes.tile))
        with b.if_then(p.any(b.fcmp_ordered(">", most, limit)), likely=False):
            after = p.splat(p.largest(most), sizes.tile)
            less = p.exp(b.fsub(before, after))
            one = p.splat(p.first(less), sizes.lanes)
            for chunk in range(sizes.chunks):
                place = records.values(record, chunk)
                p.store(b.fmul(p.load(place, sizes.lanes), one), place)
            sums = records.sums(record)
            p.store(b.fmul(p.load(sums, sizes.tile), less), sums)
            p.store(after, records.reference(record))
        reference = p.load(records.reference(record), sizes.tile)
        sums = p.load(records.sums(record), sizes.tile)
        weights: list[Any] = []
        for inside, each in zip(seen, scores, strict=True):
            # The least that exp gives is above zero, and one value may be as large as another is
            # small.
            weight = b.select(inside, p.exp(b.fsub(each, reference)), p.constant(0.0, sizes.tile))
            weights.append(weight)
            sums = b.fadd(sums, weight)
        p.store(sums, records.sums(record))
        return weights

    def _capped(self, scores: Any) -> Any:
        """cap * tanh(score / cap)."""
        p, b, tile = self.p, self.p.b, self.sizes.tile
        cap = p.splat(p.float_field("soft_cap"), tile)
        twice = p.exp(b.fdiv(b.fmul(scores, p.constant(2.0, tile)), cap))
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        below = b.fdiv(p.constant(2.0, tile), b.fadd(twice, p.constant(1.0, tile)))
        return b.fmul(cap, b.fsub(p.constant(1.0, tile), below))


@dataclass(frozen=True, slots=True)
class _Members:
    """Of a run, first to end, and the kv head that a task computes them for."""

    first: Any
    end: Any
    head: Any


class _Join:
    """Each task: one row and one kv head. Writes the result."""

    def __init__(self, program: Program, sizes: Sizes) -> None:
        self.p, self.sizes = program, sizes
        self.records = Records(program, sizes)

    def build(self) -> None:
        p, b, sizes = self.p, self.p.b, self.sizes
        names = ("join_tasks", "kv_heads", "rows", "first_slots", "result", "sinks")
        f = {name: p.field(name) for name in names}
        heads = b.mul(f["kv_heads"], integer(sizes.group))
        with p.tasks("join_next", f["join_tasks"]) as task:
            index, kv_head = b.sdiv(task, f["kv_heads"]), b.srem(task, f["kv_heads"])
            row = p.at(f["rows"], index)
            first = p.at(f["first_slots"], index)
            end = p.at(f["first_slots"], b.add(index, integer(1)))
            with p.loop(integer(0), integer(sizes.group)) as member:
                head = b.add(b.mul(kv_head, integer(sizes.group)), member)
                place = b.add(b.mul(row, heads), head)
                size = sizes.head_dim * sizes.element_bytes
                result = b.add(f["result"], b.mul(place, integer(size)))
                sink = None
                if sizes.sinks:
                    sink = p.first(p.load(b.add(f["sinks"], b.mul(head, integer(4))), 1))
                self._one(first, end, kv_head, member, result, sink)

    def _one(
        self, first: Any, end: Any, kv_head: Any, member: Any, result: Any, sink: Any | None
    ) -> None:
        """One query head's parts, `first` to `end`."""
        p, b, sizes, records = self.p, self.p.b, self.sizes, self.records

        def record(slot: Any) -> Any:
            return records.of(records.group(slot, kv_head), member)

        least = p.constant(NOTHING, sizes.tile) if sink is None else p.splat(sink, sizes.tile)
        with p.folding(first, end, [least]) as (slot, (largest,), after):
            other = p.load(records.reference(record(slot)), sizes.tile)
            after.append(b.select(b.fcmp_ordered(">", other, largest), other, largest))
        zeros = [p.constant(0.0, sizes.tile)]
        zeros += [p.constant(0.0, sizes.lanes)] * sizes.chunks
        with p.folding(first, end, zeros) as (slot, sums, after):
            part = record(slot)
            less = p.exp(b.fsub(p.load(records.reference(part), sizes.tile), largest))
            after.append(p.multiply_add(less, p.load(records.sums(part), sizes.tile), sums[0]))
            one = p.splat(p.first(less), sizes.lanes)
            for chunk, value in enumerate(sums[1:]):
                mixed = p.load(records.values(part, chunk), sizes.lanes)
                after.append(p.multiply_add(one, mixed, value))
        total = p.total(sums[0])
        if sink is not None:
            total = b.fadd(total, p.first(p.exp(b.fsub(least, largest))))
        total = p.splat(total, sizes.lanes)
        values = [b.fdiv(value, total) for value in sums[1:]]
        for first in range(0, sizes.chunks, sizes.vectors_a_load):
            place = b.add(result, integer(first * sizes.lanes * sizes.element_bytes))
            if sizes.bfloat16:
                p.store_pairs(values[first], values[first + 1], place)
            else:
                p.store(values[first], place)


def append_text(row_bytes: int, page_size: int) -> str:
    """The function `append`: row_bytes of each row and head, K and V, to their pages."""
    module = ir.Module("append")
    p = Program(module, "append", {name: index for index, name in enumerate(APPEND_FIELDS)})
    b, f = p.b, {name: p.field(name) for name in APPEND_FIELDS if "next" not in name}
    position_bytes = b.mul(f["kv_heads"], integer(row_bytes))
    value_bytes = b.mul(position_bytes, integer(page_size))
    with p.tasks("append_next", f["append_tasks"]) as task:
        first = b.mul(task, integer(COPIES_A_TASK))
        end = p.smaller(b.add(first, integer(COPIES_A_TASK)), f["writes"])
        with p.loop(first, end) as write:
            row = p.at(f["rows"], write)
            target = b.add(f["pages"], b.mul(p.at(f["write_pages"], write), f["page_bytes"]))
            offset = p.at(f["write_offsets"], write)
            target = b.add(target, b.mul(offset, position_bytes))
            for name, place in (("key", target), ("value", b.add(target, value_bytes))):
                source = b.add(f[name], b.mul(row, f[f"{name}_row"]))
                with p.loop(integer(0), f["kv_heads"]) as head:
                    p.copy(
                        b.add(source, b.mul(head, f[f"{name}_head"])),
                        b.add(place, b.mul(head, integer(row_bytes))),
                        row_bytes,
                    )
    return str(module)
