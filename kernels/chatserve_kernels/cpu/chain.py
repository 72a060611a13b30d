"""Many programs, one after the other, on the same threads: the code.

Theory: waking a thread costs tens of microseconds, and a layer of a small step has a dozen programs
of a few. `chain` is run by all threads at once. Each of them goes through the programs in order,
takes tasks while there are any, and waits until all tasks of a program are done before it takes one
of the next: not until all threads are there. So a thread that the system has put aside holds up the
others for the task that it has in hand, if any, and finds its way when it comes back: what is done
has no tasks left. Who waits spins for some microseconds, then lets others run.

    programs, int64:   [count, addresses of function, its fields, its count of done tasks; tasks]
"""

import platform
from typing import Any

from llvmlite import ir

from chatserve_kernels.cpu.language import I64, Program, integer

FIELDS = ("programs", "count", "yield")
PROGRAM_COLUMNS = 4
_SPINS = 400  # before letting others run: about 10 microseconds where `pause` takes 25 ns


def chain_text() -> str:
    """The function `chain`."""
    module = ir.Module("chain")
    p = Program(module, "chain", {name: index for index, name in enumerate(FIELDS)})
    b = p.b
    programs, count, let_run = (p.field(name) for name in FIELDS)
    function_kind = ir.FunctionType(ir.VoidType(), [I64]).as_pointer()
    yield_kind = ir.FunctionType(ir.IntType(32), []).as_pointer()
    with p.loop(integer(0), count) as index:
        first = b.mul(index, integer(PROGRAM_COLUMNS))
        function, fields, done, tasks = (
            p.at(programs, b.add(first, integer(column))) for column in range(PROGRAM_COLUMNS)
        )
        b.call(b.inttoptr(function, function_kind), [fields])
        before = b.block
        wait, again, others, pause, after = (p.function.append_basic_block() for _ in range(5))
        b.branch(wait)
        b.position_at_end(wait)
        spins = b.phi(I64)
        spins.add_incoming(integer(0), before)
        seen = b.load_atomic(b.inttoptr(done, I64.as_pointer()), "acquire", 8)
        b.cbranch(b.icmp_signed("<", seen, tasks), again, after)
        b.position_at_end(again)
        more = b.add(spins, integer(1))
        b.cbranch(b.icmp_signed("<", spins, integer(_SPINS)), pause, others)
        b.position_at_end(pause)
        _pause(p)
        spins.add_incoming(more, b.block)
        b.branch(wait)
        b.position_at_end(others)
        b.call(b.inttoptr(let_run, yield_kind), [])
        spins.add_incoming(more, b.block)
        b.branch(wait)
        b.position_at_end(after)
    b.ret_void()
    return str(module)


def _pause(p: Any) -> None:
    """Tell the processor that this is a loop that waits, where it can be told."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        p.b.call(p.intrinsic("llvm.x86.sse2.pause", ir.VoidType(), []), [])
