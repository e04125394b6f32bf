# Calve: the command line, and the Python module that the agent is made of (so it is no `buildPythonApplication`).
{
  lib,
  python3Packages,
}:

let
  root = ../.;
  project = (builtins.fromTOML (builtins.readFile ../pyproject.toml)).project;
in
python3Packages.buildPythonPackage {
  pname = project.name;
  inherit (project) version;
  pyproject = true;

  # What the wheel is made of and nothing else: a change of a test rebuilds nobody's machine.
  src = lib.fileset.toSource {
    inherit root;
    fileset = lib.fileset.unions [
      ../src
      ../pyproject.toml
      ../README.md
      ../LICENSE
    ];
  };

  # Any uv_build will do: the project has no extension modules and no dynamic metadata.
  postPatch = ''
    sed -i 's/"uv_build[^"]*"/"uv_build"/' pyproject.toml
  '';

  build-system = [ python3Packages.uv-build ];

  dependencies =
    with python3Packages;
    [
      boto3
      msgspec
      pynacl
      rich
    ]
    ++ lib.optional (pythonOlder "3.14") backports-zstd;

  # Lower bounds are of what the tests ran with; nixpkgs may be a little behind them.
  pythonRelaxDeps = true;
  pythonImportsCheck = [
    "calve.boot.main"
    "calve.cli.main"
  ];

  meta = {
    inherit (project) description;
    license = lib.licenses.mit;
    mainProgram = "calve";
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
