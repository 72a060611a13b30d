"""The one chatserve that the modules on given servers of conversations share."""

from collections.abc import Iterator

import pytest

from tests.wiring.given_redis import GivenSite, given_site


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GivenSite]:
    with given_site(tmp_path_factory.mktemp("given")) as made:
        yield made
