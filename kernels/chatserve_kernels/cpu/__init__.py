"""The paged operations as machine code for the CPU that runs them.

Theory: plain torch cannot read through a page table, so it copies each context before it reads it.
These programs read pages where they lie. They are written in LLVM's intermediate language for one
model's sizes (`programs.py`), compiled when first wanted (`native.py`; LLVM comes with the llvmlite
package, so no compiler is needed), and run on the threads that torch runs on. Where LLVM is absent,
or a size is not served, the doors in `ops.py` go on with torch.

`linear.py` is the code of `../int8.py`, linear layers of int8 weights.

Pages that several rows have in common are read once for all of them (`../runs.py`); many rows meet
them as products of matrices (`matrices.py`), and leave what `records.py` describes to be joined.
"""
