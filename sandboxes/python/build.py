"""Builds the image of a sandbox profile from this machine's Python, without a registry or a network.

::

    python -m agentrl.sandboxes.python.build [PROFILE]        # default: python

It puts into one tar archive the running interpreter and its standard library, the profile's packages, the shared
libraries that all of these ask for, and agentrl's own part, and has the Docker engine import it. In the image there is
no shell, no package manager and no file that its user could write to. To build on top of an image from a registry, see
the Dockerfile.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import marshal
import os
import re
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import MAGIC_NUMBER
from pathlib import Path

from agentrl.errors import AgentRLError, ConfigError, SandboxError
from agentrl.sandbox import image, profile
from agentrl.sandbox.launcher import locate

PREFIX = "usr/local"
LIBRARY = f"{PREFIX}/lib/python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = f"{LIBRARY}/site-packages"
ENTRYPOINT = [f"/{PREFIX}/bin/python3", *image.ARGUMENTS]
_LEFT_OUT = {
    *("site-packages", "dist-packages", "__pycache__", "test", "tests", "ensurepip", "venv", "idlelib", "lib2to3"),
    *("tkinter", "_tkinter", "turtle", "turtledemo", "pydoc_data"),
}
_SECONDS = 300
_FOLDERS = ("proc", "sys", "dev", "work", "mnt", "run", "etc")


class Archive:
    """A tar archive of an image's files; all of them belong to root, and everybody may read them."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._tar = tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT)  # noqa: SIM115 -- see close
        self.binaries: dict[str, Path] = {}

    def folder(self, name: str, mode: int = 0o755) -> None:
        """An empty folder."""
        self._put(name, b"", mode, kind=tarfile.DIRTYPE)

    def text(self, name: str, content: bytes, mtime: int = 0) -> None:
        """A file, and beside it what Python compiles from it: the file system is read-only later."""
        self._put(name, content, 0o644, mtime)
        if name.endswith(".py"):
            try:
                code = compile(content, f"/{name}", "exec", dont_inherit=True)
            except (SyntaxError, ValueError):  # examples of how not to, in some packages
                return
            folder, _, base = name.rpartition("/")
            cached = f"{folder}/__pycache__/{base[:-3]}.{sys.implementation.cache_tag}.pyc"
            stamp = struct.pack("<III", 0, mtime, len(content) & 0xFFFF_FFFF)
            self._put(cached, MAGIC_NUMBER + stamp + marshal.dumps(code), 0o644)

    def copy(self, source: Path, name: str) -> None:
        """One file of this machine, or a folder with all that is below it."""
        for file, target in _walk(source, name):
            content = file.read_bytes()
            if content[:4] == b"\x7fELF":
                self.binaries[target] = file
                self._put(target, content, 0o755)
            else:
                self.text(target, content, int(file.stat().st_mtime))

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()

    def _put(self, name: str, content: bytes, mode: int, mtime: int = 0, kind: bytes = tarfile.REGTYPE) -> None:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode, entry.mtime, entry.type = len(content), mode, mtime, kind
        self._tar.addfile(entry, io.BytesIO(content))


def write(stream: io.BufferedIOBase, packages: Iterable[str]) -> None:
    """Write the archive of an image for ``packages`` to ``stream``.

    Raises:
        ConfigError: a package is not installed, or a shared library is missing.
    """
    archive = Archive(stream)
    for name in _FOLDERS:
        archive.folder(name)
    archive.folder("tmp", 0o1777)  # the tmpfs that is mounted there takes over its mode
    archive.copy(Path(os.path.realpath(sys.executable)), f"{PREFIX}/bin/python3")
    for folder in sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}):
        archive.copy(Path(folder), LIBRARY)
    for path in map(Path, locate(list(packages))):
        archive.copy(path, f"{PACKAGES}/{path.name}")
    for name, content in image.library().items():
        archive.text(f"{PACKAGES}/{name}", content)
    inside = {os.path.realpath(file) for file in archive.binaries.values()}
    for target, source in sorted(shared_libraries(archive.binaries.values()).items()):
        if os.path.realpath(source) not in inside:
            archive.copy(Path(source), target.lstrip("/"))
    archive.close()


def shared_libraries(binaries: Iterable[Path]) -> dict[str, str]:
    """What the dynamic linker loads for ``binaries``: file in the image -> file here.

    In the image all of them are where the C library is, which is where every linker looks; only the linker itself has
    an absolute path.
    """
    listing = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    if missing := sorted(set(re.findall(r"^\s*(\S+) => not found", listing, re.MULTILINE))):
        raise ConfigError(f"shared libraries that a package needs are not installed: {', '.join(missing)}.")
    named = dict(re.findall(r"^\s*(\S+) => (/\S+)", listing, re.MULTILINE))
    linkers = set(re.findall(r"^\s*(/\S+) \(0x", listing, re.MULTILINE))
    c_library = next((path for name, path in named.items() if name.startswith(("libc.so", "libc.musl"))), None)
    if c_library is None:
        raise ConfigError(f"ldd does not say which C library {sys.executable} uses:\n{listing[:500]}")
    home = os.path.dirname(c_library)
    return {f"{home}/{name}": path for name, path in named.items() if "/" not in name} | {
        path: path for path in linkers
    }


def build(name: str, tag: str | None = None) -> str:
    """Build the image of the profile ``name`` on the engine that DOCKER_HOST names.

    Returns:
        Its tag.

    Raises:
        ConfigError: the profile has no image, or something that it needs is not installed here.
        SandboxError: the engine failed.
    """
    docker = importlib.import_module("docker")
    chosen = profile.load(name)
    tag = tag or chosen.image
    if tag is None:
        raise ConfigError(f"profile {name!r} names no image: add one to its profile.toml, or give --tag.")
    changes = [
        f"LABEL {image.LABEL}={image.fingerprint(chosen.packages)}",
        f"ENTRYPOINT {json.dumps(ENTRYPOINT)}",
        "USER 65534:65534",
    ]
    repository, version = docker.utils.parse_repository_tag(tag)
    with tempfile.TemporaryFile() as file, contextlib.closing(docker.from_env(timeout=_SECONDS)) as client:
        write(file, chosen.packages)
        file.seek(0)
        said = client.api.import_image(file, repository, version or "latest", changes=changes)
    if '"error"' in said:
        raise SandboxError(f"the engine could not import the image: {said[-2000:]}")
    return tag


def write_context(folder: Path, name: str) -> None:
    """Write what `docker build` needs for the profile ``name`` into a new ``folder``: see the Dockerfile."""
    chosen = profile.load(name)
    folder.mkdir(parents=True)
    for file, content in image.library().items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    text = Path(__file__).with_name("Dockerfile").read_text()
    text = text.replace("ARG PACKAGES=numpy", f"ARG PACKAGES={json.dumps(' '.join(chosen.packages))}")
    text = text.replace("ARG CONTENT\n", f"ARG CONTENT={image.fingerprint(chosen.packages)}\n")
    (folder / "Dockerfile").write_text(text)


def _walk(source: Path, name: str) -> Iterator[tuple[Path, str]]:
    if not source.is_dir():
        yield source, name
        return
    for entry in sorted(source.iterdir()):
        left_out = entry.name.partition(".")[0] in _LEFT_OUT or entry.name.startswith(("config-", "_test"))
        if not left_out and not entry.is_symlink():
            yield from _walk(entry, f"{name}/{entry.name}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", default=profile.DEFAULT, help=f"one of {', '.join(profile.names())}")
    parser.add_argument("--tag", help="name of the image; default: the one in the profile")
    parser.add_argument("--context", type=Path, metavar="FOLDER", help="write a folder for `docker build` instead")
    arguments = parser.parse_args()
    try:
        if arguments.context:
            write_context(arguments.context, arguments.profile)
            print(f"wrote {arguments.context}; go on with: docker build -t NAME {arguments.context}")
        else:
            print(f"built {build(arguments.profile, arguments.tag)}")
    except ImportError:
        sys.exit("building an image needs the docker package: pip install 'agentrl[docker]'")
    except (AgentRLError, OSError) as error:
        sys.exit(str(error))
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "docker":
            raise
        sys.exit(f"the Docker engine did not build the image: {error}")


if __name__ == "__main__":
    main()
