# One network for both stages: what the initrd leased stays leased, so nothing is torn down between them.
{
  matchConfig = {
    Type = "ether";
    # Cards, not what a container's bridge makes.
    Kind = "!*";
  };
  networkConfig = {
    DHCP = "ipv4";
    # Waiting for a router that does not answer would delay every boot of a subnet without IPv6.
    IPv6AcceptRA = false;
    LinkLocalAddressing = "no";
    KeepConfiguration = "dhcp-on-stop";
  };
  linkConfig.RequiredFamilyForOnline = "ipv4";
}
