"""The paged operations, and a decoder's others, as machine code for the CPU that runs them.

Theory: plain torch cannot read through a page table, so it copies each context before it reads it,
and it needs many small operations for what is one pass over a row. These programs are written in
LLVM's intermediate language (`language.py`) and compiled when first wanted (`native.py`; LLVM comes
with the llvmlite package, so no compiler is needed), and run on the threads that torch runs on.
Where LLVM is absent, or a size is not served, the doors go on with torch or say so.

`attention.py` calls what `programs.py` says for one model's sizes (`sizes.py`): pages that several
rows have in common are read once for all of them (`../runs.py`); many rows meet them as products of
matrices (`matrices.py`), and leave what `records.py` describes to be joined. `linear.py` is the
code of linear layers, `rows.py` of norms, rotary embedding and gates, `choosing.py` of the choice
of tokens (in vectors of float64, `wide.py`), which `sampling.py` calls; `chain.py` runs many
programs one after the other, and `memory.py` is where weights lie.
"""
