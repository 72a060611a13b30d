"""A chain that checks, when it has run, that it waited for every task."""

from typing import Any

from chatserve_kernels.cpu import native


class CountedChain(native.Chain):
    """The number of tasks that a program says it has is the number that were done: of more, some
    may be missing when the next program begins; for fewer, threads would wait for ever."""

    def __init__(self, function: native.Function) -> None:
        super().__init__(function)
        self._counts: list[tuple[Any, int, int]] = []

    def add(
        self, function: native.Function, arguments: Any, counter: str, tasks: int, *kept: Any
    ) -> None:
        super().add(function, arguments, counter, tasks, *kept)
        done = function.places[counter.replace("next", "done")]
        self._counts.append((arguments, done, tasks))

    def run(self) -> None:
        super().run()
        for arguments, done, tasks in self._counts:
            assert arguments[done] == tasks
        self._counts.clear()


def new_chain() -> native.Chain:
    """There is machine code on every machine that tests run on."""
    assert native.new_chain() is not None
    return CountedChain(native._chain())
