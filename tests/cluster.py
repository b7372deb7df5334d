"""A Slurm of this machine's own: munge, slurmctld and two slurmd with pretended GPUs, and accounts if wanted.

From Debian's packages, as root, in one folder, on the loopback; nothing is written elsewhere and no service is touched.
"""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest

PACKAGES = ("munge", "slurm-wlm")
ACCOUNTS = ("slurmdbd", "mariadb-server-core", "mariadb-client-core")
HERE = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
"""Environment of a job whose nodes are all this machine, and whose names nobody resolves."""
CLUSTER, NODES = "nemotest", 2


def need(program: str, *packages: str) -> None:
    """Install Debian's packages if a program is missing; skip where that cannot be."""
    if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin"):
        return
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"{program} is not here, and only root can install {', '.join(packages)} by apt")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
    # Another test may be installing, too.
    with filelock.FileLock(Path(tempfile.gettempdir()) / "nemo-align-apt.lock"):
        subprocess.run(["apt-get", "update", "-qq"], check=True, **quiet)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        subprocess.run(install, check=True, **quiet)


def wait(for_: Callable[[], bool], what: str, seconds: float = 300) -> None:
    """Until something holds."""
    end = time.monotonic() + seconds
    while not for_():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def answers(*command: str, env: dict[str, str] | None = None) -> bool:
    done = subprocess.run(command, capture_output=True, env=env, stdin=subprocess.DEVNULL, timeout=200)
    return done.returncode == 0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def slurm(folder: Path, *, accounts: bool = False) -> Iterator[dict[str, str]]:
    """The cluster, while it is needed; gives the environment that finds it."""
    need("slurmctld", *PACKAGES)
    if accounts:
        need("slurmdbd", *ACCOUNTS)
    for name in ("state", "spool", "log", "run", "munge", "dev"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str, **more: str) -> None:
        log = (folder / f"log/{name}.out").open("ab")
        started.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env | more))

    try:
        _munge(folder, start)
        ports = free_ports(3 + NODES)
        lines = (
            _accounting(folder, ports, start, env) if accounts else ["AccountingStorageType=accounting_storage/none"]
        )
        _write(folder, ports, lines)
        if accounts:
            wait(lambda: answers("sacctmgr", "-i", "-n", "list", "cluster", env=env), "slurmdbd")
            answers("sacctmgr", "-i", "add", "cluster", CLUSTER, env=env)
        start("slurmctld", "slurmctld", "-D", "-c")
        wait(lambda: answers("scontrol", "ping", env=env), "slurmctld")
        for i in range(NODES):
            (folder / f"spool/n{i}").mkdir(exist_ok=True)
            start(f"slurmd-n{i}", "slurmd", "-D", "-N", f"n{i}")
        wait(lambda: _idle(env) == NODES, "both nodes")
        yield {name: env[name] for name in ("SLURM_CONF", "PATH")}
    finally:
        answers("scancel", "--state=PENDING", "--user=root", env=env)
        answers("scancel", "--user=root", env=env)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def sshd(folder: Path, environment: dict[str, str]) -> Iterator[tuple[int, Path]]:
    """A login node on the loopback: its port, and the key that it lets in."""
    need("sshd", "openssh-server", "openssh-client")
    need("rsync", "rsync")  # by which NeMo-Run sends a job
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    Path("/run/sshd").mkdir(exist_ok=True)  # where it shuts its unprivileged half in
    (port,) = free_ports(1)
    shown = " ".join(f'"{name}={value}"' for name, value in environment.items())
    (folder / "sshd_config").write_text(
        f"""ListenAddress 127.0.0.1:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
SetEnv {shown}
Subsystem sftp internal-sftp
"""
    )
    command = [shutil.which("sshd", path="/usr/sbin") or "sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        wait(lambda: b"listening" in (folder / "log").read_bytes(), "sshd")
        with _known(port, (folder / "host.pub").read_text()):
            yield port, folder / "user"
    finally:
        process.kill()


@contextlib.contextmanager
def _known(port: int, key: str) -> Iterator[None]:
    """Have ssh know the host, as after a first login; it looks into the home that the system has, not HOME."""
    import pwd

    known = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh/known_hosts"
    known.parent.mkdir(mode=0o700, exist_ok=True)
    before = known.read_text() if known.exists() else None
    known.write_text(f"{before or ''}[127.0.0.1]:{port} {key}")
    try:
        yield
    finally:
        if before is None:
            known.unlink()
        else:
            known.write_text(before)


def _idle(env: dict[str, str]) -> int:
    shown = subprocess.run(["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True, env=env)
    return len(set(shown.stdout.split()))


def _munge(folder: Path, start: Callable[..., None]) -> None:
    home = folder / "munge"
    home.chmod(0o700)
    (home / "key").write_bytes(os.urandom(1024))
    (home / "key").chmod(0o600)
    files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    places = [f"--{option}={home / name}" for option, name in files.items()]
    start("munged", "munged", "--foreground", "--force", "--num-threads=2", *places)
    wait((home / "sock").exists, "munged")


def _accounting(folder: Path, ports: list[int], start: Callable[..., None], env: dict[str, str]) -> list[str]:
    """MariaDB and slurmdbd; the lines of slurm.conf that lead to them."""
    sock = str(folder / "run/my.sock")
    data = folder / "db"
    data.mkdir()
    install = ["--no-defaults", "--user=root", f"--datadir={data}", "--auth-root-authentication-method=normal"]
    subprocess.run(["mariadb-install-db", *install, "--skip-test-db"], check=True, stdout=subprocess.DEVNULL)
    small = ["--skip-networking", "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M", "--skip-log-bin"]
    patient = ["--innodb-lock-wait-timeout=900", f"--socket={sock}", f"--pid-file={folder / 'run/mariadbd.pid'}"]
    start("mariadbd", "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", *small, *patient)
    ask = ("mariadb", "--no-defaults", "-uroot", "-S", sock, "-e")
    wait(lambda: answers(*ask, "create database if not exists slurm_acct_db"), "mariadbd")
    conf = folder / "slurmdbd.conf"
    conf.write_text(
        f"""AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports[1]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
"""
    )
    conf.chmod(0o600)
    lines = [
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=localhost",
        f"AccountingStoragePort={ports[1]}",
        # What sacctmgr takes the munge socket from.
        f"AccountingStoragePass={folder}/munge/sock",
        "AccountingStorageTRES=gres/gpu",
    ]
    _write(folder, ports, lines)
    # libmariadb finds a private socket by this variable.
    start("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=sock)
    return lines


def _write(folder: Path, ports: list[int], accounting: list[str]) -> None:
    host = socket.gethostname().split(".")[0]
    for i in range(2):
        device = folder / f"dev/nvidia{i}"
        if not device.exists():
            # slurmd wants devices; these lead to the null device.
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/nvidia[0-1]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loaded, and not used
    (folder / "plugstack.conf").touch()
    nodes = [
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3 + i]} CPUs=4 RealMemory=8000 Gres=gpu:2"
        for i in range(NODES)
    ]
    (folder / "slurm.conf").write_text(
        f"""ClusterName={CLUSTER}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is put back waits for its credential to expire.
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
PlugStackConfig={folder}/plugstack.conf
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,bf_interval=1,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
InactiveLimit=0
KillWait=30
MinJobAge=3600
JobRequeue=1
"""
        + "\n".join([*accounting, *nodes, "PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP"])
        + "\n"
    )
