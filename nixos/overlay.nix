# pkgs.calve, the command line; pkgs.calve-agent, what an initrd carries; pkgs.calve-health, its part in stage 2.
final: _prev: {
  calve = final.callPackage ./package.nix { };
  calve-agent = final.callPackage ./payload.nix {
    pname = "calve-agent";
    entry = "calve.boot.main";
  };
  calve-health = final.callPackage ./payload.nix {
    pname = "calve-health";
    entry = "calve.health.main";
  };
}
