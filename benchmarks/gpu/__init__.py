"""What a GPU gives and what the kernels, the engine and the tiers make of it.

    python -m benchmarks.gpu [--only PART ...] [--quick] [--device cpu] [--json FILE]

    limits    copy bandwidth, matrix rate, copies to and from page-locked memory
    grid      every operation of chatserve_kernels against float64
    kernels   each as a share of its limit
    engine    decode steps and prompts of a random model of 8 B parameters, shaped as Llama 3;
              decode steps of a prompt's beginning that all share, and of fp8 pages
    tiers     pages out to the host's memory and in again; a turn after a restart

It needs torch, triton and transformers, and of the server only floors 0 to 3. `parts.py` says what
there is, `driver.py` runs each part's steps in processes of their own, so that one that hangs or
takes the device down costs itself alone, and `report.py` prints and writes what came of it. What
cannot be measured is told with its reason. A wrong result, a step that fails and a process that
dies make the exit status 1.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

# Where nothing is installed, as on a machine that has torch and a copy of this tree.
if find_spec("chatserve_kernels") is None:
    sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))
