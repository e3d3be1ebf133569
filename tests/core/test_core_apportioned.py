"""Laws of whole draws: the order against its definition, its bound, and epochs counted as they are written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chrysalis_ray.core.apportioned import apportioned, first_draws, rows_of_epochs

quotas = st.lists(st.one_of(st.just(0), st.integers(1, 60)), min_size=1, max_size=6).filter(any)


def by_sorting(of):
    """The definition: every draw with its key, lowest first."""
    return [place for _, place in sorted(((2 * j + 1) / q, place) for place, q in enumerate(of) for j in range(q))]


@given(quotas, st.integers(0, 3))
def test_draws_are_those_of_the_lowest_keys_and_of_n_rows_everyone_has_its_part(of, rounds):
    order, length, kinds = by_sorting(of), sum(of), sum(q > 0 for q in of)
    for rows in range(length + 1):
        counts = first_draws(of, rounds * length + rows)
        assert counts == [rounds * q + order[:rows].count(place) for place, q in enumerate(of)]
        for q, count in zip(of, counts, strict=True):
            if q:
                bound = 0.5 + (kinds - 2) * q / (2 * length) if kinds > 1 else 0.0
                assert abs(count - rounds * q - rows * q / length) <= bound + 1e-9


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=8), st.floats(0, 1))
@settings(max_examples=60)
def test_long_stretches_are_counted_without_walking_them(of, part):
    rows = int(part * sum(of))
    counts = first_draws(of, rows)
    assert sum(counts) == rows
    assert all(0 <= count <= q for count, q in zip(counts, of, strict=True))
    assert first_draws(of, sum(of)) == of


@given(
    st.dictionaries(st.sampled_from("abcde"), st.one_of(st.just(0.0), st.floats(1e-4, 9)), min_size=1).filter(
        lambda shares: any(shares.values())
    ),
    st.integers(1, 5000),
    st.data(),
)
def test_apportioned_rows_are_whole_within_one_and_inside_their_room(shares, rows, data):
    total = sum(shares.values())
    room = {d: data.draw(st.integers(int(s / total * rows), rows)) for d, s in shares.items() if data.draw(st.booleans())}
    found = apportioned(shares, rows, room)
    assert sum(found.values()) == rows
    assert set(found) == {domain for domain, share in shares.items() if share > 0.0}
    if set(found) - set(room):
        assert all(found[domain] <= room[domain] for domain in found if domain in room)
    if not room:
        assert all(abs(found[domain] - shares[domain] / total * rows) < 1.0 for domain in found)


@pytest.mark.parametrize(("epochs", "rows", "most"), [(0.29, 100, 29), (0.1, 30, 3), (2.5, 3, 7), (1e-9, 5, 0), (4, 12, 48)])
def test_epochs_are_counted_as_they_are_written(epochs, rows, most):
    """0.29 x 100 is 28.999999999999996 in floating point."""
    assert rows_of_epochs(epochs, rows) == most
