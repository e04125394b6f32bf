"""A payload: the running Python, pruned to what one entry reaches, as files below `/calve`.

Two have one: the agent in the initrd, and its part in stage 2.

A fresh interpreter imports the entry and all that it may import later, and reports the modules it then has: the
list is what Python itself says, not a guess. With the interpreter and the extension modules go the shared objects
that they need (DT_NEEDED), at the paths where the loader looks. The same list feeds the NixOS package.
"""

from __future__ import annotations

import json
import py_compile
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calve import process
from calve.disk import cpio, elf
from calve.errors import DamagedError

__all__ = ["AGENT", "HEALTH", "PREFIX", "Payload", "build"]

PREFIX = "calve"
AGENT = "calve.boot.main"
HEALTH = "calve.health.main"

# Run in a fresh interpreter, without site: only what the entry names is imported.
_PROBE = """
import sys, json
sys.path.extend(json.loads(sys.argv[1]))
import importlib
entry = importlib.import_module(sys.argv[2])
entry.import_everything()
rows = []
for name, module in sorted(sys.modules.items()):
    spec = getattr(module, "__spec__", None)
    origin = getattr(spec, "origin", None)
    if spec is None or name == "__main__" or spec.name != name:
        continue
    # A frozen module still has a file, where tracebacks and os.py's landmark look for it.
    if origin == "frozen":
        origin = getattr(module, "__file__", None)
    if spec.submodule_search_locations is not None and origin is None:
        origin = "namespace"
    if origin not in (None, "built-in"):
        rows.append([name, origin, spec.submodule_search_locations is not None])
json.dump({"rows": rows, "version": "%d.%d" % sys.version_info[:2]}, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Module:
    """One Python module: its dotted name, its file, and whether it is a package."""

    name: str
    origin: Path
    package: bool


@dataclass(frozen=True, slots=True)
class Payload:
    """What an entry needs at run time.

    Attributes:
        version: of Python, "3.11".
        interpreter: the real python binary.
        modules: every module it may load.
        libraries: shared objects: the file, and its path in the initrd, where the loader finds it.
    """

    version: str
    interpreter: Path
    modules: tuple[Module, ...]
    libraries: tuple[tuple[Path, str], ...]

    @property
    def library_directory(self) -> str:
        """Return where modules stand in the initrd, without a leading slash."""
        return f"{PREFIX}/lib/python{self.version}"

    def entries(self, scratch: Path) -> Iterator[cpio.Entry]:
        """Yield the files of the payload; compiled modules are written below `scratch`."""
        base = self.library_directory
        yield cpio.directory(f"{base}/lib-dynload")
        yield cpio.file(f"{PREFIX}/bin/python3", self.interpreter, executable=True)
        for module in self.modules:
            yield self._entry(module, base, scratch)
        for library, place in self.libraries:
            yield cpio.file(place, library, executable=True)

    def write(self, out: Path) -> None:
        """Write the files below `out/calve`, which must not exist; libraries of the system are left out."""
        with tempfile.TemporaryDirectory(prefix="calve-") as scratch:
            for entry in self.entries(Path(scratch)):
                if not entry.path.startswith(f"{PREFIX}/"):
                    continue
                place = out / entry.path
                if stat.S_ISDIR(entry.mode):
                    place.mkdir(parents=True, exist_ok=True)
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(entry.content, bytes):
                    place.write_bytes(entry.content)
                else:
                    shutil.copyfile(entry.content, place)
                place.chmod(stat.S_IMODE(entry.mode))

    def _entry(self, module: Module, base: str, scratch: Path) -> cpio.Entry:
        stem = f"{base}/{module.name.replace('.', '/')}"
        if module.origin.suffix != ".py":
            folder = stem.rpartition("/")[0]
            return cpio.file(f"{folder}/{module.origin.name}", module.origin, executable=True)
        path = f"{stem}/__init__.pyc" if module.package else f"{stem}.pyc"
        compiled = scratch / path.replace("/", "-")
        py_compile.compile(
            str(module.origin),
            str(compiled),
            dfile=path,
            doraise=True,
            optimize=2,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        return cpio.file(path, compiled)


def build(
    entry: str = AGENT, *, python: Path | None = None, search: Sequence[str] | None = None
) -> Payload:
    """Find out what an entry needs, from the running Python by default.

    Args:
        entry: a module with `import_everything`.
        python: the interpreter to carry.
        search: where third-party packages and Calve are; `sys.path` by default.

    Raises:
        DamagedError: the interpreter's answer makes no sense.
        CalveError: the entry cannot be imported.
    """
    interpreter = python or Path(sys.executable)
    paths = json.dumps(list(sys.path if search is None else search))
    done = process.run([interpreter, "-I", "-S", "-c", _PROBE, paths, entry])
    try:
        answer = json.loads(done.stdout)
        rows = [(str(name), str(origin), bool(package)) for name, origin, package in answer["rows"]]
        version = str(answer["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError("the interpreter did not list its modules", place=interpreter) from error
    modules = tuple(
        Module(name, Path(origin), package)
        for name, origin, package in rows
        if origin != "namespace"
    )
    binary = interpreter.resolve()
    extensions = [module.origin for module in modules if module.origin.suffix != ".py"]
    # glibc opens libgcc_s by itself when a thread is cancelled or exits early.
    libraries = elf.closure([binary, *extensions])
    for libc in [library for library in libraries if library.name == "libc.so.6"]:
        unwinder = libc.parent / "libgcc_s.so.1"
        if unwinder.is_file() and unwinder not in libraries:
            libraries.append(unwinder)
    base = f"{PREFIX}/lib/python{version}"
    return Payload(version, binary, modules, tuple(_placed(libraries, extensions, base)))


def _placed(
    libraries: Sequence[Path], extensions: Sequence[Path], base: str
) -> Iterator[tuple[Path, str]]:
    """Pair each library with its path in the initrd.

    What a wheel brings beside its extension module is found by `$ORIGIN`: it keeps its place relative to that.
    """
    sites = {
        path.parent for path in extensions if path.parent.name in {"site-packages", "lib-dynload"}
    }
    for library in libraries:
        site = next((site for site in sites if library.is_relative_to(site)), None)
        place = str(library).lstrip("/") if site is None else f"{base}/{library.relative_to(site)}"
        yield library.resolve(), place
