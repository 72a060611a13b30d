"""One token from each row of logits: the code.

Theory: a task is a row, and one thread does all of it, always in the same order, so its token is a
function of the row alone. Nothing is sorted. A row is read for its best logit, then for its
weights, exp((logit - best) / temperature) in float64, which are kept, with a sum for each block of
them. What a filter leaves is told by the last weight that stays, so top_k and top_p look for that
(`_Selection`), and min_p is one as it comes. Then sums of blocks lead to the block where the noise
falls, and its weights to the token.

    scratch of a thread:   weights [padded] float64 | candidates [padded] float64
                           | sums of blocks [padded / BLOCK] float64
                           | largest of blocks [padded / BLOCK, LANES] float64
                           | counts [BUCKETS] int64 | sums [BUCKETS] float64
                           | adjusted [padded] float32 | tail [LANES] float32

The tail is a row's last vector, filled up with -inf; an adjusted row is a copy.
"""

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from chatserve_kernels.cpu.language import F32, I32, I64, Program, integer
from chatserve_kernels.cpu.wide import F64, LANES, Cell, Wide

FIELDS = (
    *("next", "done", "slots", "rows", "columns", "logits", "logits_row"),
    *(
        "scratch",
        "scratch_bytes",
        "candidates",
        "blocks",
        "largest",
        "counts",
        "sums",
        "adjusted",
        "tail",
    ),
    *("temperature", "min_p", "top_k", "top_p", "noise", "logarithms"),
    *("starts", "ids", "bias", "repetition", "subtracted"),
    *("tokens", "finite", "bests", "totals", "own"),
)
BLOCK = 256  # weights that have a sum of their own
BUCKETS = 1024
_BITS = 10  # that BUCKETS tell apart
_ONE = 0x3FF << 52  # the bits of 1.0
_FIRST_SHIFT = 48  # 16 buckets for each power of two, as far as 2^-64
_FAR_SHIFT = 52  # for all that is further
_ALL = 1 << 53  # more than there are tokens
_LEAST = 2.0**-1022  # of weights; smaller ones are 0
_MASK = ir.IntType(LANES)


def choose_text() -> str:
    """The function `choose`."""
    places = {name: index for index, name in enumerate(FIELDS)}
    p = Program(ir.Module("choose"), "choose", places)
    _Row(p).build()
    return str(p.module)


class _Selection:
    """The last weight that stays of those from `least` on: the first in falling order at which so
    many, or so much weight, are reached.

    Weights that can be it are copied, and put in buckets by their distance from 1 in bits. What
    lies before the bucket where it must be is added up, and the bucket is searched in the same way,
    by the next bits, until its weights are equal.
    """

    def __init__(self, p: Program, wide: Wide, arrays: dict[str, Any]) -> None:
        self.p, self.wide, self.arrays = p, wide, arrays
        self._count, self._base, self._shift, self._many, self._wanted = (
            Cell(p, I64) for _ in range(5)
        )
        self.enough = Cell(p, ir.IntType(1))  # whether there were so many
        self._much = Cell(p, F64)

    def find(
        self, weights: Any, columns: Any, least: Any, count: Any, share: Any
    ) -> tuple[Any, Any, Any]:
        """The last weight, how many of it stay, and how many there are. least: above 0."""
        p, b, wide = self.p, self.p.b, self.wide
        self._take(weights, columns, least)
        self._base.set(integer(0))
        self._many.set(integer(0))
        self._much.set(wide.number(0.0))
        self._wanted.set(p.smaller(count, self._count.get()))
        self.enough.set(b.icmp_signed("<=", count, self._count.get()))
        self._shift.set(integer(_FIRST_SHIFT))

        def narrowed(_: Any) -> Any:
            shift = self._shift.get()
            self._narrow(share)
            alone = b.icmp_signed("==", self._count.get(), integer(1))
            return b.or_(alone, b.icmp_signed("==", shift, integer(0)))

        wide.search(integer(0), integer(_ALL), narrowed)
        last, equal = wide.get(self.arrays["candidates"], integer(0)), self._count.get()
        missing = b.fdiv(b.fsub(share, self._much.get()), last)
        ceil = p.intrinsic("llvm.ceil.f64", F64, [F64])
        missing = b.call(ceil, [wide.least(missing, wide.number(float(_ALL)))])
        stay = b.fptosi(missing, I64)
        stay = b.select(b.icmp_signed("<", stay, integer(1)), integer(1), stay)
        stay = p.smaller(stay, b.sub(self._wanted.get(), self._many.get()))
        return last, stay, equal

    def _take(self, weights: Any, columns: Any, least: Any) -> None:
        """Copy the weights that are not less."""
        p, b, wide = self.p, self.p.b, self.wide
        candidates = self.arrays["candidates"]
        self._count.set(integer(0))
        leasts = p.splat(least, LANES)
        with p.loop(integer(0), columns, LANES) as column:
            vector = wide.load(weights, column)
            is_there = b.fcmp_ordered(">=", vector, leasts)
            with b.if_then(p.any(is_there)):
                count = self._count.get()
                for lane in range(LANES):
                    # Written in any case, and overwritten by the next where it does not count.
                    at = ir.Constant(I32, lane)
                    wide.set(b.extract_element(vector, at), candidates, count)
                    count = b.add(count, b.zext(b.extract_element(is_there, at), I64))
                self._count.set(count)

    def _bucket(self, weight: Any) -> Any:
        b = self.p.b
        far = b.sub(b.sub(integer(_ONE), b.bitcast(weight, I64)), self._base.get())
        return self.p.smaller(b.lshr(far, self._shift.get()), integer(BUCKETS - 1))

    def _narrow(self, share: Any) -> None:
        """From the candidates to those of the bucket where the last one must be."""
        p, b, wide = self.p, self.p.b, self.wide
        candidates, counts, sums = (self.arrays[name] for name in ("candidates", "counts", "sums"))
        with p.loop(integer(0), integer(BUCKETS)) as bucket:
            wide.set(integer(0), counts, bucket)
            wide.set(wide.number(0.0), sums, bucket)
        with p.loop(integer(0), self._count.get()) as index:
            weight = wide.get(candidates, index)
            bucket = self._bucket(weight)
            wide.set(b.add(wide.get(counts, bucket, I64), integer(1)), counts, bucket)
            wide.set(b.fadd(wide.get(sums, bucket), weight), sums, bucket)
        all_of_them = b.add(self._many.get(), self._count.get())

        def reached(bucket: Any) -> Any:
            many = b.add(self._many.get(), wide.get(counts, bucket, I64))
            much = b.fadd(self._much.get(), wide.get(sums, bucket))
            enough = b.or_(
                b.icmp_signed(">=", many, self._wanted.get()), b.fcmp_ordered(">=", much, share)
            )
            # Two ways to add may differ in the last bit: not beyond the last one there is.
            enough = b.or_(enough, b.icmp_signed("==", many, all_of_them))
            # Before something is there nothing is enough.
            enough = b.and_(enough, b.icmp_signed(">", wide.get(counts, bucket, I64), integer(0)))
            with b.if_then(b.not_(enough)):
                self._many.set(many)
                self._much.set(much)
            return enough

        found = wide.search(integer(0), integer(BUCKETS), reached)
        with p.folding(integer(0), self._count.get(), [integer(0)]) as (index, (kept,), after):
            weight = wide.get(candidates, index)
            is_in = b.icmp_signed("==", self._bucket(weight), found)
            wide.set(weight, candidates, kept)
            after.append(b.add(kept, b.zext(is_in, I64)))
        self._count.set(kept)
        self._go_on(found)

    def _go_on(self, found: Any) -> None:
        """Base and shift of the next narrowing."""
        b = self.p.b
        shift = self._shift.get()
        far = b.and_(
            b.icmp_signed("==", shift, integer(_FIRST_SHIFT)),
            b.icmp_signed("==", found, integer(BUCKETS - 1)),
        )
        base = b.add(self._base.get(), b.shl(found, shift))
        less = b.sub(shift, integer(_BITS))
        less = b.select(b.icmp_signed("<", less, integer(0)), integer(0), less)
        self._base.set(base)
        self._shift.set(b.select(far, integer(_FAR_SHIFT), less))


class _Row:
    """Each task: one row."""

    def __init__(self, p: Program) -> None:
        self.p, self.wide = p, Wide(p)
        self.f = {name: p.field(name) for name in FIELDS if name not in ("next", "done", "slots")}
        b, f = p.b, self.f
        slot = b.atomic_rmw("add", p.field_place("slots"), integer(1), "monotonic")
        scratch = b.add(f["scratch"], b.mul(slot, f["scratch_bytes"]))
        names = ("candidates", "blocks", "largest", "counts", "sums", "adjusted", "tail")
        self.arrays = {name: b.add(scratch, f[name]) for name in names} | {"weights": scratch}
        self.source, self.tail, self.token = (Cell(p, I64) for _ in range(3))
        self.best, self.least, self.share = (Cell(p, F64) for _ in range(3))
        self.good = Cell(p, ir.IntType(1))
        self.selection = _Selection(p, self.wide, self.arrays)
        self.whole = b.and_(f["columns"], integer(-LANES))

    def build(self) -> None:
        p, b, f, wide = self.p, self.p.b, self.f, self.wide
        with p.tasks("next", f["rows"]) as row:
            self.token.set(integer(0))
            self.good.set(ir.Constant(ir.IntType(1), 1))
            self.source.set(b.add(f["logits"], b.mul(row, f["logits_row"])))
            self._begin(self.arrays["tail"])
            wide.set(self.best.get(), f["bests"], row)
            one = wide.number(1.0)
            wide.set(one, f["totals"], row)
            asked = b.fcmp_ordered("!=", wide.get(f["logarithms"], row), wide.number(0.0))
            with b.if_then(b.and_(asked, self.good.get())):
                wide.set(self._weigh(one, wide.number(0.0)), f["totals"], row)
            with b.if_then(b.icmp_signed("!=", f["starts"], integer(0))):
                start, end = (p.at(f["starts"], each) for each in (row, b.add(row, integer(1))))
                with b.if_then(b.icmp_signed("<", start, end)):
                    self._adjust(start, end)
            with b.if_then(self.good.get()):
                temperature = wide.get(f["temperature"], row)
                greedy = b.fcmp_ordered("==", temperature, wide.number(0.0))
                with b.if_else(greedy) as (then, otherwise):
                    with then:
                        self._take_best()
                    with otherwise:
                        self._draw(row, temperature)
            token = self.token.get()
            given = b.add(f["logits"], b.mul(row, f["logits_row"]))
            wide.set(b.fpext(wide.get(given, token, F32), F64), f["own"], row)
            wide.set(token, f["tokens"], row)
            wide.set(b.uitofp(self.good.get(), F64), f["finite"], row)

    def _begin(self, tail: Any) -> None:
        """The source's tail, and its best logit; not good where that is not finite."""
        p, b, wide = self.p, self.p.b, self.wide
        source, columns = self.source.get(), self.f["columns"]
        p.store(p.constant(-math.inf, LANES), tail)
        begin = b.add(source, b.mul(self.whole, integer(4)))
        wide.copied(begin, tail, integer(0), b.sub(columns, self.whole))
        self.tail.set(tail)
        nothing = [p.constant(-math.inf, LANES), p.splat(ir.Constant(ir.IntType(1), 0), LANES)]
        with p.folding(integer(0), columns, nothing, LANES) as (column, (most, wrong), after):
            vector = self._logits(column)
            after.append(b.select(b.fcmp_ordered(">", vector, most), vector, most))
            after.append(b.or_(wrong, b.fcmp_unordered("uno", vector, vector)))
        best = b.fpext(p.largest(most), F64)
        self.best.set(best)
        finite = b.fcmp_ordered("==", b.fsub(best, best), wide.number(0.0))
        finite = b.and_(finite, b.not_(p.any(wrong)))
        self.good.set(b.and_(self.good.get(), finite))

    def _logits(self, column: Any) -> Any:
        """A vector of the source; the last one from its tail."""
        b = self.p.b
        place = b.add(self.source.get(), b.mul(column, integer(4)))
        is_whole = b.icmp_signed("<", column, self.whole)
        return self.p.load(b.select(is_whole, place, self.tail.get()), LANES)

    def _adjust(self, start: Any, end: Any) -> None:
        """A copy becomes the source, and what is said of some logits happens there."""
        p, b, f, wide = self.p, self.p.b, self.f, self.wide
        adjusted = self.arrays["adjusted"]
        with p.loop(integer(0), f["columns"], LANES) as column:
            p.store(self._logits(column), b.add(adjusted, b.mul(column, integer(4))))
        with p.loop(start, end) as index:
            token = p.at(f["ids"], index)
            bias, repetition, subtracted = (
                wide.get(f[name], index, F32) for name in ("bias", "repetition", "subtracted")
            )
            value = b.fadd(wide.get(adjusted, token, F32), bias)
            is_above = b.fcmp_ordered(">", value, ir.Constant(F32, 0.0))
            value = b.select(is_above, b.fdiv(value, repetition), b.fmul(value, repetition))
            nothing = ir.Constant(F32, -math.inf)
            banned = b.fcmp_ordered("==", subtracted, ir.Constant(F32, math.inf))
            wide.set(b.select(banned, nothing, b.fsub(value, subtracted)), adjusted, token)
        self.source.set(adjusted)
        self._begin(self.arrays["tail"])

    def _take_best(self) -> None:
        p, b = self.p, self.p.b
        best = p.splat(b.fptrunc(self.best.get(), F32), LANES)

        def equal(column: Any) -> Any:
            return b.fcmp_ordered("==", self._logits(column), best)

        column = self.wide.search(
            integer(0), self.f["columns"], lambda column: p.any(equal(column)), LANES
        )
        # It has been found: the best one is among them.
        mask = b.bitcast(equal(column), _MASK)
        lane = b.cttz(mask, ir.Constant(ir.IntType(1), 1))
        self.token.set(b.add(column, b.zext(lane, I64)))

    def _weigh(self, temperature: Any, least: Any) -> Any:
        """Weights, and the sum of those that are not less, of each block and of all."""
        p, b, wide = self.p, self.p.b, self.wide
        best = p.splat(self.best.get(), LANES)
        temperatures = p.splat(temperature, LANES)

        def weights(column: Any) -> Any:
            relative = b.fsub(wide.widened(self._logits(column)), best)
            vector = wide.exp(b.fdiv(relative, temperatures))
            wide.store(vector, self.arrays["weights"], column)
            return vector

        return self._add_up(least, weights)

    def _add_up(self, least: Any, weights: Callable[[Any], Any]) -> Any:
        """The same of weights that some function gives, a vector from a column on."""
        p, b, wide = self.p, self.p.b, self.wide
        leasts, columns = p.splat(least, LANES), self.f["columns"]
        nothing = wide.vector(0.0)
        zero = wide.number(0.0)
        with p.folding(integer(0), columns, [zero], BLOCK) as (first, (total,), totals):
            end = p.smaller(b.add(first, integer(BLOCK)), columns)
            initial = [nothing, nothing]
            with p.folding(first, end, initial, LANES) as (column, (sums, most), after):
                vector = weights(column)
                stays = b.fcmp_ordered(">=", vector, leasts)
                after.append(b.fadd(sums, b.select(stays, vector, nothing)))
                after.append(b.select(b.fcmp_ordered(">", vector, most), vector, most))
            number, block = b.sdiv(first, integer(BLOCK)), wide.total(sums)
            wide.set(block, self.arrays["blocks"], number)
            wide.store(most, self.arrays["largest"], b.mul(number, integer(LANES)))
            totals.append(b.fadd(total, block))
        return total

    def _draw(self, row: Any, temperature: Any) -> None:
        """The token that the noise falls on."""
        p, b, f, wide = self.p, self.p.b, self.f, self.wide
        self.least.set(wide.get(f["min_p"], row))
        self.share.set(self._weigh(temperature, self.least.get()))
        top_k, top_p = b.fptosi(wide.get(f["top_k"], row), I64), wide.get(f["top_p"], row)
        with p.loop(integer(0), integer(3)) as stage:
            first, second = (b.icmp_signed("==", stage, integer(each)) for each in (0, 1))
            most = b.mul(b.sdiv(f["columns"], integer(BLOCK)), integer(LANES))
            asked = b.icmp_signed(">", top_k, integer(0))
            asked_first = b.and_(asked, b.icmp_signed("<=", top_k, most))
            asked_last = b.fcmp_ordered("<", top_p, wide.number(1.0))
            asked = b.select(first, asked_first, b.select(second, asked, asked_last))
            with b.if_then(asked):
                self._narrow(first, second, top_k, top_p)
        self._fall(wide.get(f["noise"], row))

    def _narrow(self, first: Any, second: Any, top_k: Any, top_p: Any) -> None:
        """Stages: of so many weights, each the largest of some, none less than the last of them is
        among the best of all; top_k; top_p."""
        b, f, wide = self.p.b, self.f, self.wide
        weights, columns, whole = self.arrays["weights"], f["columns"], self.share.get()
        share = b.fmul(top_p, whole)
        # All that are less than it together could not be what is missing.
        far = b.fmul(b.fsub(wide.number(1.0), top_p), whole)
        far = b.fdiv(far, b.fmul(wide.number(2.0), b.sitofp(columns, F64)))
        by_count = b.or_(first, second)
        far = b.select(by_count, wide.number(_LEAST), far)
        least = wide.most(wide.most(self.least.get(), far), wide.number(_LEAST))
        blocks = b.sdiv(b.add(columns, integer(BLOCK - 1)), integer(BLOCK))
        last, stay, equal = self.selection.find(
            b.select(first, self.arrays["largest"], weights),
            b.select(first, b.mul(blocks, integer(LANES)), columns),
            least,
            b.select(by_count, top_k, integer(_ALL)),
            b.select(by_count, wide.number(math.inf), share),
        )
        with b.if_then(b.or_(self.selection.enough.get(), b.not_(first))):
            self.least.set(last)
        with b.if_then(b.not_(first)):
            with b.if_then(b.icmp_signed("<", stay, equal), likely=False):
                self._leave_out(last, stay)
            self.share.set(self._add_up(last, lambda column: wide.load(weights, column)))

    def _leave_out(self, last: Any, stay: Any) -> None:
        """Of weights equal to the last one those behind the first ones that stay."""
        p, b, wide, weights = self.p, self.p.b, self.wide, self.arrays["weights"]
        with p.folding(integer(0), self.f["columns"], [integer(0)]) as (column, (seen,), after):
            weight = wide.get(weights, column)
            is_equal = b.fcmp_ordered("==", weight, last)
            seen_now = b.add(seen, b.zext(is_equal, I64))
            goes = b.and_(is_equal, b.icmp_signed(">", seen_now, stay))
            wide.set(b.select(goes, wide.number(0.0), weight), weights, column)
            after.append(seen_now)

    def _fall(self, noise: Any) -> None:
        p, b, wide = self.p, self.p.b, self.wide
        total = self.share.get()
        # The product may round up to the total itself, beyond every token.
        below = b.bitcast(b.sub(b.bitcast(total, I64), integer(1)), F64)
        target = wide.least(b.fmul(noise, total), below)
        columns, blocks = self.f["columns"], self.arrays["blocks"]
        sum_before = self.share
        sum_before.set(wide.number(0.0))

        def beyond(first: Any) -> Any:
            block = wide.get(blocks, b.sdiv(first, integer(BLOCK)))
            after = b.fadd(sum_before.get(), block)
            is_beyond = b.fcmp_ordered(">", after, target)
            with b.if_then(b.not_(is_beyond)):
                sum_before.set(after)
            return is_beyond

        first = wide.search(integer(0), columns, beyond, BLOCK)
        end = p.smaller(b.add(first, integer(BLOCK)), columns)
        least, weights = self.least.get(), self.arrays["weights"]

        def falls(column: Any) -> Any:
            weight = wide.get(weights, column)
            stays = b.and_(
                b.fcmp_ordered(">=", weight, least), b.fcmp_ordered(">", weight, wide.number(0.0))
            )
            after = b.fadd(sum_before.get(), weight)
            with b.if_then(stays):
                sum_before.set(after)
                # A block's sum may be more than its weights one by one: then its last token.
                self.token.set(column)
            return b.and_(stays, b.fcmp_ordered(">", after, target))

        wide.search(first, end, falls)
