"""The machines of a fleet as rows."""

from calve.aws.autoscaling import Group, GroupInstance
from calve.aws.elb import TargetHealth
from calve.cli import fleet_rows
from calve.contract.userdata import UserData
from calve.errors import NotFoundError
from calve.rollout.observe import health_of


def told(release, fleet="web"):
    return UserData(f"/nix/store/{'a' * 32}-s", ("s3://acme",), "0" * 64, ("k-1",), fleet, release)


def group(*members):
    return Group("web", "lt-1", "2", 0, 9, len(members), "ELB", (), (), members)


def member(name, version, lifecycle="InService", healthy=True, template="lt-1"):
    return GroupInstance(name, lifecycle, healthy, version, "eu-central-1a", template)


def by(*found):
    return {one.id: one for one in found}


def of(told, template="lt-1"):
    return {(template, version): one for version, one in told.items()}


def health(name, state, reason=None):
    return TargetHealth(name, state, reason, None)


def test_members_have_their_release_and_target():
    found = fleet_rows.rows(
        "web",
        group(member("i-2", "2", "Pending:Wait"), member("i-1", "1")),
        by(health("i-1", "healthy"), health("i-9", "draining")),
        of({"1": told(4), "2": told(5)}),
    )
    assert [(one.id, one.release, one.balance, one.state) for one in found] == [
        ("i-1", 4, "healthy", "InService, healthy"),
        ("i-2", 5, "-", "Pending:Wait"),
    ]


def test_a_version_that_is_not_of_this_fleet_is_of_no_release_and_goes_first():
    found = fleet_rows.rows(
        "web",
        group(*(member(f"i-{at}", version) for at, version in enumerate(("1", "2", "3", None)))),
        {},
        of({"1": told(4), "2": told(4, "mail"), "3": None}),
    )
    assert [(one.id, one.release) for one in found] == [
        ("i-3", None),
        ("i-1", None),
        ("i-2", None),
        ("i-0", 4),
    ]


class Balancer:
    def __init__(self, **groups):
        self._groups = groups

    def health(self, arn):
        if arn not in self._groups:
            raise NotFoundError("TargetGroupNotFound", place=arn)
        return tuple(self._groups[arn])


def test_of_several_target_groups_one_that_is_not_healthy_counts_and_a_deleted_one_says_nothing():
    bad, good = health("i-1", "unhealthy", "Target.Timeout"), health("i-1", "healthy")
    balancer = Balancer(a=[bad], b=[good])
    for arns in (["a", "b"], ["b", "a"], ["gone", "b", "a"]):
        assert health_of(balancer, arns) == {"i-1": bad}
    (row,) = fleet_rows.rows(
        "web", group(member("i-1", "1", healthy=False)), by(bad), of({"1": told(4)})
    )
    assert row.state == "InService, unhealthy (Target.Timeout), unhealthy for the group"


def test_the_same_number_of_another_template_is_another_version():
    found = fleet_rows.rows(
        "web",
        group(member("i-1", "1"), member("i-2", "1", template="lt-2")),
        {},
        of({"1": told(4)}) | of({"1": told(5)}, "lt-2"),
    )
    assert [(one.id, one.release) for one in found] == [("i-1", 4), ("i-2", 5)]


def test_machines_that_share_a_state_are_counted():
    found = fleet_rows.rows(
        "web",
        group(member("i-1", "1"), member("i-2", "2"), member("i-3", "1")),
        {},
        of({"1": told(4), "2": told(5)}),
    )
    assert fleet_rows.counts(found) == [(4, "1", "InService", 2), (5, "2", "InService", 1)]


def test_spans_are_written_in_one_unit():
    spans = [None, -5, 0, 119.9, 120, 7199, 7200, 172_799, 172_800]
    written = ["-", "0 s", "0 s", "119 s", "2 min", "119 min", "2 h", "47 h", "2 d"]
    assert [fleet_rows.span(one) for one in spans] == written
