"""Room for sampled queries: its bytes are what the formula says, and a small budget has less of it."""

import pytest

from oscar_radix.attention.mass import MassSample
from oscar_radix.geometry import Geometry
from oscar_radix.pool.sample_storage import BUDGET_SHARE, LEAST_QUERIES, MOST_QUERIES, SampleStorage
from tests.helpers import GEOMETRY, make_store


@pytest.mark.parametrize("mib", [1, 40, 400, 60000])
def test_room_follows_the_budget(mib):
    geometry = Geometry(36, 8, 32, 128)
    queries = SampleStorage.queries_for(geometry, mib * 2**20)
    assert LEAST_QUERIES <= queries <= MOST_QUERIES
    if queries > LEAST_QUERIES:
        assert SampleStorage.bytes_of(geometry, queries) <= BUDGET_SHARE * mib * 2**20
    assert (queries == MOST_QUERIES) == (mib == 60000)


def test_bytes_are_what_the_formula_says():
    assert SampleStorage.empty(GEOMETRY, 5, "cpu").nbytes == SampleStorage.bytes_of(GEOMETRY, 5)


def test_a_sample_that_does_not_fit_is_refused():
    storage = SampleStorage.empty(GEOMETRY, 5, "cpu")
    MassSample(make_store(), None, requests=2, queries=2, storage=storage).query.fill_(1.0)
    assert storage.query[:, :4].eq(1.0).all()
    assert not storage.query[:, 4:].any()
    with pytest.raises(ValueError, match="2 requests of 3 queries are more than the 5 that there is room for"):
        MassSample(make_store(), None, requests=2, queries=3, storage=storage)
