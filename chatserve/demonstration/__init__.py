"""The demonstration model: where its folder lies, and the code that makes and measures it.

Nothing here is imported by the server but the path.  The parts import each other one way only:
`corpus` (text) ← `tokenizer` ← `train`, `evaluate`.
"""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"

__all__ = ["MODEL_FOLDER"]
