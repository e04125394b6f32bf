# What a machine of a fleet wants of NixOS, whichever way its system is delivered. docs/reference/nixos.md.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:

let
  inherit (lib) mkDefault mkOption types;
  cfg = config.services.calve;
  health = cfg.health;
  debug = config.boot.initrd.calve.debug;
  systemctl = "${config.systemd.package}/bin/systemctl";

in
{
  imports = [
    ./agent.nix
    ./drivers.nix
  ];

  options.services.calve = {
    enable = lib.mkEnableOption "what a machine of a Calve fleet needs";

    package = mkOption {
      type = types.package;
      default = pkgs.calve-health;
      defaultText = lib.literalExpression "pkgs.calve-health";
      description = "The agent's part in stage 2: a pruned Python below `calve/`.";
    };

    health = {
      http = mkOption {
        type = types.nullOr (types.strMatching "/[!-~]*");
        default = null;
        example = "/healthz";
        description = "Path that must answer 2xx on this machine before its system counts as good.";
      };
      port = mkOption {
        type = types.port;
        default = 80;
        description = "Port of {option}`services.calve.health.http`.";
      };
      tcp = mkOption {
        type = types.listOf types.port;
        default = [ ];
        description = "Ports that must accept a connection.";
      };
      units = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "nginx.service" ];
        description = "Units that must be active.";
      };
      command = mkOption {
        type = types.str;
        default = "";
        description = "Shell command that must succeed; empty for none.";
      };
      withinSeconds = mkOption {
        type = types.ints.between 1 3600;
        default = 180;
        description = "Seconds until all of it must hold; it is tried every second.";
      };
    };
  };

  config = lib.mkIf cfg.enable {
    boot = {
      initrd = {
        systemd.enable = true;
        calve.enable = mkDefault true;
      };
      # The image has the boot loader; a machine never writes it, kernels change by kexec.
      loader.grub.enable = mkDefault false;
      loader.systemd-boot.enable = mkDefault false;
      growPartition = mkDefault true;
      kernelParams = [
        "console=ttyS0,115200n8"
        "random.trust_cpu=on"
        # Whoever panics leaves, after somebody could read why.
        "panic=30"
      ];
    };

    fileSystems."/" = {
      device = mkDefault "/dev/disk/by-label/nixos";
      fsType = mkDefault "ext4";
      autoResize = mkDefault true;
    };

    environment.etc."calve/health.json".text = builtins.toJSON {
      version = 1;
      http = lib.optional (health.http != null) {
        path = health.http;
        inherit (health) port;
      };
      inherit (health) tcp units command;
      within_s = health.withinSeconds;
    };

    networking = {
      useNetworkd = mkDefault true;
      useDHCP = mkDefault false;
      # Amazon's clock, which needs no way out.
      timeServers = mkDefault [ "169.254.169.123" ];
    };

    services = {
      openssh.enable = mkDefault false;
      amazon-ssm-agent.enable = mkDefault true;
    };
    users.mutableUsers = mkDefault false;
    # Nobody has a password and no key: who must get in comes by the Systems Manager.
    users.allowNoPasswordLogin = mkDefault true;

    systemd = {
      network.networks."10-calve" = import ./network.nix;

      services = {
        # As the stock register-nix-paths.service does it. Where that one is there it goes first and takes the file
        # away: then this one has nothing to do.
        calve-register-paths = lib.mkIf config.nix.enable {
          description = "Calve: register the pulled store paths with Nix";
          wantedBy = [ "sysinit.target" ];
          after = [
            "local-fs.target"
            "register-nix-paths.service"
          ];
          before = [
            "sysinit.target"
            "shutdown.target"
            "nix-daemon.socket"
            "nix-daemon.service"
          ];
          conflicts = [ "shutdown.target" ];
          restartIfChanged = false;
          unitConfig = {
            DefaultDependencies = false;
            ConditionPathExists = "/nix-path-registration";
          };
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = true;
          };
          script = ''
            ${config.nix.package}/bin/nix-store --load-db </nix-path-registration
            ${pkgs.coreutils}/bin/sync --file-system /nix/var/nix/db
            ${pkgs.coreutils}/bin/rm /nix-path-registration
          '';
        };

        # Evidence: the initrd is behind us; what follows ends with the first answer.
        calve-stage-2 = {
          description = "Calve: say on the console that stage 2 begins";
          wantedBy = [ "sysinit.target" ];
          before = [
            "sysinit.target"
            "shutdown.target"
          ];
          conflicts = [ "shutdown.target" ];
          restartIfChanged = false;
          unitConfig.DefaultDependencies = false;
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = true;
          };
          script = ''
            read -r now _ </proc/uptime
            echo "@@calve {\"v\":1,\"t\":$now,\"e\":\"phase\",\"n\":\"answer\"}" >/dev/console
          '';
        };

        # The agent's part in stage 2: it completes the launch hook and remembers this system as the last good one, or
        # ends the machine.
        calve-health = {
          description = "Calve: find out whether this machine is healthy";
          wantedBy = [ "multi-user.target" ];
          after = [ "multi-user.target" ];
          before = [ "boot-complete.target" ];
          requiredBy = [ "boot-complete.target" ];
          restartIfChanged = false;
          # For units and commands that must hold.
          path = [ config.systemd.package ];
          serviceConfig = {
            Type = "oneshot";
            RemainAfterExit = true;
            ExecStart = "${cfg.package}/calve/bin/python3 -I -S -B -m calve.health.main";
            StandardOutput = "tty";
            StandardError = "tty";
            TTYPath = "/dev/console";
            # It keeps its own time, and then the hold: a day and an hour are the most of both.
            TimeoutStartSec = "25h";
          };
          # What it found out is its exit status: 1 is the end of this machine, 3 goes back to the last good system.
          postStop = ''
            case "$EXIT_STATUS" in
              1) ${systemctl} --force --no-block poweroff ;;
              3) ${systemctl} --force --no-block reboot ;;
            esac
          '';
        };
      }
      // lib.optionalAttrs debug {
        calve-debug-login = {
          description = "Calve: root login on the serial console";
          wantedBy = [ "multi-user.target" ];
          after = [ "multi-user.target" ];
          unitConfig.ConditionPathExists = "/run/calve/debug"; # image and command line allow it
          serviceConfig = {
            # The console has one reader.
            ExecStartPre = "-${systemctl} stop serial-getty@ttyS0.service";
            ExecStart = lib.concatStringsSep " " [
              "${pkgs.util-linux}/bin/agetty --autologin root"
              "--login-program ${config.services.getty.loginProgram}"
              "--keep-baud ttyS0 115200,57600,38400,9600 vt220"
            ];
            Restart = "always";
            StandardInput = "tty";
            StandardOutput = "tty";
            TTYPath = "/dev/ttyS0";
            TTYReset = true;
            TTYVHangup = true;
            UtmpIdentifier = "ttyS0";
            SendSIGHUP = true;
          };
        };
      };
    };

    # It would take user data for a configuration. Only images that import its module have the option.
    virtualisation = lib.optionalAttrs (options.virtualisation ? amazon-init) { amazon-init.enable = false; };
  };
}
