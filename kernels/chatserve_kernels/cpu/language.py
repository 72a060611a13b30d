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
I8, I32, I64 = (ir.IntType(bits) for bits in (8, 32, 64))
CACHE_LINE_BYTES = 64
UPPER_HALF = 0xFFFF0000  # of 32 bits
EXPONENT_MAX = 126.0  # of two; beyond it float32 ends
EXP_DEGREE = 6  # of a polynomial for 2^f, |f| <= 1/2: within 2e-7


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
        """Each task that this thread takes, until none are left; then the program returns."""
        take, work, end = (self.function.append_basic_block() for _ in range(3))
        self.b.branch(take)
        self.b.position_at_end(take)
        task = self.b.atomic_rmw("add", self.field_place(counter), integer(1), "monotonic")
        self.b.cbranch(self.b.icmp_signed("<", task, count), work, end)
        self.b.position_at_end(work)
        yield task
        self.b.branch(take)
        self.b.position_at_end(end)
        self.b.ret_void()

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

    def store(self, vector: Any, address: Any) -> None:
        """A vector to an address."""
        self.b.store(vector, self.b.inttoptr(address, vector.type.as_pointer()), align=4)

    def load_pairs(self, address: Any, lanes: int) -> tuple[Any, Any]:
        """Twice as many elements of bfloat16 from an address: those at even places and those at odd
        ones. A pair is one integer, and each of its halves a float32 with zeros behind it: that
        takes a third of the instructions that widening in order takes."""
        wide = ir.VectorType(I32, lanes)
        bits = self.b.load(self.b.inttoptr(address, wide.as_pointer()), align=2)
        even = self.b.shl(bits, ir.Constant(wide, [16] * lanes))
        odd = self.b.and_(bits, ir.Constant(wide, [UPPER_HALF] * lanes))
        kind = ir.VectorType(F32, lanes)
        return self.b.bitcast(even, kind), self.b.bitcast(odd, kind)

    def store_pairs(self, even: Any, odd: Any, address: Any) -> None:
        """The reverse: rounded to the nearest, ties to even. A NaN whose lower bits are set would
        not stay one; none has them that comes of bfloat16."""
        lanes = even.type.count
        wide = ir.VectorType(I32, lanes)

        def constant(value: int) -> Any:
            return ir.Constant(wide, [value] * lanes)

        def rounded(vector: Any) -> Any:
            bits = self.b.bitcast(vector, wide)
            last = self.b.and_(self.b.lshr(bits, constant(16)), constant(1))
            return self.b.add(bits, self.b.add(last, constant(0x7FFF)))

        lower = self.b.lshr(rounded(even), constant(16))
        upper = self.b.and_(rounded(odd), constant(UPPER_HALF))
        place = self.b.inttoptr(address, wide.as_pointer())
        self.b.store(self.b.or_(lower, upper), place, align=2)

    def prefetch(self, address: Any, size: int) -> None:
        """Ask for `size` bytes at an address, for the second-level cache."""
        place = I8.as_pointer()
        ask = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), [place, I32, I32, I32])
        hints = [ir.Constant(I32, hint) for hint in (0, 2, 1)]  # to read; locality; data
        for offset in range(0, size, CACHE_LINE_BYTES):
            line = self.b.inttoptr(self.b.add(address, integer(offset)), place)
            self.b.call(ask, [line, *hints])

    def copy(self, source: Any, target: Any, size: int) -> None:
        """`size` bytes from an address to another one; they do not overlap."""
        place = I8.as_pointer()
        name, flag = "llvm.memcpy.p0.p0.i64", ir.IntType(1)
        move = self._intrinsic(name, ir.VoidType(), [place, place, I64, flag])
        places = [self.b.inttoptr(address, place) for address in (target, source)]
        self.b.call(move, [*places, integer(size), ir.Constant(flag, 0)])

    # Arithmetic

    def constant(self, value: float, lanes: int) -> Any:
        """A vector of one float."""
        return ir.Constant(ir.VectorType(F32, lanes), [value] * lanes)

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

    def largest(self, vector: Any) -> Any:
        """The largest of its lanes; NaN is passed over."""
        name = f"llvm.vector.reduce.fmax.v{vector.type.count}f32"
        return self.b.call(self._intrinsic(name, F32, [vector.type]), [vector])

    def total(self, vector: Any) -> Any:
        """The sum of its lanes."""
        name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
        add = self._intrinsic(name, F32, [F32, vector.type])
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

    def exp(self, vector: Any) -> Any:
        """e to its power, within 2e-7 of it where the result is no less than 2^-126. NaN stays."""
        lanes = vector.type.count
        y = self.b.fmul(vector, self.constant(1 / math.log(2), lanes))
        for sign, limit in (("<", -EXPONENT_MAX), (">", EXPONENT_MAX)):
            bound = self.constant(limit, lanes)
            y = self.b.select(self.b.fcmp_ordered(sign, y, bound), bound, y)
        whole = self._call("llvm.rint", vector.type, [y])
        part = self.b.fsub(y, whole)
        result = self.constant(_taylor(EXP_DEGREE), lanes)
        for power in reversed(range(EXP_DEGREE)):
            result = self.multiply_add(result, part, self.constant(_taylor(power), lanes))
        integers = ir.VectorType(I32, lanes)
        name = f"llvm.fptosi.sat.v{lanes}i32.v{lanes}f32"  # of NaN: 0, and what it scales is NaN
        exponent = self.b.call(self._intrinsic(name, integers, [vector.type]), [whole])
        exponent = self.b.add(exponent, ir.Constant(integers, [127] * lanes))
        scale = self.b.shl(exponent, ir.Constant(integers, [23] * lanes))
        return self.b.fmul(result, self.b.bitcast(scale, vector.type))

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
        return self.b.call(self._intrinsic(full, kind, [kind] * len(arguments)), arguments)

    def _intrinsic(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(result, arguments), name)


def _taylor(power: int) -> float:
    """The coefficient of f^power in 2^f."""
    return math.log(2) ** power / math.factorial(power)
