"""Which connection is closed when a server has too many."""

from udptun.connections import Connections


def test_the_longest_idle_connection_is_closed_for_a_new_one() -> None:
    closed: list[str] = []
    open_ = Connections[str](3, closed.append)
    assert all(map(open_.add, "abc"))
    open_.request_begins("a")
    assert open_.add("d") and closed == ["b"]
    open_.request_ends("a")  # idle again, after c and d
    assert open_.add("e") and closed == ["b", "c"]
    assert open_.add("f") and closed == ["b", "c", "d"]
    assert open_.add("g") and closed == ["b", "c", "d", "a"]


def test_busy_connections_are_not_closed() -> None:
    closed: list[str] = []
    open_ = Connections[str](2, closed.append)
    for name in "ab":
        open_.add(name)
        open_.request_begins(name)
    assert not open_.add("c") and closed == []
    open_.remove("a")
    assert open_.add("d") and closed == []


def test_the_oldest_request_ends_if_the_server_allows_it() -> None:
    idle: list[str] = []
    busy: list[str] = []
    open_ = Connections[str](3, idle.append, busy.append)
    for name in "abc":
        assert open_.add(name)
    for name in "bac":
        open_.request_begins(name)
    assert open_.add("d") and (idle, busy) == ([], ["b"])
    open_.request_ends("b")  # its answer ends, because its connection is closed
    assert open_.add("e") and (idle, busy) == (["d"], ["b"])  # an idle one goes first
    open_.request_begins("e")
    assert open_.add("f") and (idle, busy) == (["d"], ["b", "a"])


def test_only_a_connection_without_any_request_is_silent() -> None:
    closed: list[str] = []
    open_ = Connections[str](9, closed.append)
    for name in "abcd":
        open_.add(name)
    open_.request_begins("a")
    open_.request_begins("b")
    open_.request_ends("b")
    open_.remove("d")
    for name in "abcd":
        open_.close_if_silent(name)
        open_.close_if_silent(name)
    assert closed == ["c"]
    open_.request_begins("c")  # closed in the meantime: not counted any more
    open_.request_ends("c")
    open_.remove("c")
