# pkgs.calve, the command line; pkgs.calve-agent, what an initrd carries.
final: _prev: {
  calve = final.callPackage ./package.nix { };
  calve-agent = final.callPackage ./agent-package.nix { };
}
