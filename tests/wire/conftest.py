"""The two implementations of the data path's steps: the same tests run on both."""

import importlib
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    if name == "reference":
        return importlib.import_module("tests.reference")
    try:
        return importlib.import_module("tests.steps")
    except ImportError as error:
        pytest.fail(
            f"tests.steps cannot be imported ({error}). Build it: `python tests/steps/build.py`.",
            pytrace=False,
        )


@pytest.fixture(scope="session", params=["reference", "compiled"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    """Return each implementation in turn."""
    return _load(request.param)


@pytest.fixture(scope="session")
def compiled() -> ModuleType:
    """The compiled steps, for tests that compare them with the reference."""
    return _load("compiled")
