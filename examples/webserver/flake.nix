# `calve build web` builds nixosConfigurations.web, which calve.toml names beside this file.
{
  description = "A web server in a Calve fleet";

  inputs = {
    # In a repository of your own: Calve's address.
    calve.url = "path:../..";
    nixpkgs.follows = "calve/nixpkgs";
  };

  outputs =
    { calve, nixpkgs, ... }:
    {
      nixosConfigurations.web = nixpkgs.lib.nixosSystem {
        system = "x86_64-linux";
        modules = [
          calve.nixosModules.server
          ./configuration.nix
          { system.stateVersion = "25.11"; }
        ];
      };
    };
}
