"""A Docker of this machine's own, and an image that is made without a registry."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import answers, need, wait
from submitting import submitting_from


@contextlib.contextmanager
def docker(folder: Path) -> Iterator[str]:
    """The daemon, while it is needed; gives what DOCKER_HOST is to be."""
    need("dockerd", "docker.io", "containerd", "runc", "iptables")
    if not shutil.which("docker"):
        need("docker", "docker-cli")
    folder.mkdir(parents=True)
    host = f"unix://{folder}/sock"
    (folder / "daemon.json").write_text("{}")
    quiet = ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--bridge=none", "--log-level=warn"]
    places = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid", f"--host={host}"]
    command = ["dockerd", f"--config-file={folder}/daemon.json", "--exec-opt=native.cgroupdriver=cgroupfs"]
    env = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin", "DOCKER_HOST": host}
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen([*command, *places, *quiet], stdout=log, stderr=log, env=env)
        try:
            wait(lambda: daemon.poll() is not None or answers("docker", "info", env=env), "dockerd")
            if daemon.poll() is not None:
                pytest.skip(f"this machine refuses dockerd: {(folder / 'log').read_text()[-300:]}")
            yield host
        finally:
            left = subprocess.run(["docker", "ps", "-aq"], env=env, capture_output=True, text=True).stdout.split()
            if left:
                answers("docker", "rm", "-f", *left, env=env)
            daemon.terminate()
            daemon.wait(timeout=30)
            for mount in reversed([line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]):
                if mount.startswith(f"{folder}/"):
                    answers("umount", mount)


@contextlib.contextmanager
def submitting_to(folder: Path) -> Iterator[str]:
    """A daemon whose containers are asked for from a folder; gives its address."""
    with docker(folder / "daemon") as host, submitting_from(folder, {"DOCKER_HOST": host}):
        yield host


def mounted(folder: Path) -> list[str]:
    """Volumes of this machine's programs, its Python and this package, to read, and of a folder."""
    root = str(Path(__file__).parent.parent)
    places = ["/usr", "/etc/hosts", os.path.realpath(sys.base_prefix), sys.prefix, root]
    return [*(f"{path}:{path}:ro" for path in dict.fromkeys(places)), f"{folder}:{folder}"]


PROGRAMS = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
"""Environment of a container with these volumes."""


def image(host: str, name: str = "ours:1") -> str:
    """An image of a skeleton alone, whose programs are this machine's, mounted; its id."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for folder in ("usr", "etc", "tmp", "root", "proc", "sys", "dev", "run", "var/tmp", "opt"):
            made = tarfile.TarInfo(folder)
            made.type, made.mode = tarfile.DIRTYPE, 0o1777 if folder.endswith("tmp") else 0o755
            tar.addfile(made)
        for link in ("bin", "sbin", "lib", "lib64"):
            made = tarfile.TarInfo(link)
            made.type, made.linkname = tarfile.SYMTYPE, f"usr/{link}"
            tar.addfile(made)
        for file, text in (("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n"), ("etc/group", "root:x:0:\n")):
            made = tarfile.TarInfo(file)
            made.size = len(text)
            tar.addfile(made, io.BytesIO(text.encode()))
    env = os.environ | {"DOCKER_HOST": host}
    done = subprocess.run(["docker", "import", "-", name], input=content.getvalue(), env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()
