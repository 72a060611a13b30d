"""Operations on paged KV: attention over page tables, KV append, page copies; and what else a
decoder's layers are made of, on a CPU.

May not know: chatserve, models, requests, names. It sees tensors and page ids only.

Theory: a *page* holds a fixed run of token positions of one layer, `[2, page_size, kv_heads,
head_dim]` with K first and V second. A sequence's page table lists its pages in order, so that
position p lies in `page_table[p // page_size]` at offset `p % page_size`. `reference.py` says
slowly what each operation means; `ops.py` holds the checked doors that a model calls, and torch's
way behind them; `cpu/` has machine code for a CPU and `gpu/` Triton kernels, which `runs.py` tells
what pages rows have in common. Every backend behind a door is tested against the reference.
`linear.py`, `int8.py` and `rows.py` are doors of machine code that has nothing to do with pages:
linear layers, norms, rotary embedding and gates. `rotation.py` is the door of rotary embedding
where rows go into pages in the same launch. `sampling.py` is the door of the choice of tokens,
which has kernels for a GPU alone.
"""

from chatserve_kernels.batch import AttentionBatch
from chatserve_kernels.ops import (
    append_kv,
    attention_in_chain,
    copy_pages,
    gated,
    page_checksums,
    paged_attention,
    rms_norm,
)
from chatserve_kernels.rotation import HeadNorms, Rotary, rotate_append

__all__ = [
    "AttentionBatch",
    "HeadNorms",
    "Rotary",
    "append_kv",
    "attention_in_chain",
    "copy_pages",
    "gated",
    "page_checksums",
    "paged_attention",
    "rms_norm",
    "rotate_append",
]
