"""After a failure: every code, for a machine that is new and for one that has served."""

from __future__ import annotations

import pytest

from calve.boot.failure import Failure
from calve.boot.fallback import after, instead
from calve.boot.served import Served
from calve.contract.codes import Code
from calve.nix.storepath import StorePath

GOOD, BAD, IMAGE = (
    StorePath.parse(f"/nix/store/{letter * 32}-system") for letter in ("a", "b", "c")
)
NEW, OLD = Served(), Served(GOOD)


def fell(code, served, **options):
    return after(Failure(code, "pull", "x"), served, **{"current": IMAGE, **options})


@pytest.mark.parametrize("code", list(Code))
def test_a_new_machine_never_serves_another_system(code):
    assert fell(code, NEW) is None


@pytest.mark.parametrize("code", list(Code))
def test_one_that_has_served_goes_on_where_the_failure_may_pass(code):
    assert fell(code, OLD) == (GOOD if code.transient else None)


@pytest.mark.parametrize("served", [NEW, OLD])
@pytest.mark.parametrize("code", [Code.USERDATA_ABSENT, Code.USERDATA_FOREIGN])
def test_rescue_is_for_user_data_that_is_not_ours_and_starts_the_image_s_system(code, served):
    assert fell(code, served, rescue=True) == IMAGE
    assert fell(code, served, rescue=True, current=None) is None
    assert fell(code, served) is None


def test_rescue_is_for_nothing_else():
    for code in set(Code) - {Code.USERDATA_ABSENT, Code.USERDATA_FOREIGN}:
        assert fell(code, NEW, rescue=True) is None


def test_what_was_not_healthy_here_is_not_started_again():
    assert instead(BAD, Served(GOOD, BAD)) == GOOD
    assert instead(GOOD, Served(GOOD, BAD)) == GOOD
    assert instead(IMAGE, Served(GOOD, BAD)) == IMAGE
    # A new machine has nothing else: it tries, and ends.
    assert instead(BAD, Served(None, BAD)) == BAD
