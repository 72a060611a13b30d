"""Linear layers whose weights lie in blocks of outputs: the code.

Theory: each task of `multiply` is a block of outputs for all rows: its weights come from memory
once, and for further rows from the processor's cache. Layers that have their inputs in common are
one call: a table says where each block's weights lie. A pair of inputs for 16 outputs is one
instruction, with bfloat16 (AVX512_BF16) as with int8.

For int8 `round` first writes each row of activations as integers of 16 bits, with a scale for each
group of inputs, so that there is nothing to widen but the weights. An input is within 2^-16 of the
largest one of its group: finer than bfloat16 but for inputs that are less than a hundredth of it.
Sums of a group are exact, and groups are added in their order, as are pairs of bfloat16 and
float32s.
So a row gives the same bits whatever rows come with it, on any number of threads.

    table, int64:                [blocks, addresses of weights, scales, bias]
    weights of a block:          [pairs of inputs, 64 outputs, 2], bfloat16 or int8;
                                 [inputs, 64 outputs], float32
    scales of a block, float32:  [groups of inputs, 64 outputs], for int8
    bias of a block, float32:    [64 outputs]

With int8 a row with a number that is not finite gives NaN throughout.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from chatserve_kernels.cpu.language import F32, I8, I16, I32, Program, integer

BLOCK = 64  # outputs of a task; results have room for whole blocks
GROUP = 128  # inputs that share a scale; 128 * 127 * 32767 is well inside 32 bits
ROUND_MAX = 32767
TABLE_COLUMNS = 3
FIELDS = (
    *("round_next", "round_done", "round_tasks", "multiply_next", "multiply_done"),
    *("blocks", "rows", "columns", "pairs", "source", "source_row", "rounded", "row_scales"),
    *("table", "result", "result_row", "added"),
)
_LANES = 16
_VECTORS = BLOCK // _LANES
_ROWS = 4  # at most that meet weights together; a power of two
# Vectors of sums, of 16, that registers hold beside what is added: AVX-512's, or AVX2's.
_WIDE_SUMS, _NARROW_SUMS = 16, 4
_LEAST = 1e-33  # a row whose largest number is smaller is rounded as if it were this
_INFINITY_BITS, _NAN_BITS = 0x7F800000, 0x7FC00000


def int8_text(*, bfloat16: bool, wide: bool) -> str:
    """The functions `round` and `multiply` for weights of int8. bfloat16: what comes and goes;
    float32 otherwise. wide: whether there are 32 registers of 512 bits."""
    module = ir.Module("int8")
    _Round(Program(module, "round", _places()), bfloat16).build()
    _Int8Multiply(Program(module, "multiply", _places()), bfloat16, wide).build()
    return str(module)


def bfloat16_text(*, wide: bool) -> str:
    """The function `multiply` for bfloat16 throughout. Only for processors with AVX512_BF16."""
    module = ir.Module("bfloat16")
    _BFloat16Multiply(Program(module, "multiply", _places()), True, wide).build()
    return str(module)


def float32_text(*, wide: bool) -> str:
    """The function `multiply` for float32 throughout."""
    module = ir.Module("float32")
    _Float32Multiply(Program(module, "multiply", _places()), False, wide).build()
    return str(module)


def _places() -> dict[str, int]:
    return {name: index for index, name in enumerate(FIELDS)}


class _Round:
    """Each task: one row."""

    def __init__(self, program: Program, bfloat16: bool) -> None:
        self.p, self.bfloat16 = program, bfloat16
        self.item = 2 if bfloat16 else 4

    def build(self) -> None:
        p, b = self.p, self.p.b
        names = ("round_tasks", "columns", "pairs", "source", "source_row", "rounded", "row_scales")
        f = {name: p.field(name) for name in names}
        groups = b.sdiv(b.add(f["columns"], integer(GROUP - 1)), integer(GROUP))
        with p.tasks("round_next", f["round_tasks"]) as row:
            source = b.add(f["source"], b.mul(row, f["source_row"]))
            target = b.add(f["rounded"], b.mul(row, b.mul(f["pairs"], integer(4))))
            scales = b.add(f["row_scales"], b.mul(row, b.mul(groups, integer(4))))
            with p.loop(integer(0), groups) as group:
                first = b.mul(group, integer(GROUP))
                end = p.smaller(b.add(first, integer(GROUP)), f["columns"])
                scale = b.add(scales, b.mul(group, integer(4)))
                self._group(source, target, b.inttoptr(scale, F32.as_pointer()), first, end)

    def _group(self, source: Any, target: Any, scale: Any, first: Any, end: Any) -> None:
        """The inputs of a row that share a scale, from first to end, and the scale to its place."""
        p, b = self.p, self.p.b
        whole = b.add(first, b.and_(b.sub(end, first), integer(-_LANES)))
        with p.folding(first, whole, [p.integers(0, _LANES)], _LANES) as (column, (most,), after):
            after.append(self._larger(most, source, column))
        largest = self._reduced(most)
        with p.folding(whole, end, [p.integers(0, 1)]) as (column, (most,), after):
            after.append(self._larger(most, source, column))
        last = p.first(most)
        largest = b.select(b.icmp_signed(">", last, largest), last, largest)
        finite = b.icmp_signed("<", largest, ir.Constant(I32, _INFINITY_BITS))
        least = ir.Constant(F32, _LEAST)
        number = b.bitcast(largest, F32)
        number = b.select(b.fcmp_ordered(">", number, least), number, least)
        nan = b.bitcast(ir.Constant(I32, _NAN_BITS), F32)
        b.store(b.select(finite, b.fdiv(number, ir.Constant(F32, float(ROUND_MAX))), nan), scale)
        factor = b.fdiv(ir.Constant(F32, float(ROUND_MAX)), number)
        with p.loop(first, whole, _LANES) as column:
            self._write(source, target, column, p.splat(factor, _LANES))
        with p.loop(whole, end) as column:
            self._write(source, target, column, p.splat(factor, 1))

    def _load(self, source: Any, column: Any, lanes: int) -> Any:
        place = self.p.b.add(source, self.p.b.mul(column, integer(self.item)))
        return (self.p.load_narrow if self.bfloat16 else self.p.load)(place, lanes)

    def _larger(self, most: Any, source: Any, column: Any) -> Any:
        """By their bits without the sign, which are in the order of sizes, NaN at the end."""
        b = self.p.b
        bits = b.bitcast(self._load(source, column, most.type.count), most.type)
        bits = b.and_(bits, self.p.integers(0x7FFFFFFF, most.type.count))
        return b.select(b.icmp_signed(">", bits, most), bits, most)

    def _reduced(self, most: Any) -> Any:
        reduce = self.p.intrinsic(f"llvm.vector.reduce.smax.v{_LANES}i32", I32, [most.type])
        return self.p.b.call(reduce, [most])

    def _write(self, source: Any, target: Any, column: Any, factor: Any) -> None:
        b, lanes = self.p.b, factor.type.count
        numbers = b.fmul(self._load(source, column, lanes), factor)
        nearest = self.p.intrinsic(f"llvm.rint.v{lanes}f32", numbers.type, [numbers.type])
        wide = ir.VectorType(I32, lanes)
        name = f"llvm.fptosi.sat.v{lanes}i32.v{lanes}f32"  # also of NaN something: 0
        whole = b.call(self.p.intrinsic(name, wide, [numbers.type]), [b.call(nearest, [numbers])])
        short = ir.VectorType(I16, lanes)
        place = b.add(target, b.mul(column, integer(2)))
        b.store(b.trunc(whole, short), b.inttoptr(place, short.as_pointer()), align=2)


class _Multiply(ABC):
    """Each task: a block of outputs, for all rows."""

    def __init__(self, program: Program, bfloat16: bool, wide: bool) -> None:
        self.p, self.bfloat16 = program, bfloat16
        self.sums = _WIDE_SUMS if wide else _NARROW_SUMS
        self.item = 2 if bfloat16 else 4
        names = (name for name in FIELDS if "next" not in name)
        self.f = {name: program.field(name) for name in names}

    def build(self) -> None:
        p, b, f = self.p, self.p.b, self.f
        with p.tasks("multiply_next", f["blocks"]) as block:
            entry = b.mul(block, integer(TABLE_COLUMNS))
            places = [p.at(f["table"], b.add(entry, integer(i))) for i in range(TABLE_COLUMNS)]
            target = b.add(f["result"], b.mul(block, integer(BLOCK * self.item)))
            first, count = integer(0), _ROWS
            while count:
                end = b.and_(f["rows"], integer(-count))
                width = min(_VECTORS, self.sums // count)
                with p.loop(first, end, count) as row:
                    rows = [b.add(row, integer(index)) for index in range(count)]
                    for vector in range(0, _VECTORS, width):
                        self._rows(rows, places, target, range(vector, vector + width))
                first, count = end, count // 2

    @abstractmethod
    def results(self, rows: list[Any], weights: Any, scales: Any, vectors: range) -> list[Any]:
        """For each row these vectors of a block, float32, without bias."""

    def _rows(self, rows: list[Any], places: Sequence[Any], target: Any, vectors: range) -> None:
        """Some rows' results for some vectors of a block."""
        p, b = self.p, self.p.b
        weights, scales, bias = places
        results = iter(self.results(rows, weights, scales, vectors))
        for row in rows:
            first = b.add(target, b.mul(row, self.f["result_row"]))
            for vector in vectors:
                place = b.add(first, integer(vector * _LANES * self.item))
                result = b.fadd(next(results), self.vector(bias, vector))
                result = self._with_what_is_there(result, place)
                (p.store_narrow if self.bfloat16 else p.store)(result, place)

    def _with_what_is_there(self, result: Any, place: Any) -> Any:
        """Where the call says so, result + what is at a place."""
        p, b = self.p, self.p.b
        before = b.block
        with b.if_then(b.icmp_signed("!=", self.f["added"], integer(0))):
            there = (p.load_narrow if self.bfloat16 else p.load)(place, _LANES)
            both, inside = b.fadd(result, there), b.block
        joined = b.phi(result.type)
        joined.add_incoming(result, before)
        joined.add_incoming(both, inside)
        return joined

    def vector(self, place: Any, index: int) -> Any:
        """Of float32s from a place on."""
        return self.p.load(self.p.b.add(place, integer(4 * _LANES * index)), _LANES)

    def both(self, source: Any, pair: Any) -> Any:
        """A pair of a row's inputs, once for each lane: integers of 32 bits."""
        b = self.p.b
        place = b.add(source, b.mul(pair, integer(4)))
        return self.p.splat(b.load(b.inttoptr(place, I32.as_pointer()), align=2), _LANES)


class _BFloat16Multiply(_Multiply):
    def results(self, rows: list[Any], weights: Any, scales: Any, vectors: range) -> list[Any]:
        p, b, f = self.p, self.p.b, self.f
        sources = [b.add(f["source"], b.mul(row, f["source_row"])) for row in rows]
        zeros = [p.constant(0.0, _LANES)] * (len(rows) * len(vectors))
        with p.folding(integer(0), f["pairs"], zeros) as (pair, sums, after):
            place = b.add(weights, b.mul(pair, integer(4 * BLOCK)))
            places = (b.add(place, integer(4 * _LANES * vector)) for vector in vectors)
            loaded = [p.load_integers(each, _LANES) for each in places]
            for source in sources:
                both = self.both(source, pair)
                for weight in loaded:
                    after.append(p.dots(weight, both, sums[len(after)]))
        return sums


class _Float32Multiply(_Multiply):
    def results(self, rows: list[Any], weights: Any, scales: Any, vectors: range) -> list[Any]:
        p, b, f = self.p, self.p.b, self.f
        sources = [b.add(f["source"], b.mul(row, f["source_row"])) for row in rows]
        zeros = [p.constant(0.0, _LANES)] * (len(rows) * len(vectors))
        with p.folding(integer(0), f["columns"], zeros) as (column, sums, after):
            place = b.add(weights, b.mul(column, integer(4 * BLOCK)))
            loaded = [self.vector(place, vector) for vector in vectors]
            for source in sources:
                one = p.splat(p.number(b.add(source, b.mul(column, integer(4)))), _LANES)
                for weight in loaded:
                    after.append(p.multiply_add(weight, one, sums[len(after)]))
        return sums


class _Int8Multiply(_Multiply):
    def results(self, rows: list[Any], weights: Any, scales: Any, vectors: range) -> list[Any]:
        p, b, f = self.p, self.p.b, self.f
        row_bytes = b.mul(f["pairs"], integer(4))
        sources = [b.add(f["rounded"], b.mul(row, row_bytes)) for row in rows]
        zeros = [p.constant(0.0, _LANES)] * (len(rows) * len(vectors))
        half = GROUP // 2
        groups = b.sdiv(b.add(f["pairs"], integer(half - 1)), integer(half))
        row_scales = [b.add(f["row_scales"], b.mul(row, b.mul(groups, integer(4)))) for row in rows]
        with p.folding(integer(0), f["pairs"], zeros, half) as (start, sums, after):
            end = p.smaller(b.add(start, integer(half)), f["pairs"])
            products = iter(self._group(start, end, sources, weights, vectors))
            place = b.add(scales, b.mul(start, integer(4 * BLOCK // half)))
            factors = [self.vector(place, vector) for vector in vectors]
            group = b.mul(b.sdiv(start, integer(half)), integer(4))
            for scale in row_scales:
                one = p.splat(p.number(b.add(scale, group)), _LANES)
                for factor in factors:
                    total = sums[len(after)]
                    product = b.fmul(b.sitofp(next(products), total.type), factor)
                    after.append(p.multiply_add(product, one, total))
        return sums

    def _group(
        self, start: Any, end: Any, sources: list[Any], weights: Any, vectors: range
    ) -> list[Any]:
        """Sums of products, int32: for each row these vectors of a block."""
        p, b = self.p, self.p.b
        bytes_kind = ir.VectorType(I8, 2 * _LANES).as_pointer()
        shorts = ir.VectorType(I16, 2 * _LANES)
        initial = [p.integers(0, _LANES)] * (len(sources) * len(vectors))
        with p.folding(start, end, initial) as (pair, sums, after):
            place = b.add(weights, b.mul(pair, integer(2 * BLOCK)))
            wide: list[Any] = []
            for vector in vectors:
                at = b.add(place, integer(2 * _LANES * vector))
                wide.append(b.sext(b.load(b.inttoptr(at, bytes_kind), align=1), shorts))
            for source in sources:
                both = b.bitcast(self.both(source, pair), shorts)
                for weight in wide:
                    after.append(b.add(sums[len(after)], self._pair_products(weight, both)))
        return sums

    def _pair_products(self, left: Any, right: Any) -> Any:
        """Of neighbours, left[0] * right[0] + left[1] * right[1], …: LLVM knows the instruction."""
        b = self.p.b
        integers = ir.VectorType(I32, _LANES)
        undefined = ir.Constant(left.type, ir.Undefined)
        products: list[Any] = []
        for first in (0, 1):
            lanes = ir.Constant(integers, [2 * lane + first for lane in range(_LANES)])
            parts = (b.shuffle_vector(each, undefined, lanes) for each in (left, right))
            products.append(b.mul(*(b.sext(part, integers) for part in parts)))
        return b.add(*products)
