# NixOS's kernel and initrd in the simulated region's machines: 512 MB, an empty disk, a metadata service, a bucket.
# The machines are emulated, so no KVM is needed; minutes each.
{
  self,
  nixpkgs,
  pkgs,
}:

let
  inherit (pkgs) lib;

  web =
    release:
    (nixpkgs.lib.nixosSystem {
      inherit (pkgs.stdenv.hostPlatform) system;
      modules = [
        self.nixosModules.server
        ../../examples/webserver/configuration.nix
        {
          boot = {
            initrd.calve = {
              # Of rig.py; it signs nothing but tests.
              trustedKeys = lib.mkForce [ "nixos-test-1:O2onvM62pC1io6jQKm8Nc2UyFXcd4kOmOsBIoYtZ2ik=" ];
              caFile = null;
              holdSeconds = 1;
            };
            growPartition = false; # the disk has none
          };
          services.amazon-ssm-agent.enable = false;
          webserver.release = lib.mkForce release;
          system.stateVersion = lib.trivial.release;
        }
      ];
    }).config;

  first = web "1";
  second = web "2";
  toplevels = map (config: config.system.build.toplevel) [
    first
    second
  ];

  plan = pkgs.writeText "plan.json" (
    builtins.toJSON {
      kernel = "${first.boot.kernelPackages.kernel}/${first.system.boot.loader.kernelFile}";
      initrd = "${first.system.build.initialRamdisk}/${first.system.boot.loader.initrdFile}";
      command_line = toString (first.boot.kernelParams ++ [ "init=/nix/var/nix/profiles/system/init" ]);
      systems = map toString toplevels;
      registration = "${pkgs.closureInfo { rootPaths = toplevels; }}/registration";
    }
  );
in
pkgs.runCommand "calve-nixos-boot"
  {
    nativeBuildInputs = with pkgs; [
      busybox
      e2fsprogs
      haproxy
      qemu
      (python3.withPackages (_: [ calve ]))
    ];
  }
  ''
    # Sockets of QEMU and HAProxy have short names only.
    export TMPDIR=/tmp
    python3 ${./rig.py} ${plan}
    touch $out
  ''
