"""Vectors, loops and addresses in LLVM's intermediate language.

Theory: a program here is one function of one argument, the address of its fields: integers of 64
bits that hold counts, strides in bytes, addresses and the bits of floats. Threads that run the same
program share its fields, and take their tasks from a counter in them. Vectors are of float32;
LLVM cuts them to what the machine has.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

F32: Any = ir.FloatType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
CACHE_LINE_BYTES = 64
UPPER_HALF = 0xFFFF0000  # of 32 bits
EXPONENT_MAX = 126.0  # of two; beyond it float32 ends
ROUNDING = 1.5 * 2.0**23  # float32s from it on lie one apart
EXP_DEGREE = 6  # of a polynomial for 2^f, |f| <= 1/2: by itself within 2e-7


class BFloat(ir.types.Type):
    """LLVM's type of bfloat16, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def integer(value: int) -> Any:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


class Program:
    """One function under construction; `self.b` builds at its end.

    name: of the function. fields: the names of its integers, in order.
    """

    def __init__(self, module: Any, name: str, fields: Mapping[str, int]) -> None:
        self.module = module
        self.function = ir.Function(
            module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), name
        )
        self.b: Any = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._fields = fields
        self._argument = self.function.args[0]

    # Fields and tasks

    def field(self, name: str) -> Any:
        """One of the integers."""
        return self.b.load(self.field_place(name))

    def field_place(self, name: str) -> Any:
        """Where it lies."""
        return self.b.gep(self._argument, [integer(self._fields[name])])

    def float_field(self, name: str) -> Any:
        """One that holds the bits of a float32."""
        return self.b.bitcast(self.b.trunc(self.field(name), I32), F32)

    def at(self, base: Any, index: Any) -> Any:
        """Of an array of int64 at an address."""
        return self.b.load(self.b.gep(self.b.inttoptr(base, I64.as_pointer()), [index]))

    @contextmanager
    def tasks(self, counter: str, count: Any) -> Generator[Any]:
        """Each task that this thread takes, until none are left; then the program returns. A field
        named as the counter, with `done` for `next`, counts those that are done, by all threads."""
        before = self.b.block
        take, work, end = (self.function.append_basic_block() for _ in range(3))
        self.b.branch(take)
        self.b.position_at_end(take)
        mine = self.b.phi(I64)
        mine.add_incoming(integer(0), before)
        task = self.b.atomic_rmw("add", self.field_place(counter), integer(1), "monotonic")
        self.b.cbranch(self.b.icmp_signed("<", task, count), work, end)
        self.b.position_at_end(work)
        yield task
        mine.add_incoming(self.b.add(mine, integer(1)), self.b.block)
        self.b.branch(take)
        self.b.position_at_end(end)
        done = self.field_place(counter.replace("next", "done"))
        self.b.atomic_rmw("add", done, mine, "release")
        self.b.ret_void()

    def room(self, vectors: int, lanes: int) -> Any:
        """The address of room for so many vectors of float32, of this call's."""
        kind = ir.ArrayType(ir.VectorType(F32, lanes), vectors)
        return self.b.ptrtoint(self.b.alloca(kind), I64)

    # Loops

    @contextmanager
    def loop(self, start: Any, end: Any, step: int = 1) -> Generator[Any]:
        """`for index in range(start, end, step)`."""
        with self.folding(start, end, (), step) as (index, _, _after):
            yield index

    @contextmanager
    def folding(
        self, start: Any, end: Any, initial: Sequence[Any], step: int = 1
    ) -> Generator[tuple[Any, list[Any], list[Any]]]:
        """The same with values that go from one time to the next: (index, the values, a list to
        fill with what they become). Behind the loop the values are what they were at its end."""
        before = self.b.block
        head, body, done = (self.function.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        index.add_incoming(start, before)
        values = [self.b.phi(value.type) for value in initial]
        for phi, value in zip(values, initial, strict=True):
            phi.add_incoming(value, before)
        self.b.cbranch(self.b.icmp_signed("<", index, end), body, done)
        self.b.position_at_end(body)
        after: list[Any] = []
        yield index, values, after
        index.add_incoming(self.b.add(index, integer(step)), self.b.block)
        for phi, value in zip(values, after, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(done)

    # Memory

    def load(self, address: Any, lanes: int) -> Any:
        """A vector from an address."""
        kind = ir.VectorType(F32, lanes)
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=4)

    def number(self, address: Any) -> Any:
        """One float32 from an address."""
        return self.b.load(self.b.inttoptr(address, F32.as_pointer()))

    def store(self, vector: Any, address: Any) -> None:
        """A vector of anything to an address."""
        self.b.store(vector, self.b.inttoptr(address, vector.type.as_pointer()), align=2)

    def load_pairs(self, address: Any, lanes: int) -> tuple[Any, Any]:
        """Twice as many elements of bfloat16 from an address: those at even places and those at odd
        ones. A pair is one integer, and each of its halves a float32 with zeros behind it: that
        takes a third of the instructions that widening in order takes."""
        bits = self.load_integers(address, lanes)
        even = self.b.shl(bits, self.integers(16, lanes))
        odd = self.b.and_(bits, self.integers(UPPER_HALF, lanes))
        kind = ir.VectorType(F32, lanes)
        return self.b.bitcast(even, kind), self.b.bitcast(odd, kind)

    def row(
        self, address: Any, vectors: int, lanes: int, bfloat16: bool
    ) -> Generator[tuple[int, Any]]:
        """So many vectors from an address on, and their numbers; of bfloat16 as `load_pairs`."""
        for first in range(0, vectors, 2 if bfloat16 else 1):
            place = self.b.add(address, integer(first * lanes * (2 if bfloat16 else 4)))
            if bfloat16:
                yield from enumerate(self.load_pairs(place, lanes), first)
            else:
                yield first, self.load(place, lanes)

    def load_integers(self, address: Any, lanes: int) -> Any:
        """A vector of integers of 32 bits from an address."""
        kind = ir.VectorType(I32, lanes)
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=2)

    def store_pairs(self, even: Any, odd: Any, address: Any) -> None:
        """The reverse of `load_pairs`: rounded to the nearest, ties to even. A NaN whose lower bits
        are set would not stay one; none has them that comes of bfloat16."""
        lanes = even.type.count
        lower = self.b.lshr(self._rounded(even), self.integers(16, lanes))
        upper = self.b.and_(self._rounded(odd), self.integers(UPPER_HALF, lanes))
        self.store(self.b.or_(lower, upper), address)

    def load_narrow(self, address: Any, lanes: int) -> Any:
        """A vector of bfloat16 from an address, in order."""
        kind = ir.VectorType(I16, lanes)
        bits = self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=2)
        bits = self.b.zext(bits, ir.VectorType(I32, lanes))
        wide = self.b.shl(bits, self.integers(16, lanes))
        return self.b.bitcast(wide, ir.VectorType(F32, lanes))

    def store_narrow(self, vector: Any, address: Any) -> None:
        """A vector in bfloat16, in order; rounded as `store_pairs` does."""
        lanes = vector.type.count
        upper = self.b.lshr(self._rounded(vector), self.integers(16, lanes))
        self.store(self.b.trunc(upper, ir.VectorType(I16, lanes)), address)

    def interleaved(self, first: Any, second: Any) -> tuple[Any, Any]:
        """Of two vectors of pairs: pairs of the lower halves, and of the upper ones."""
        lanes = first.type.count
        lower, half = self.integers(0xFFFF, lanes), self.integers(16, lanes)
        upper = self.integers(UPPER_HALF, lanes)
        low = self.b.or_(self.b.and_(first, lower), self.b.shl(second, half))
        high = self.b.or_(self.b.lshr(first, half), self.b.and_(second, upper))
        return low, high

    def _rounded(self, vector: Any) -> Any:
        """Bits of floats whose upper halves are the bfloat16 next to them."""
        lanes = vector.type.count
        bits = self.b.bitcast(vector, ir.VectorType(I32, lanes))
        last = self.b.and_(self.b.lshr(bits, self.integers(16, lanes)), self.integers(1, lanes))
        return self.b.add(bits, self.b.add(last, self.integers(0x7FFF, lanes)))

    def prefetch(self, address: Any, size: int) -> None:
        """Ask for `size` bytes at an address, for the second-level cache."""
        place = I8.as_pointer()
        ask = self.intrinsic("llvm.prefetch.p0", ir.VoidType(), [place, I32, I32, I32])
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]  # to read; locality; data
        for offset in range(0, size, CACHE_LINE_BYTES):
            line = self.b.inttoptr(self.b.add(address, integer(offset)), place)
            self.b.call(ask, [line, *hints])

    def copy(self, source: Any, target: Any, size: int) -> None:
        """`size` bytes from an address to another one; they do not overlap."""
        place = I8.as_pointer()
        name, flag = "llvm.memcpy.p0.p0.i64", ir.IntType(1)
        move = self.intrinsic(name, ir.VoidType(), [place, place, I64, flag])
        places = [self.b.inttoptr(address, place) for address in (target, source)]
        self.b.call(move, [*places, integer(size), ir.Constant(flag, 0)])

    # Arithmetic

    def constant(self, value: float, lanes: int) -> Any:
        """A vector of one float."""
        return ir.Constant(ir.VectorType(F32, lanes), [value] * lanes)

    def integers(self, value: int, lanes: int) -> Any:
        """A vector of one integer of 32 bits."""
        return ir.Constant(ir.VectorType(I32, lanes), [value] * lanes)

    def smaller(self, left: Any, right: Any) -> Any:
        """Of two integers."""
        return self.b.select(self.b.icmp_signed("<", left, right), left, right)

    def splat(self, value: Any, lanes: int) -> Any:
        """A vector of one value, of any type."""
        kind = ir.VectorType(value.type, lanes)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        first = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), first)

    def first(self, vector: Any) -> Any:
        """Its first lane."""
        return self.b.extract_element(vector, ir.Constant(I32, 0))

    def multiply_add(self, left: Any, right: Any, added: Any) -> Any:
        """left * right + added, in one instruction where there is one."""
        return self._call("llvm.fmuladd", added.type, [left, right, added])

    def dots(self, left: Any, right: Any, added: Any) -> Any:
        """Vectors of pairs of bfloat16: the sum of both products of each pair, and `added`, a
        vector of 16. Only for processors with AVX512_BF16."""
        kind = ir.VectorType(BFloat(), 2 * added.type.count)
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        dot = self.intrinsic(name, added.type, [added.type, kind, kind])
        return self.b.call(dot, [added, self.b.bitcast(left, kind), self.b.bitcast(right, kind)])

    def narrowed(self, vector: Any) -> Any:
        """A vector of 16 in bfloat16, rounded to the nearest, ties to even; what is smaller than
        2^-126 becomes 0. Only for processors with AVX512_BF16."""
        kind = ir.VectorType(BFloat(), vector.type.count)
        name = "llvm.x86.avx512bf16.cvtneps2bf16.512"
        return self.b.call(self.intrinsic(name, kind, [vector.type]), [vector])

    def largest(self, vector: Any) -> Any:
        """The largest of its lanes; NaN is passed over."""
        name = f"llvm.vector.reduce.fmax.v{vector.type.count}f32"
        return self.b.call(self.intrinsic(name, F32, [vector.type]), [vector])

    def total(self, vector: Any) -> Any:
        """The sum of its lanes."""
        name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
        add = self.intrinsic(name, F32, [F32, vector.type])
        return self.b.call(add, [ir.Constant(F32, 0.0), vector], fastmath=("fast",))

    def totals(self, vectors: Sequence[Any]) -> Any:
        """A vector of the sum of each one's lanes. Their number is a power of two, and at most
        that of their lanes."""
        left = list(vectors)
        while len(left) > 1:
            left = [self._pairs(*left[index : index + 2]) for index in range(0, len(left), 2)]
        result = left[0]
        while result.type.count > len(vectors):
            result = self._pairs(result, None)
        return result

    def any(self, flags: Any) -> Any:
        """Whether one of a vector of bits is set."""
        bits = ir.IntType(flags.type.count)
        return self.b.icmp_unsigned("!=", self.b.bitcast(flags, bits), ir.Constant(bits, 0))

    def turned(self, vectors: Sequence[Any]) -> list[Any]:
        """As many vectors as each has lanes, a power of two: the first of the first lanes, the
        next of the second ones, and so on."""
        rows = list(vectors)
        lanes = len(rows)
        kind = ir.VectorType(I32, lanes)
        step = 1
        while step < lanes:
            low = [k if k & step == 0 else lanes + k - step for k in range(lanes)]
            high = [k + step if k & step == 0 else lanes + k for k in range(lanes)]
            for index in range(lanes):
                if index & step:
                    continue
                pair = rows[index], rows[index + step]
                rows[index], rows[index + step] = (
                    self.b.shuffle_vector(*pair, ir.Constant(kind, order)) for order in (low, high)
                )
            step *= 2
        return rows

    def exp(self, vector: Any) -> Any:
        """e to its power. Relative error: 6e-7 for numbers within 8 of 0, growing with them to 4e-6
        at 87; below 2^-126 the result is anything as small. NaN stays."""
        lanes = vector.type.count
        y = self.b.fmul(vector, self.constant(1 / math.log(2), lanes))
        for sign, limit in (("<", -EXPONENT_MAX), (">", EXPONENT_MAX)):
            bound = self.constant(limit, lanes)
            y = self.b.select(self.b.fcmp_ordered(sign, y, bound), bound, y)
        # Added to a number this large, y is rounded to an integer, which its lowest bits then hold.
        moved = self.b.fadd(y, self.constant(ROUNDING, lanes))
        part = self.b.fsub(y, self.b.fsub(moved, self.constant(ROUNDING, lanes)))
        result = self.constant(_taylor(EXP_DEGREE), lanes)
        for power in reversed(range(EXP_DEGREE)):
            result = self.multiply_add(result, part, self.constant(_taylor(power), lanes))
        bits = self.b.bitcast(moved, ir.VectorType(I32, lanes))
        exponent = self.b.shl(self.b.add(bits, self.integers(127, lanes)), self.integers(23, lanes))
        return self.b.fmul(result, self.b.bitcast(exponent, vector.type))

    def _pairs(self, left: Any, right: Any | None) -> Any:
        """Sums of neighbours: of left, then of right where there is one."""
        lanes = left.type.count * (1 if right is None else 2) // 2
        other = ir.Constant(left.type, ir.Undefined) if right is None else right
        kind = ir.VectorType(I32, lanes)
        even, odd = (
            self.b.shuffle_vector(
                left, other, ir.Constant(kind, [2 * lane + place for lane in range(lanes)])
            )
            for place in (0, 1)
        )
        return self.b.fadd(even, odd)

    def _call(self, name: str, kind: Any, arguments: Sequence[Any]) -> Any:
        full = f"{name}.v{kind.count}f32"
        return self.b.call(self.intrinsic(full, kind, [kind] * len(arguments)), arguments)

    def intrinsic(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        """One of LLVM's own functions."""
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)


def _taylor(power: int) -> float:
    """The coefficient of f^power in 2^f."""
    return math.log(2) ** power / math.factorial(power)
