# The agent in NixOS's systemd initrd: it pulls the system that user data names and flips the system profile, before
# anything looks for a system to start. Boot with init=/nix/var/nix/profiles/system/init. docs/reference/nixos.md.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkOption types;
  cfg = config.boot.initrd.calve;

  # The text that an initrd of Calve's own has too; NixOS ignores [Install], so it is read out of it here.
  unit = builtins.readFile ../../src/calve/disk/data/calve-agent.service;
  requiredBy = lib.concatMap (
    line: lib.optionals (lib.hasPrefix "RequiredBy=" line) (lib.splitString " " (lib.removePrefix "RequiredBy=" line))
  ) (lib.splitString "\n" unit);

  policy = {
    version = 1;
    root = "/sysroot";
    keys = cfg.trustedKeys;
    ca_file = if cfg.caFile == null then null else "/etc/calve/ca.pem";
    hold_s = cfg.holdSeconds;
    memory_mb = cfg.memoryMB;
    inherit (cfg) rescue debug;
  };

  isKey = key: builtins.match "[^:[:space:]]+:[A-Za-z0-9+/]{43}=" key != null;
  wrongKeys = lib.filter (key: !isKey key) cfg.trustedKeys;
in
{
  imports = [ ./drivers.nix ];

  options.boot.initrd.calve = {
    enable = lib.mkEnableOption "the Calve agent, which pulls this machine's system in the initrd";

    package = mkOption {
      type = types.package;
      default = pkgs.calve-agent;
      defaultText = lib.literalExpression "pkgs.calve-agent";
      description = "The agent: a pruned Python below `calve/`, and links to the libraries that it loads.";
    };

    trustedKeys = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "acme-1:7Jm3qsOaN7mQz1xG1u3l1yBxgA9m0z1M0yQO5m9d0hQ=" ];
      description = ''
        Public keys, `NAME:BASE64`, by which a store path must be signed. User data chooses among them and brings
        none. `calve keys show FILE` prints the public key of a signing key.
      '';
    };

    caFile = mkOption {
      type = types.nullOr types.path;
      default = "${pkgs.cacert}/etc/ssl/certs/ca-bundle.crt";
      defaultText = lib.literalExpression ''"''${pkgs.cacert}/etc/ssl/certs/ca-bundle.crt"'';
      description = "Certificate authorities for HTTPS, a PEM file; null trusts none.";
    };

    holdSeconds = mkOption {
      type = types.ints.between 0 3600;
      default = 60;
      description = "How long a failed machine stays on before it powers off, so that its console is read.";
    };

    memoryMB = mkOption {
      type = types.ints.between 36 1024;
      default = 48;
      description = "Memory that the agent may use; the number of its connections follows from it.";
    };

    nameservers = mkOption {
      type = types.listOf types.str;
      default = [ "169.254.169.253" ];
      description = ''
        Resolvers in the initrd. Amazon's answers at the default address in every VPC that has DNS support on. Not
        used where `boot.initrd.services.resolved.enable` is set: then DHCP names them.
      '';
    };

    rescue = mkOption {
      type = types.bool;
      default = false;
      description = ''
        What happens to a machine whose user data is not Calve's, or that has none: start the system that the image
        brought, in place of powering off.
      '';
    };

    debug = mkOption {
      type = types.bool;
      default = false;
      description = ''
        The image's policy: allow a root shell on the serial console. It needs `calve.debug=1` on the kernel command
        line as well; neither is enough alone.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.trustedKeys != [ ];
        message = ''
          boot.initrd.calve.trustedKeys is empty: the machine trusts no signing key and could pull nothing.
          Add the public key of whoever pushes; `calve keys show FILE` prints it.
        '';
      }
      {
        assertion = wrongKeys == [ ];
        message = ''
          boot.initrd.calve.trustedKeys: not a public key, NAME:BASE64 of 32 bytes: ${lib.concatStringsSep ", " wrongKeys}
        '';
      }
      {
        assertion = config.boot.initrd.systemd.enable;
        message = "boot.initrd.calve.enable needs boot.initrd.systemd.enable: the scripted stage 1 cannot run the agent.";
      }
      {
        assertion = !lib.any (lib.hasPrefix "init=") config.boot.kernelParams;
        message = ''
          boot.kernelParams has an init= of its own. Whoever boots the machine gives one,
          init=/nix/var/nix/profiles/system/init, and there must be no second.
        '';
      }
    ];

    boot.initrd = {
      network.enable = true;
      # Only the scripted stage 1 would; said here so that nobody turns it on.
      network.flushBeforeStage2 = false;
      services.resolved.enable = lib.mkDefault false;

      systemd = {
        enable = true;
        network = {
          enable = true;
          networks."10-calve" = import ./network.nix;
          wait-online.enable = lib.mkDefault false;
        };

        storePaths = [ cfg.package ];
        contents = {
          "/calve".source = "${cfg.package}/calve";
          "/etc/calve/agent.json".text = builtins.toJSON policy;
          # What this initrd offers: a closure that expects the same is started without kexec.
          "/etc/calve/contract.json".text =
            builtins.toJSON config.boot.bootspec.extensions."org.calve.v1";
          "/etc/calve/ca.pem" = lib.mkIf (cfg.caFile != null) { source = cfg.caFile; };
          "/etc/resolv.conf" = lib.mkIf (!config.boot.initrd.services.resolved.enable) {
            text = lib.concatMapStrings (server: "nameserver ${server}\n") cfg.nameservers;
          };
        };

        units."calve-agent.service" = {
          text = unit;
          inherit requiredBy;
        };

        services = {
          # The agent tells of its own failures. This tells of what keeps it from being started, a root disk that does
          # not appear for one, and ends the machine: in the emergency shell a fleet's machine waits for nobody.
          calve-emergency = {
            description = "Calve: power off a machine whose initrd failed";
            wantedBy = [ "emergency.target" ];
            unitConfig = {
              DefaultDependencies = false;
              SuccessAction = "poweroff-force";
              FailureAction = "poweroff-force";
            }
            // lib.optionalAttrs cfg.debug { ConditionKernelCommandLine = "!calve.debug=1"; };
            serviceConfig = {
              Type = "oneshot";
              StandardOutput = "journal+console";
              SyslogIdentifier = "calve-agent";
            };
            script = ''
              hold=${toString cfg.holdSeconds}
              read -r line </proc/cmdline
              for word in $line; do
                case $word in calve.hold=*) hold=''${word#calve.hold=} ;; esac
              done
              code=disk-fault message="the root disk is not mounted"
              while read -r _ place _; do
                [ "$place" != /sysroot ] || { code=internal message="the initrd failed after its root disk was mounted"; }
              done </proc/mounts
              read -r now _ </proc/uptime
              echo "@@calve {\"v\":1,\"t\":$now,\"e\":\"fail\",\"code\":\"$code\",\"phase\":\"network\",\"message\":\"$message\"}"
              sleep "$hold"
            '';
          };
        }
        // lib.optionalAttrs cfg.debug {
          calve-debug-shell = {
            description = "Calve: root shell on the serial console";
            wantedBy = [ "initrd.target" ];
            after = [ "systemd-udevd.service" ];
            before = [ "shutdown.target" ];
            conflicts = [ "shutdown.target" ];
            unitConfig = {
              DefaultDependencies = false;
              ConditionKernelCommandLine = "calve.debug=1";
              IgnoreOnIsolate = true;
            };
            serviceConfig = {
              ExecStart = "/bin/bash -i";
              Restart = "always";
              RestartSec = 0;
              StandardInput = "tty-force";
              StandardOutput = "tty";
              StandardError = "tty";
              TTYPath = "/dev/ttyS0";
              TTYReset = true;
              KillSignal = "SIGHUP";
            };
          };
        };
      };
    };

    # Which kernel runs, for the agent: kernels of one release may differ.
    boot.kernelParams = [ "calve.kernel=${config.boot.kernelPackages.kernel}" ];

    # What this closure's initrd and stage 2 expect of each other: where it is what the booted initrd has, and the
    # kernel is the same, the machine switches root; else it starts this closure's own kernel and initrd.
    boot.bootspec.extensions."org.calve.v1" = {
      agent = cfg.package.version;
      initrdAbi = 1;
      kernelRelease = config.boot.kernelPackages.kernel.modDirVersion;
      nixosInit = config.system.nixos-init.enable or false;
      etcOverlay = config.system.etc.overlay.enable;
      etcMutable = config.system.etc.overlay.mutable;
      # Whoever completes a launch hook: without it a group with a hook refuses this closure.
      healthUnits = lib.optional (config.services.calve.enable or false) "calve-health.service";
    };
  };
}
