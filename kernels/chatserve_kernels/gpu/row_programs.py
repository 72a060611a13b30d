"""Norms and gates of rows: bare Triton kernels.

May not know: layers. `rows.py` gives them tensors that its doors have checked.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# x * sigmoid(2 * GELU_SCALE * (x + GELU_CUBE * x³)) is GELU by tanh (arXiv 1606.08415).
GELU_SCALE = tl.constexpr(0.7978845608028654)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit(do_not_specialize=["count"])
def norm(
    rows,
    weight,
    result,
    count,
    rows_row,
    epsilon,
    COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Program (some rows): RMSNorm (arXiv 1910.07467) of each, in float32.

    rows: [count, COLUMNS], apart by rows_row. weight: float32 [COLUMNS]. result: [count, COLUMNS],
    contiguous. ELEMENTS: a power of two, COLUMNS or more; TOGETHER: rows of a program.
    """
    row = tl.program_id(0).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    column = tl.arange(0, ELEMENTS)
    is_column = column < COLUMNS
    is_place = (row < count)[:, None] & is_column[None, :]
    given = rows + (row * rows_row)[:, None] + column[None, :]
    values = tl.load(given, mask=is_place, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, 1) / COLUMNS
    factor = tl.rsqrt(mean + epsilon)
    scale = tl.load(weight + column, mask=is_column, other=0.0)
    tl.store(
        result + (row * COLUMNS)[:, None] + column[None, :],
        (values * factor[:, None] * scale[None, :]).to(result.dtype.element_ty),
        mask=is_place,
    )


@triton.jit
def gate(
    gates,
    ups,
    result,
    gates_row,
    ups_row,
    columns,
    GELU: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Program (row, some columns): activation(gate) * up, in float32.

    gates, ups: [rows, columns], rows apart by gates_row and ups_row. result: [rows, columns],
    contiguous. GELU: by tanh; SiLU otherwise. TOGETHER: columns of a program.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    is_column = column < columns
    x = tl.load(gates + row * gates_row + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(ups + row * ups_row + column, mask=is_column, other=0.0).to(tl.float32)
    inner = x
    if GELU:
        inner = (2.0 * GELU_SCALE) * (x + GELU_CUBE * x * x * x)
    # Of a negative number the exponential would leave float32.
    small = tl.exp2(tl.abs(inner) * -LOG2_E)
    sigmoid = tl.where(inner < 0.0, small, 1.0) / (1.0 + small)
    tl.store(
        result + row * columns + column,
        (x * sigmoid * up).to(result.dtype.element_ty),
        mask=is_column,
    )
