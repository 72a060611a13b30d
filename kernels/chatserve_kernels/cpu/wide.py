"""Vectors of float64, places on the stack, and searches, in LLVM's intermediate language."""

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from chatserve_kernels.cpu.language import F32, I32, I64, Program, integer

LANES = 16
F64: Any = ir.DoubleType()
_REACH = -707.0  # of exp; beyond it float64 ends
_ROUNDING = 1.5 * 2.0**52  # float64s from it on lie one apart
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # its multiples by an exponent are exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_EXP_DEGREE = 13  # of a polynomial for exp(f), |f| <= ln(2) / 2: to the last bit or nearly


class Cell:
    """A place on the stack."""

    def __init__(self, p: Program, kind: Any) -> None:
        self._b, self._place = p.b, p.b.alloca(kind)

    def get(self) -> Any:
        return self._b.load(self._place)

    def set(self, value: Any) -> None:
        self._b.store(value, self._place)


class Wide:
    """What programs of float64 need besides. Arrays are addresses."""

    def __init__(self, p: Program) -> None:
        self.p = p

    def number(self, value: float) -> Any:
        return ir.Constant(F64, value)

    def vector(self, value: float) -> Any:
        return ir.Constant(ir.VectorType(F64, LANES), [value] * LANES)

    def place(self, base: Any, index: Any, kind: Any) -> Any:
        return self.p.b.gep(self.p.b.inttoptr(base, kind.as_pointer()), [index])

    def get(self, base: Any, index: Any, kind: Any = F64) -> Any:
        return self.p.b.load(self.place(base, index, kind))

    def set(self, value: Any, base: Any, index: Any) -> None:
        self.p.b.store(value, self.place(base, index, value.type))

    def load(self, base: Any, index: Any) -> Any:
        """A vector of float64."""
        kind = ir.VectorType(F64, LANES).as_pointer()
        return self.p.b.load(self.p.b.bitcast(self.place(base, index, F64), kind), align=8)

    def store(self, vector: Any, base: Any, index: Any) -> None:
        place = self.p.b.bitcast(self.place(base, index, F64), vector.type.as_pointer())
        self.p.b.store(vector, place, align=8)

    def widened(self, vector: Any) -> Any:
        return self.p.b.fpext(vector, ir.VectorType(F64, LANES))

    def total(self, vector: Any) -> Any:
        """The sum of its lanes, halves upon halves."""
        b, lanes = self.p.b, LANES
        while lanes > 1:
            lanes //= 2
            halves = (
                ir.Constant(ir.VectorType(I32, lanes), [first + lane for lane in range(lanes)])
                for first in (0, lanes)
            )
            low, high = (b.shuffle_vector(vector, vector, order) for order in halves)
            vector = b.fadd(low, high)
        return self.p.first(vector)

    def exp(self, vector: Any) -> Any:
        """e to its power, of no more than 0: exactly 1 for 0, and 0 from about -707 on."""
        b = self.p.b
        reach = self.vector(_REACH)
        near = b.fcmp_ordered(">", vector, reach)
        x = b.select(near, vector, reach)
        # Added to a number this large, it is rounded to an integer, which its lowest bits then
        # hold.
        rounding = self.vector(_ROUNDING)
        moved = self.multiply_add(x, self.vector(1 / math.log(2)), rounding)
        power = b.fsub(moved, rounding)
        part = self.multiply_add(power, self.vector(-_LN2_HIGH), x)
        part = self.multiply_add(power, self.vector(-_LN2_LOW), part)
        result = self.vector(1 / math.factorial(_EXP_DEGREE))
        for degree in reversed(range(_EXP_DEGREE)):
            result = self.multiply_add(result, part, self.vector(1 / math.factorial(degree)))
        kind = ir.VectorType(I64, LANES)
        bits = b.shl(b.bitcast(moved, kind), ir.Constant(kind, [52] * LANES))
        scaled = b.add(b.bitcast(result, kind), bits)
        return b.select(near, b.bitcast(scaled, vector.type), self.vector(0.0))

    def multiply_add(self, left: Any, right: Any, added: Any) -> Any:
        name = f"llvm.fmuladd.v{LANES}f64"
        function = self.p.intrinsic(name, added.type, [added.type] * 3)
        return self.p.b.call(function, [left, right, added])

    def least(self, left: Any, right: Any) -> Any:
        """The smaller number."""
        return self.p.b.select(self.p.b.fcmp_ordered("<", left, right), left, right)

    def most(self, left: Any, right: Any) -> Any:
        """The larger number."""
        return self.p.b.select(self.p.b.fcmp_ordered(">", left, right), left, right)

    def search(self, start: Any, end: Any, found: Callable[[Any], Any], step: int = 1) -> Any:
        """The first index from start on of which `found` says so, or one at the end or behind."""
        p, b = self.p, self.p.b
        before = b.block
        head, body, done = (p.function.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(start, before)
        b.cbranch(b.icmp_signed("<", index, end), body, done)
        b.position_at_end(body)
        is_found = found(index)
        here = b.block
        index.add_incoming(b.add(index, integer(step)), here)
        b.cbranch(is_found, done, head)
        b.position_at_end(done)
        return index

    def copied(self, source: Any, target: Any, start: Any, end: Any) -> None:
        """float32s, from one index to another."""
        with self.p.loop(start, end) as index:
            self.set(self.get(source, index, F32), target, index)
