# A lean server that nobody logs in to: nothing is built, evaluated or read on it. Every value is a default.
{
  lib,
  ...
}:

let
  inherit (lib) mkDefault;
in
{
  imports = [ ../modules/machine.nix ];

  services.calve.enable = mkDefault true;

  # UEFI starts the image's own loader: no variable is written, no menu waits.
  boot.loader.efi.canTouchEfiVariables = mkDefault false;
  boot.loader.timeout = mkDefault 0;

  # No manuals, no desktop, no tools to install with.
  documentation.enable = mkDefault false;
  documentation.nixos.enable = mkDefault false;
  environment.defaultPackages = mkDefault [ ];
  environment.stub-ld.enable = mkDefault false;
  fonts.fontconfig.enable = mkDefault false;
  programs.command-not-found.enable = mkDefault false;
  programs.nano.enable = mkDefault false;
  xdg.autostart.enable = mkDefault false;
  xdg.icons.enable = mkDefault false;
  xdg.mime.enable = mkDefault false;
  xdg.sounds.enable = mkDefault false;

  # A store, its garbage collector, and no Nix expression: no channel, no registry, no search path, no rebuild.
  # `ssh` delivery switches a running machine: it needs system.switch.enable = true.
  nix.channel.enable = mkDefault false;
  nix.nixPath = mkDefault [ ];
  nix.settings.allowed-users = mkDefault [ "root" ];
  nixpkgs.flake.setFlakeRegistry = mkDefault false;
  nixpkgs.flake.setNixPath = mkDefault false;
  system = {
    disableInstallerTools = mkDefault true;
    switch.enable = mkDefault false;
  };

  # Unattended: whatever goes wrong, nobody answers a prompt.
  systemd.enableEmergencyMode = mkDefault false;
  time.timeZone = mkDefault "UTC";
}
