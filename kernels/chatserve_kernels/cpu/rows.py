"""What a decoder does with each row by itself, norms, rotary embedding and gates: the code.

Theory: torch does each of these in several operations, and a step of one row has hundreds of them.
Here each is one pass in float32, rounded once. A task is a row, or some columns of it.

    norm:    RMSNorm (arXiv 1910.07467): x / sqrt(mean(x²) + epsilon) * weight
    rotate:  in place, of each head of a query and a key: its norm, where it has one, then the
             rotary embedding by halves (arXiv 2104.09864): x * cos + (-second half, first) * sin
    gate:    activation(gate) * up, of two halves of a row

Weights are float32. Rows come and go in the type they are compiled for, cos and sin as well.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from chatserve_kernels.cpu.language import F32, Program, integer

NORM_FIELDS = (
    *("next", "done", "rows", "columns", "source", "source_row", "target", "target_row"),
    *("weight", "epsilon"),
)
ROTATE_FIELDS = (
    *("next", "done", "rows", "cos", "cos_row", "sin", "sin_row", "epsilon"),
    *("query", "query_row", "query_head", "heads", "query_weight"),
    *("key", "key_row", "key_head", "kv_heads", "key_weight"),
)
GATE_FIELDS = (
    *("next", "done", "tasks", "row_tasks", "columns"),
    *("gate", "gate_row", "up", "up_row", "target", "target_row"),
)
GATE_COLUMNS = 512  # of a task
# x * sigmoid(2 * _GELU_SCALE * (x + _GELU_CUBE * x³)) is GELU by tanh (arXiv 1606.08415).
_GELU_SCALE, _GELU_CUBE = 0.7978845608028654, 0.044715
LANES = 16  # the width of a row is a multiple of it


def norm_text(*, bfloat16: bool) -> str:
    """The function `norm`."""
    rows = _program("norm", NORM_FIELDS, bfloat16)
    p, b = rows.p, rows.p.b
    f = {name: p.field(name) for name in NORM_FIELDS if name not in ("next", "done", "epsilon")}
    with p.tasks("next", f["rows"]) as row:
        source = b.add(f["source"], b.mul(row, f["source_row"]))
        target = b.add(f["target"], b.mul(row, f["target_row"]))
        zero = [p.constant(0.0, LANES)]
        with p.folding(integer(0), f["columns"], zero, LANES) as (column, (squares,), after):
            vector = rows.load(source, column)
            after.append(p.multiply_add(vector, vector, squares))
        factor = rows.factor(p.total(squares), b.sitofp(f["columns"], F32))
        with p.loop(integer(0), f["columns"], LANES) as column:
            weight = p.load(b.add(f["weight"], b.mul(column, integer(4))), LANES)
            scaled = b.fmul(rows.load(source, column), factor)
            rows.store(b.fmul(scaled, weight), target, column)
    return str(p.module)


def rotate_text(*, bfloat16: bool, head_dim: int, norms: bool) -> str:
    """The function `rotate`. head_dim: a multiple of 8. norms: whether heads have them."""
    lanes = next(n for n in (LANES, LANES // 2, LANES // 4) if head_dim // 2 % n == 0)
    rows = _program("rotate", ROTATE_FIELDS, bfloat16, lanes)
    p, b = rows.p, rows.p.b
    vectors = head_dim // lanes
    f = {name: p.field(name) for name in ROTATE_FIELDS if name not in ("next", "done", "epsilon")}
    with p.tasks("next", f["rows"]) as row:
        cos, sin = (b.add(f[name], b.mul(row, f[f"{name}_row"])) for name in ("cos", "sin"))
        for name, heads in (("query", "heads"), ("key", "kv_heads")):
            first = b.add(f[name], b.mul(row, f[f"{name}_row"]))
            with p.loop(integer(0), f[heads]) as index:
                head = b.add(first, b.mul(index, f[f"{name}_head"]))
                values = [rows.load(head, integer(lanes * each)) for each in range(vectors)]
                if norms:
                    values = _normed(rows, values, f[f"{name}_weight"], head_dim)
                for each in range(vectors):
                    column = integer(lanes * each)
                    other = values[(each + vectors // 2) % vectors]
                    if each < vectors // 2:
                        other = b.fneg(other)
                    turned = b.fmul(other, rows.load(sin, column))
                    kept = rows.load(cos, column)
                    rows.store(p.multiply_add(values[each], kept, turned), head, column)
    return str(p.module)


def gate_text(*, bfloat16: bool, gelu: bool) -> str:
    """The function `gate`. gelu: by tanh; SiLU otherwise."""
    rows = _program("gate", GATE_FIELDS, bfloat16)
    p, b = rows.p, rows.p.b
    f = {name: p.field(name) for name in GATE_FIELDS if name not in ("next", "done")}
    one = p.constant(1.0, LANES)
    with p.tasks("next", f["tasks"]) as task:
        row, part = b.sdiv(task, f["row_tasks"]), b.srem(task, f["row_tasks"])
        gate, up, target = (
            b.add(f[name], b.mul(row, f[f"{name}_row"])) for name in ("gate", "up", "target")
        )
        first = b.mul(part, integer(GATE_COLUMNS))
        end = p.smaller(b.add(first, integer(GATE_COLUMNS)), f["columns"])
        with p.loop(first, end, LANES) as column:
            x = rows.load(gate, column)
            exponent = b.fneg(x)
            if gelu:
                cube = b.fmul(b.fmul(x, x), p.constant(_GELU_CUBE, LANES))
                exponent = b.fmul(x, b.fadd(cube, one))
                exponent = b.fmul(exponent, p.constant(-2 * _GELU_SCALE, LANES))
            activated = b.fdiv(x, b.fadd(one, p.exp(exponent)))
            rows.store(b.fmul(activated, rows.load(up, column)), target, column)
    return str(p.module)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A program under construction, the type of its rows, and how wide its vectors are."""

    p: Program
    bfloat16: bool
    lanes: int

    def load(self, row: Any, column: Any) -> Any:
        """A vector from a column on."""
        place = self._at(row, column)
        return (self.p.load_narrow if self.bfloat16 else self.p.load)(place, self.lanes)

    def store(self, vector: Any, row: Any, column: Any) -> None:
        """The reverse."""
        place = self._at(row, column)
        (self.p.store_narrow if self.bfloat16 else self.p.store)(vector, place)

    def factor(self, squares: Any, count: Any) -> Any:
        """A vector of 1 / sqrt(squares / count + epsilon)."""
        p, b = self.p, self.p.b
        mean = b.fadd(b.fdiv(squares, count), p.float_field("epsilon"))
        root = b.call(p.intrinsic("llvm.sqrt.f32", F32, [F32]), [mean])
        return p.splat(b.fdiv(ir.Constant(F32, 1.0), root), self.lanes)

    def _at(self, row: Any, column: Any) -> Any:
        return self.p.b.add(row, self.p.b.mul(column, integer(2 if self.bfloat16 else 4)))


def _program(name: str, fields: tuple[str, ...], bfloat16: bool, lanes: int = LANES) -> _Rows:
    places = {field: index for index, field in enumerate(fields)}
    return _Rows(Program(ir.Module(name), name, places), bfloat16, lanes)


def _normed(rows: _Rows, values: list[Any], weight: Any, head_dim: int) -> list[Any]:
    """A head's vectors, normed; weight: an address."""
    p, b = rows.p, rows.p.b
    squares = p.constant(0.0, rows.lanes)
    for value in values:
        squares = p.multiply_add(value, value, squares)
    factor = rows.factor(p.total(squares), ir.Constant(F32, float(head_dim)))
    weights = (
        p.load(b.add(weight, integer(4 * rows.lanes * index)), rows.lanes)
        for index in range(len(values))
    )
    return [
        b.fmul(b.fmul(value, factor), each) for value, each in zip(values, weights, strict=True)
    ]
