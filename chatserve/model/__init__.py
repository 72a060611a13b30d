"""Models over paged KV: loading and probing, one forward pass, sampling.

May not know: the engine, the cache's names and states, text. It is told which pages to read and
write, and never which request they belong to.
"""

from chatserve.model.layout import KVLayout, LayerShape
from chatserve.model.loaded import GenerationDefaults, LoadedModel
from chatserve.model.loader import load_model
from chatserve.model.sampling import RowLogprobs, SampleRow, Samples, sample

__all__ = [
    "GenerationDefaults",
    "KVLayout",
    "LayerShape",
    "LoadedModel",
    "RowLogprobs",
    "SampleRow",
    "Samples",
    "load_model",
    "sample",
]
