"""A fleet on a virtual clock: see `calve.demo.virtual`."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from calve.demo.virtual import VirtualFleet, Wanted, endpoint


@pytest.fixture
def fleets(tmp_path):
    """Return what makes a new fleet, as a context manager, as often as one likes."""
    count = itertools.count()
    with endpoint() as served:

        @contextlib.contextmanager
        def make(**options):
            directory = tmp_path / f"bucket-{next(count)}"
            with VirtualFleet(directory, served, Wanted(**options)) as fleet:
                yield fleet

        yield make


@pytest.fixture
def place(request, fleets):
    with fleets(**getattr(request, "param", {})) as made:
        yield made
