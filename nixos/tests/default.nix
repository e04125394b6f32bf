# VM tests on NixOS that mirror tests/vm: `nix flake check`, or `nix build .#checks.x86_64-linux.boot`.
{
  self,
  nixpkgs,
  pkgs,
}:

{
  boot = import ./boot.nix { inherit self nixpkgs pkgs; };
  stage-2 = pkgs.testers.runNixOSTest (import ./stage-2.nix { inherit self; });
}
