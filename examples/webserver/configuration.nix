# The talk's webserver: nginx answers with the store path of its page, and /healthz says that it does.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  release = config.webserver.release;

  # The one small path in which two releases differ. It names itself.
  page = pkgs.runCommand "www-${release}" { } ''
    mkdir $out
    echo "release ${release}: $out" >$out/index.html
    echo "ok" >$out/healthz
  '';
in
{
  options.webserver.release = lib.mkOption {
    type = lib.types.str;
    default = "1";
    description = "What the page calls itself; change it and deploy.";
  };

  config = {
    networking.hostName = lib.mkDefault "web";
    networking.firewall.allowedTCPPorts = [ 80 ];

    services.nginx = {
      enable = true;
      virtualHosts.default = {
        default = true;
        root = page;
        locations."= /healthz".extraConfig = ''
          default_type text/plain;
          access_log off;
        '';
      };
    };

    services.calve.health.http = "/healthz";

    # The public key of cache.sec: `calve keys show cache.sec`. Yours goes here.
    boot.initrd.calve.trustedKeys = [ "calve-demo-1:44uBZo8wZ/bkDgQIN1btJ2IRjle/Gsazn3KqiT+L3b0=" ];
  };
}
