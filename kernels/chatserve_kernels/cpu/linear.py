"""Linear layers of int8 weights: the code.

Theory: `round` writes each row of activations as integers of 16 bits with a scale of its own, which
is finer than bfloat16, and `multiply` adds up products of integers: a pair of inputs for 16 outputs
in one instruction, with nothing to widen but the weights. Sums of a group of inputs are exact, and
groups are added in their order, so a row gives the same bits whatever rows come with it, on any
number of threads. Each task of `multiply` is a block of outputs for all rows: its weights come from
memory once, and for further rows from the processor's cache.

    weights of a block, int8:    [pairs of inputs, 64 outputs, 2]
    scales of a block, float32:  [groups of inputs, 64 outputs]

A row with a number that is not finite gives NaN throughout.
"""

from typing import Any

from llvmlite import ir

from chatserve_kernels.cpu.language import F32, I8, I16, I32, Program, integer

BLOCK = 64  # outputs of a task; results and biases have room for whole blocks
GROUP = 128  # inputs that share a scale; 128 * 127 * 32767 is well inside 32 bits
ROUND_MAX = 32767
FIELDS = (
    *("round_next", "round_tasks", "multiply_next", "blocks", "rows", "columns", "pairs"),
    *("source", "source_row", "rounded", "row_scales"),
    *("weights", "scales", "bias", "result", "result_row"),
)
_LANES = 16
_VECTORS = BLOCK // _LANES
_LEAST = 1e-33  # a row whose largest number is smaller is rounded as if it were this
_INFINITY_BITS, _NAN_BITS = 0x7F800000, 0x7FC00000


def linear_text(*, bfloat16: bool, rows_together: int) -> str:
    """The functions `round` and `multiply`. bfloat16: what comes and goes; float32 otherwise.
    rows_together: a power of two, as many as there are registers for."""
    module = ir.Module("linear")
    fields = {name: index for index, name in enumerate(FIELDS)}
    _Round(Program(module, "round", fields), bfloat16).build()
    _Multiply(Program(module, "multiply", fields), bfloat16, rows_together).build()
    return str(module)


class _Round:
    """Each task: one row."""

    def __init__(self, program: Program, bfloat16: bool) -> None:
        self.p, self.bfloat16 = program, bfloat16
        self.item = 2 if bfloat16 else 4

    def build(self) -> None:
        p, b = self.p, self.p.b
        names = ("round_tasks", "columns", "pairs", "source", "source_row", "rounded", "row_scales")
        f = {name: p.field(name) for name in names}
        whole = b.and_(f["columns"], integer(-_LANES))
        with p.tasks("round_next", f["round_tasks"]) as row:
            source = b.add(f["source"], b.mul(row, f["source_row"]))
            target = b.add(f["rounded"], b.mul(row, b.mul(f["pairs"], integer(4))))
            with p.folding(integer(0), whole, [p.integers(0, _LANES)], _LANES) as (
                column,
                (most,),
                after,
            ):
                after.append(self._larger(most, source, column))
            largest = self._reduced(most)
            with p.folding(whole, f["columns"], [p.integers(0, 1)]) as (column, (most,), after):
                after.append(self._larger(most, source, column))
            last = p.first(most)
            largest = b.select(b.icmp_signed(">", last, largest), last, largest)
            finite = b.icmp_signed("<", largest, ir.Constant(I32, _INFINITY_BITS))
            least = ir.Constant(F32, _LEAST)
            number = b.bitcast(largest, F32)
            number = b.select(b.fcmp_ordered(">", number, least), number, least)
            scale = b.fdiv(number, ir.Constant(F32, float(ROUND_MAX)))
            nan = b.bitcast(ir.Constant(I32, _NAN_BITS), F32)
            place = b.add(f["row_scales"], b.mul(row, integer(4)))
            b.store(b.select(finite, scale, nan), b.inttoptr(place, F32.as_pointer()))
            factor = b.fdiv(ir.Constant(F32, float(ROUND_MAX)), number)
            with p.loop(integer(0), whole, _LANES) as column:
                self._write(source, target, column, p.splat(factor, _LANES))
            with p.loop(whole, f["columns"]) as column:
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


class _Multiply:
    """Each task: a block of outputs, for all rows."""

    def __init__(self, program: Program, bfloat16: bool, rows_together: int) -> None:
        self.p, self.bfloat16, self.rows_together = program, bfloat16, rows_together
        self.item = 2 if bfloat16 else 4
        names = (name for name in FIELDS if "next" not in name)
        self.f = {name: program.field(name) for name in names}

    def build(self) -> None:
        p, b, f = self.p, self.p.b, self.f
        block_bytes = b.mul(f["pairs"], integer(2 * BLOCK))
        groups = b.sdiv(b.add(f["pairs"], integer(GROUP // 2 - 1)), integer(GROUP // 2))
        scales_bytes = b.mul(groups, integer(4 * BLOCK))
        with p.tasks("multiply_next", f["blocks"]) as block:
            weights = b.add(f["weights"], b.mul(block, block_bytes))
            scales = b.add(f["scales"], b.mul(block, scales_bytes))
            first, count = integer(0), self.rows_together
            while count:
                end = b.and_(f["rows"], integer(-count))
                with p.loop(first, end, count) as row:
                    self._rows(row, count, block, weights, scales)
                first, count = end, count // 2

    def _rows(self, row: Any, count: int, block: Any, weights: Any, scales: Any) -> None:
        """Some rows' results of a block."""
        p, b, f = self.p, self.p.b, self.f
        rows = [b.add(row, integer(index)) for index in range(count)]
        row_bytes = b.mul(f["pairs"], integer(4))
        sources = [b.add(f["rounded"], b.mul(each, row_bytes)) for each in rows]
        zeros = [p.constant(0.0, _LANES)] * (count * _VECTORS)
        half = GROUP // 2
        with p.folding(integer(0), f["pairs"], zeros, half) as (start, sums, after):
            end = b.add(start, integer(half))
            end = b.select(b.icmp_signed("<", end, f["pairs"]), end, f["pairs"])
            products = self._group(start, end, sources, weights)
            place = b.add(scales, b.mul(start, integer(4 * BLOCK // half)))
            for index, (product, total) in enumerate(zip(products, sums, strict=True)):
                scale = self._vector(place, index % _VECTORS)
                after.append(p.multiply_add(b.sitofp(product, total.type), scale, total))
        column = b.mul(block, integer(BLOCK))
        bias = b.add(f["bias"], b.mul(column, integer(4)))
        for index, total in enumerate(sums):
            each, vector = rows[index // _VECTORS], index % _VECTORS
            scale = b.add(f["row_scales"], b.mul(each, integer(4)))
            scale = p.splat(p.number(scale), _LANES)
            result = p.multiply_add(total, scale, self._vector(bias, vector))
            place = b.add(f["result"], b.mul(each, f["result_row"]))
            place = b.add(place, b.mul(column, integer(self.item)))
            place = b.add(place, integer(vector * _LANES * self.item))
            (p.store_narrow if self.bfloat16 else p.store)(result, place)

    def _group(self, start: Any, end: Any, sources: list[Any], weights: Any) -> list[Any]:
        """Sums of products, int32: for each row the vectors of a block."""
        p, b = self.p, self.p.b
        bytes_kind = ir.VectorType(I8, 2 * _LANES).as_pointer()
        shorts = ir.VectorType(I16, 2 * _LANES)
        initial = [p.integers(0, _LANES)] * (len(sources) * _VECTORS)
        with p.folding(start, end, initial) as (pair, sums, after):
            place = b.add(weights, b.mul(pair, integer(2 * BLOCK)))
            wide: list[Any] = []
            for vector in range(_VECTORS):
                at = b.add(place, integer(2 * _LANES * vector))
                wide.append(b.sext(b.load(b.inttoptr(at, bytes_kind), align=1), shorts))
            for row, source in enumerate(sources):
                at = b.add(source, b.mul(pair, integer(4)))
                both = p.splat(b.load(b.inttoptr(at, I32.as_pointer())), _LANES)
                both = b.bitcast(both, shorts)
                for vector, weight in enumerate(wide):
                    total = sums[row * _VECTORS + vector]
                    after.append(b.add(total, self._pair_products(weight, both)))
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

    def _vector(self, place: Any, index: int) -> Any:
        """Of float32s from a place on."""
        return self.p.load(self.p.b.add(place, integer(4 * _LANES * index)), _LANES)
