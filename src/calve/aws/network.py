"""EC2: the subnets of a group, how they lead out, and which AWS services their VPC reaches by itself.

Source: Amazon EC2 API reference, DescribeSubnets, DescribeRouteTables, DescribeVpcEndpoints; Amazon VPC User Guide,
"Route tables" (a subnet without a table of its own has its VPC's main one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calve.aws.session import needs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calve.aws.session import Session

__all__ = ["Network", "Subnet"]

_EVERYWHERE = "0.0.0.0/0"
_TARGETS = (
    "NatGatewayId",
    "GatewayId",
    "TransitGatewayId",
    "NetworkInterfaceId",
    "InstanceId",
    "LocalGatewayId",
    "CarrierGatewayId",
    "CoreNetworkArn",
    "VpcPeeringConnectionId",
)


@dataclass(frozen=True, slots=True)
class Subnet:
    """A subnet.

    Attributes:
        free_addresses: of IPv4.
        public: its machines get public addresses unless their launch template says otherwise.
        egress: what its default route of IPv4 leads to (`nat-…`, `igw-…`); empty where it has none that works.
    """

    id: str
    vpc_id: str
    zone: str
    free_addresses: int
    public: bool
    egress: str

    @property
    def leads_out(self) -> bool | None:
        """Say whether a machine in it reaches the internet; None where that hangs on the machine's own address."""
        if self.egress.startswith("igw-") and not self.public:
            return None
        return bool(self.egress)


class Network:
    """Subnets and endpoints for one session; thread-safe.

    Attributes:
        region: the region's name.
    """

    def __init__(self, session: Session) -> None:
        self._client = session.client("ec2")
        self.region = str(self._client.meta.region_name)

    @needs("ec2:DescribeSubnets", "ec2:DescribeRouteTables")
    def subnets(self, ids: Iterable[str]) -> tuple[Subnet, ...]:
        """Describe subnets and their default routes.

        Raises:
            NotFoundError: there is no such subnet.
        """
        wanted = list(ids)
        if not wanted:
            return ()
        rows = self._client.describe_subnets(SubnetIds=wanted)["Subnets"]
        vpcs = sorted({row["VpcId"] for row in rows})
        pages = self._client.get_paginator("describe_route_tables").paginate(
            Filters=[{"Name": "vpc-id", "Values": vpcs}]
        )
        routes = _default_routes(table for page in pages for table in page["RouteTables"])
        return tuple(_subnet(row, routes) for row in rows)

    @needs("ec2:DescribeVpcEndpoints")
    def endpoints(self, vpc_id: str) -> frozenset[str]:
        """Return the services (`com.amazonaws.REGION.autoscaling`) whose usual names lead to an endpoint in a VPC."""
        pages = self._client.get_paginator("describe_vpc_endpoints").paginate(
            Filters=[{"Name": "vpc-id", "Values": [vpc_id]}]
        )
        return frozenset(
            row["ServiceName"]
            for page in pages
            for row in page["VpcEndpoints"]
            if row.get("State", "").lower() == "available"
            and (row.get("PrivateDnsEnabled") or row.get("VpcEndpointType") == "Gateway")
        )


def _default_routes(tables: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Return where default routes lead, by subnet, and by VPC for its main table."""
    found: dict[str, str] = {}
    for table in tables:
        for one in table.get("Associations", ()):
            key = table["VpcId"] if one.get("Main") else one.get("SubnetId")
            if key:
                found[key] = _egress(table)
    return found


def _egress(table: dict[str, Any]) -> str:
    for route in table.get("Routes", ()):
        works = route.get("State", "active") == "active"
        if works and route.get("DestinationCidrBlock") == _EVERYWHERE:
            return next((str(route[name]) for name in _TARGETS if route.get(name)), "")
    return ""


def _subnet(row: dict[str, Any], routes: dict[str, str]) -> Subnet:
    return Subnet(
        row["SubnetId"],
        row["VpcId"],
        row.get("AvailabilityZone", ""),
        row.get("AvailableIpAddressCount", 0),
        row.get("MapPublicIpOnLaunch", False),
        routes.get(row["SubnetId"], routes.get(row["VpcId"], "")),
    )
