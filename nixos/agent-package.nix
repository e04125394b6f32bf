# The agent's payload, for boot.initrd.calve.package: a pruned Python below calve/, links to its libraries.
{
  runCommand,
  python3Packages,
  calve,
}:

let
  python = python3Packages.python;
  # Only what the agent reaches need be there: `calve.disk.payload` follows its imports.
  path = python3Packages.makePythonPath [ calve ];
in
runCommand "calve-agent-${calve.version}"
  {
    inherit (calve) version;
    meta = {
      description = "The Calve agent, as an initrd carries it";
      inherit (calve.meta) license platforms;
    };
  }
  ''
    export PYTHONPATH=${path} PYTHONDONTWRITEBYTECODE=1
    # The bare interpreter: a wrapper of nixpkgs would be carried instead of it.
    ${python}/bin/${python.executable} ${./agent_tree.py} $out

    # It must start from where it stands, with nothing but what it has: no policy is an error of its own.
    said=$(env -i $out/calve/bin/python3 -I -S -B -m calve.boot.main /nonexistent || true)
    grep -q '"code":"internal"' <<<"$said"
  ''
