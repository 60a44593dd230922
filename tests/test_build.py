"""The build changes with the code, and only with the code."""

import pytest

from udptun.build import build_id, build_of


@pytest.fixture
def package(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "sub" / "core.so").write_bytes(b"two")
    return tmp_path


def test_a_build_differs_with_each_source_and_compiled_module(package):
    builds = [build_of(package)]
    for name, text in (("a.py", "two"), ("sub/core.so", "three"), ("b.py", "")):
        (package / name).write_text(text)
        builds.append(build_of(package))
    (package / "b.py").rename(package / "c.py")
    builds.append(build_of(package))
    assert len(set(builds)) == 5


def test_other_files_do_not_matter(package):
    before = build_of(package)
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "a.pyc").write_text("x")
    (package / "py.typed").write_text("")
    assert build_of(package) == before


def test_the_build_of_this_process():
    assert len(build_id()) == 12
    assert build_id() == build_id()
