"""Models built and loaded once for the whole run."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from chatserve.model import LoadedModel, load_model
from tests.model.families import build

PAGE_SIZE = 16


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a random model of a family; not to be changed."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda family: build(family, root))


@pytest.fixture(scope="session")
def model_of(folder_of: Callable[[str], Path]) -> Callable[..., LoadedModel]:
    """A loaded model of a family in float32, pages of 16."""

    @cache
    def load(family: str, kv_dtype: str = "auto") -> LoadedModel:
        options = {"device": "cpu", "dtype": "float32", "kv_dtype": kv_dtype}
        return load_model(folder_of(family), page_size=PAGE_SIZE, **options)

    return load
