# Evaluate modules by the real module system, on stub declarations: everything that they set, and which assertions fail.
{
  nixpkgsLib,
  modules,
}:

let
  lib = import (nixpkgsLib + "/lib");

  package = name: {
    type = "derivation";
    version = "1.2.3";
    inherit name;
    outPath = "/nix/store/00000000000000000000000000000000-${name}";
  };

  pkgs = lib.genAttrs [ "cacert" "calve-agent" "calve-health" "coreutils" "util-linux" ] package // {
    runCommand =
      name: _env: _script:
      package name;
  };

  result = lib.evalModules {
    modules = [ ./stubs.nix ] ++ modules;
    specialArgs = { inherit pkgs; };
  };
in
{
  failed = map (a: a.message) (lib.filter (a: !a.assertion) result.config.assertions);
  # Without what is declared here only to be read.
  config = removeAttrs result.config [ "assertions" ];

  # Options of ours that say nothing of themselves.
  undescribed = map (o: lib.showOption o.loc) (
    lib.filter (o: (o.description or "") == "") (
      lib.collect lib.isOption (
        {
          agent = result.options.boot.initrd.calve or { };
          services = result.options.services.calve or { };
        }
      )
    )
  );
}
