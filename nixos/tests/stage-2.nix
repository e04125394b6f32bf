# Stage 2 of a Calve machine in NixOS's own test driver: registration, health, console, who listens.
{ self }:

{
  name = "calve-stage-2";

  nodes.machine =
    { lib, ... }:
    {
      imports = [
        self.nixosModules.server
        ../../examples/webserver/configuration.nix
      ];
      services = {
        # The driver boots its own initrd, and reaches the machine by a shell of its own.
        amazon-ssm-agent.enable = false;
        calve.health.units = [ "nginx.service" ];
      };
      boot = {
        initrd.calve.enable = lib.mkForce false;
        growPartition = false;
      };
    };

  testScript = ''
    machine.wait_for_unit("multi-user.target")

    with subtest("it is healthy"):
        machine.wait_for_unit("calve-health.service")
        machine.wait_for_console_text('"e":"healthy"')
        machine.succeed("curl --fail http://127.0.0.1/healthz")

    with subtest("the page says which store path it is"):
        page = machine.succeed("curl --fail http://127.0.0.1/")
        assert "/nix/store/" in page, page

    with subtest("stage 2 is told on the console"):
        machine.wait_for_console_text('"n":"answer"')

    with subtest("nobody listens but the web server"):
        machine.fail("systemctl is-active sshd.service")
        machine.fail("systemctl cat amazon-init.service")

    with subtest("a registration is loaded and taken away"):
        machine.succeed("nix-store --dump-db >/nix-path-registration")
        machine.succeed("systemctl restart calve-register-paths.service")
        machine.fail("test -e /nix-path-registration")
        machine.succeed("nix-store --query --requisites /run/current-system")
  '';
}
