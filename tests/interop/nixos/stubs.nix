# Declarations of the NixOS options that Calve's modules set or read, with the types that nixpkgs gives them; nothing
# behind them. An option that is set and is not here is an error, as a misspelt one is in NixOS.
{ lib, ... }:

let
  inherit (lib) mkOption types;
  option = type: default: mkOption { inherit type default; };
  bool = option types.bool;
  strings = option (types.listOf types.str) [ ];
  text = option types.lines "";

  unitName = types.strMatching "[a-zA-Z0-9@%:_.\\-]+[.](service|socket|device|mount|automount|swap|target|path|timer|scope|slice)";
  names = option (types.listOf unitName) [ ];
  # One value, or a list of them for a key that may be repeated.
  value =
    let
      atom = types.oneOf [
        types.bool
        types.int
        types.str
        types.path
      ];
    in
    types.either atom (types.listOf atom);
  section = option (types.attrsOf value) { };

  relations = {
    enable = bool true;
    requiredBy = names;
    wantedBy = names;
    aliases = names;
  };

  unit = types.submodule {
    options = relations // {
      text = option (types.nullOr types.str) null;
    };
  };

  common = relations // {
    description = option types.singleLineStr "";
    documentation = strings;
    requires = names;
    wants = names;
    after = names;
    before = names;
    bindsTo = names;
    partOf = names;
    conflicts = names;
    requisite = names;
    onFailure = names;
    onSuccess = names;
    unitConfig = section;
  };

  service = common // {
    environment = option (types.attrsOf (types.nullOr (types.either types.str types.path))) { };
    path = option (types.listOf (types.either types.package types.str)) [ ];
    serviceConfig = section;
    script = text;
    preStart = text;
    postStop = text;
  };

  initrdService = types.submodule { options = service; };
  stage2Service = types.submodule {
    options = service // {
      restartIfChanged = bool true;
      stopIfChanged = bool true;
    };
  };

  network = types.submodule {
    options = {
      enable = bool true;
      matchConfig = section;
      linkConfig = section;
      networkConfig = section;
      dhcpV4Config = section;
    };
  };

  contents = types.submodule (
    { config, ... }:
    {
      options = {
        enable = bool true;
        text = option (types.nullOr types.lines) null;
        source = mkOption { type = types.path; };
      };
      config.source = lib.mkIf (config.text != null) "/nix/store/00000000000000000000000000000000-text";
    }
  );
in
{
  options = {
    assertions = option (types.listOf types.unspecified) [ ];
    warnings = strings;

    boot = {
      bootspec.extensions = option (types.attrsOf types.anything) { };
      growPartition = bool false;
      kernelParams = option (types.listOf (types.strMatching ''([^"[:space:]]|"[^"]*")+'')) [ ];
      kernelPackages = option types.raw {
        kernel = {
          modDirVersion = "6.12.1";
          outPath = "/nix/store/00000000000000000000000000000000-linux-6.12.1";
        };
      };
      initrd = {
        availableKernelModules = strings;
        network.enable = bool false;
        network.flushBeforeStage2 = bool false;
        services.resolved.enable = bool true;
        systemd = {
          enable = bool false;
          contents = option (types.attrsOf contents) { };
          network = {
            enable = bool false;
            networks = option (types.attrsOf network) { };
            wait-online.enable = bool true;
          };
          services = option (types.attrsOf initrdService) { };
          storePaths = option (types.listOf (types.either types.path types.package)) [ ];
          units = option (types.attrsOf unit) { };
        };
      };
      loader = {
        efi.canTouchEfiVariables = bool false;
        grub.enable = bool true;
        systemd-boot.enable = bool false;
        timeout = option (types.nullOr types.int) 5;
      };
    };

    documentation.enable = bool true;
    documentation.nixos.enable = bool true;
    environment.defaultPackages = option (types.listOf types.package) [ ];
    environment.etc = option (types.attrsOf contents) { };
    environment.stub-ld.enable = bool true;
    fileSystems = option (types.attrsOf (
      types.submodule {
        options = {
          autoResize = bool false;
          device = option (types.nullOr types.str) null;
          fsType = option types.str "auto";
        };
      }
    )) { };
    fonts.fontconfig.enable = bool true;
    networking = {
      firewall.allowedTCPPorts = option (types.listOf types.port) [ ];
      hostName = option types.str "nixos";
      timeServers = strings;
      useDHCP = bool true;
      useNetworkd = bool false;
    };
    nix = {
      channel.enable = bool true;
      enable = bool true;
      nixPath = option (types.listOf types.str) [ "nixpkgs=flake:nixpkgs" ];
      package = option types.package {
        type = "derivation";
        name = "nix";
        outPath = "/nix/store/00000000000000000000000000000000-nix";
      };
      settings = option (types.attrsOf types.anything) { };
    };
    nixpkgs.flake.setFlakeRegistry = bool true;
    nixpkgs.flake.setNixPath = bool true;
    programs.command-not-found.enable = bool true;
    programs.nano.enable = bool true;
    services = {
      amazon-ssm-agent.enable = bool false;
      getty.loginProgram = option types.path "/nix/store/00000000000000000000000000000000-shadow/bin/login";
      nginx = {
        enable = bool false;
        virtualHosts = option (types.attrsOf (
          types.submodule {
            options = {
              default = bool false;
              root = option (types.nullOr types.path) null;
              locations = option (types.attrsOf (types.submodule { options.extraConfig = text; })) { };
            };
          }
        )) { };
      };
      openssh.enable = bool false;
    };
    system = {
      disableInstallerTools = bool false;
      etc.overlay.enable = bool false;
      etc.overlay.mutable = bool true;
      switch.enable = bool true;
    };
    systemd = {
      enableEmergencyMode = bool true;
      network.networks = option (types.attrsOf network) { };
      package = option types.package {
        type = "derivation";
        name = "systemd";
        outPath = "/nix/store/00000000000000000000000000000000-systemd";
      };
      services = option (types.attrsOf stage2Service) { };
    };
    time.timeZone = option (types.nullOr types.str) null;
    users.allowNoPasswordLogin = bool false;
    users.mutableUsers = bool true;
    # amazon-options.nix is in every NixOS; amazon-init.nix is where an image imports it.
    virtualisation.amazonImage.sizeMB = option (types.either types.int (types.enum [ "auto" ])) 3072;
    xdg = {
      autostart.enable = bool true;
      icons.enable = bool true;
      mime.enable = bool true;
      sounds.enable = bool true;
    };
  };
}
