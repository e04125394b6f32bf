{
  description = "Calve ships NixOS machines to AWS";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;
      eachSystem =
        function:
        lib.genAttrs [
          "x86_64-linux"
          "aarch64-linux"
        ] (system: function (nixpkgs.legacyPackages.${system}.extend self.overlays.default));

      # A module, and the packages that its options default to.
      withPackages = module: {
        imports = [ module ];
        nixpkgs.overlays = [ self.overlays.default ];
      };
    in
    {
      overlays.default = import ./nixos/overlay.nix;

      packages = eachSystem (pkgs: {
        inherit (pkgs) calve calve-agent calve-health;
        default = pkgs.calve;
      });

      nixosModules = {
        agent = withPackages ./nixos/modules/agent.nix;
        machine = withPackages ./nixos/modules/machine.nix;
        server = withPackages ./nixos/profiles/server.nix;
        default = self.nixosModules.machine;
      };

      # The machines of the tests are emulated PCs.
      checks =
        lib.recursiveUpdate
          (eachSystem (pkgs: {
            inherit (pkgs) calve calve-agent calve-health;
          }))
          {
            x86_64-linux = import ./nixos/tests {
              inherit self nixpkgs;
              pkgs = nixpkgs.legacyPackages.x86_64-linux.extend self.overlays.default;
            };
          };

      devShells = eachSystem (pkgs: {
        # What tools/packages.txt is on Debian. The Python packages come from requirements/dev.txt.
        default = pkgs.mkShell {
          packages = with pkgs; [
            busybox
            e2fsprogs
            haproxy
            nix
            python3
            qemu
            uv
            zstd
          ];
        };
      });
    };
}
