"""Which peers have metrics of their own; sums that never decrease."""

from udptun.control.peer_series import OTHER, PeerSeries


def of(size: int) -> tuple[int, int, int, int]:
    return size // 100, size, 0, 0


def test_the_peers_with_the_most_bytes_are_shown_until_they_leave() -> None:
    series = PeerSeries(2)
    assert series.update({"a": of(100), "b": of(300), "c": of(200), "d": of(50)}) == {
        "b": of(300), "c": of(200), OTHER: (1, 150, 0, 0)}
    # "a" has the most bytes now, but "b" and "c" keep their place
    found = series.update({"a": of(900), "b": of(300), "c": of(200), "d": of(50)})
    assert found == {"b": of(300), "c": of(200), OTHER: (9, 950, 0, 0)}
    found = series.update({"a": of(900), "c": of(200), "d": of(50)})
    assert found == {"a": of(900), "c": of(200), OTHER: (9, 950, 0, 0)}


def test_the_sum_of_the_others_never_decreases() -> None:
    series = PeerSeries(1)
    sums = []
    for peers in (
        {"big": of(1000), "a": of(100), "b": of(100)},
        {"big": of(1000), "a": of(150)},  # b has left
        {"big": of(1000), "a": of(150), "b": of(30)},  # b is back, and counts from 0
        {"a": of(160), "b": of(40)},  # big has left, so a gets its place
        {"a": of(160), "b": of(50)},
        {"a": of(160)},
    ):
        sums.append(series.update(peers)[OTHER][1])
    assert sums == [200, 250, 280, 290, 300, 300]


def test_with_fewer_peers_than_places_there_are_no_others() -> None:
    assert PeerSeries(9).update({"a": of(1)}) == {"a": of(1)}
    assert PeerSeries(9).update({}) == {}
