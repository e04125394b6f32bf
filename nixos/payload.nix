# A payload: a pruned Python below calve/ that runs one entry, links to its libraries. The agent's, for
# boot.initrd.calve.package, and that of its part in stage 2, for services.calve.package.
{
  runCommand,
  python3Packages,
  calve,
  pname,
  entry,
}:

let
  python = python3Packages.python;
  # Only what the entry reaches need be there: `calve.disk.payload` follows its imports.
  path = python3Packages.makePythonPath [ calve ];
in
runCommand "${pname}-${calve.version}"
  {
    inherit (calve) version;
    meta = {
      description = "What runs ${entry}, and nothing else";
      inherit (calve.meta) license platforms;
    };
  }
  ''
    export PYTHONPATH=${path} PYTHONDONTWRITEBYTECODE=1
    # The bare interpreter: a wrapper of nixpkgs would be carried instead of it.
    ${python}/bin/${python.executable} ${./agent_tree.py} $out ${entry}

    # It must start from where it stands, with nothing but what it has: a damaged policy is an error of its own.
    mkdir run
    echo '{}' >run/agent.json
    said=$(env -i $out/calve/bin/python3 -I -S -B -m ${entry} run/agent.json || true)
    said="$said$(env -i $out/calve/bin/python3 -I -S -B -m ${entry} run || true)"
    grep -q '"code":"internal"' <<<"$said"
  ''
