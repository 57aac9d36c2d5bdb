"""Several hosts: network namespaces of this machine, each with an address of its own, whose link can be cut."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import launch
import pytest
from conftest import SETTINGS, environment

pytestmark = pytest.mark.faults

# A host that does not answer for so long is lost; the default of 30 s would make these tests slow.
LOST_S = 4
# Against hangs only: other work on the machine makes everything slower.
GUARD_S = 300


def obstacle() -> str | None:
    """Why network namespaces cannot be made here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [name for name in ("ip", "taskset") if shutil.which(name) is None]:
        return f"network namespaces need {' and '.join(missing)} (Debian packages iproute2, util-linux)"
    name = f"fastrex-{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"this system makes no network namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """A network namespace with one address, on a cable to the other one."""

    def __init__(self, number: int, name: str) -> None:
        self.name, self.device, self.address = f"{name}-{number}", f"cable{number}", f"10.203.7.{number + 1}"
        cores = sorted(os.sched_getaffinity(0))
        self.core = cores[number % len(cores)]
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, words: Sequence[str], log: Path, before: str = "", **more: str) -> subprocess.Popen[bytes]:
        """Run python with ``words`` on this host and on one core; ``before``: shell commands in a mount namespace of
        its own."""
        env = {**environment(), "GLOO_SOCKET_IFNAME": self.device, "FASTREX_LOST_S": str(LOST_S), **more}
        command = ["taskset", "-c", str(self.core), sys.executable, *words]
        if before:
            command = ["sh", "-ec", f'{before}; exec "$@"', "sh", *command]
        with log.open("ab") as file:
            process = subprocess.Popen(
                # Leaves the other processes' mounts alone: it works in a mount namespace of its own.
                ["ip", "netns", "exec", self.name, *command],
                env=env,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def link(self, state: str) -> None:
        ip("-n", self.name, "link", "set", self.device, state)

    def power_off(self) -> None:
        """Everything on the host is gone at once, and nobody is told: no process says goodbye, no socket is closed."""
        self.link("down")
        self.kill()

    def kill(self) -> None:
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in map(int, listed.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.wait()


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts on a cable. Nothing of them touches this machine's own network, nothing stays."""
    if reason := obstacle():
        pytest.skip(reason)
    name = f"fastrex-{os.getpid()}-{secrets.token_hex(2)}"
    two = [Host(number, name) for number in range(2)]
    try:
        for host in two:
            ip("netns", "add", host.name)
        one, other = two
        ends = [one.device, "netns", one.name, "type", "veth", "peer", "name", other.device, "netns", other.name]
        ip("link", "add", *ends)
        for host in two:
            ip("-n", host.name, "addr", "add", f"{host.address}/30", "dev", host.device)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.link("up")
        yield two
    finally:
        for host in two:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


class Cluster:
    """A job over both hosts."""

    def __init__(self, hosts: list[Host], folder: Path, data: Path) -> None:
        self.hosts, self.folder, self.data = hosts, folder, data
        self.out, self.hashes = folder / "run", folder / "hashes"
        self.logs = [folder / f"host{number}.log" for number in range(2)]

    def words(self, faults: Sequence[str] = (), *more: str) -> list[str]:
        train = ["train", "demo", *SETTINGS, "--data", self.data, "--out", self.out, "--device", "cpu", *more]
        return launch.faulty(train, faults, hashes=self.hashes)

    def torchrun(self, number: int, words: Sequence[str], restarts: int = 0, conf: str = "") -> None:
        """One agent of torchrun, on its host."""
        first, host = self.hosts[0], self.hosts[number]
        options = [
            "--nnodes=2",
            "--nproc-per-node=1",
            f"--max-restarts={restarts}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={first.address}:29400",
            "--rdzv-id=job",
            # Both hosts have this machine's name: say who has the store.
            f"--rdzv-conf=is_host={int(number == 0)}{conf}",
            f"--local-addr={host.address}",
        ]
        share = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        host.start(["-m", "torch.distributed.run", *options, *words], self.logs[number], **share)

    def rank(self, number: int, words: Sequence[str], before: str = "") -> None:
        """One rank without a launcher, as srun starts it."""
        own = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        meeting = {"MASTER_ADDR": self.hosts[0].address, "MASTER_PORT": "29500"}
        self.hosts[number].start(words, self.logs[number], before, **own, **meeting)

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def until(self, happened: Callable[[], object], timeout: float = GUARD_S) -> float:
        """Seconds until ``happened`` is true; a generous guard against hangs."""
        start = time.monotonic()
        while not happened():
            assert time.monotonic() - start < timeout, f"nothing happened for {timeout} s:\n{self.output()}"
            time.sleep(0.05)
        return time.monotonic() - start

    def wait(self, *numbers: int, timeout: float = GUARD_S) -> list[int]:
        """Exit codes of the latest process on these hosts (default: both)."""
        latest = [self.hosts[n].processes[-1] for n in (numbers or (0, 1))]
        self.until(lambda: all(p.poll() is not None for p in latest), timeout)
        return [p.wait() for p in latest]

    def lost(self, rank: int, *, on: int, step: int) -> bool:
        """Whether host ``on`` has said that this rank's host does not answer any more."""
        text = self.logs[on].read_text(errors="replace")
        return bool(re.search(rf"rank {rank} has not answered for \d+ s, its host .* step {step}\b", text))

    def final(self) -> set[str]:
        return {path.read_text() for path in self.hashes.iterdir()}


@pytest.fixture
def cluster(hosts: list[Host], tmp_path: Path, stripes: Path) -> Cluster:
    return Cluster(hosts, tmp_path, stripes)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, stripes: Path) -> str:
    """The state after the same run on two ranks of one host, without accidents."""
    folder = tmp_path_factory.mktemp("quiet")
    train = ["train", "demo", *SETTINGS, "--data", stripes, "--out", folder / "run", "--device", "cpu"]
    with launch.ranks(folder / "log", 2, launch.faulty(train, hashes=folder / "hashes")) as job:
        assert job.wait(GUARD_S) == [0, 0], job.output
    one, other = ((folder / "hashes" / f"rank{rank}.txt").read_text() for rank in range(2))
    assert one == other
    return one


def test_two_hosts_train_like_one(cluster: Cluster, quiet: str, report: Callable[..., None]) -> None:
    for number in range(2):
        cluster.torchrun(number, cluster.words())
    assert cluster.wait() == [0, 0], cluster.output()
    assert cluster.final() == {quiet}
    report("cluster", "two hosts, torchrun with c10d rendezvous", injected=0, survived=0, bits_equal=True)


def cut(host: Host, step: int, once: Path) -> str:
    """Right before this step the host's cable is pulled."""
    return f"shell:rank=0,step={step},once={once},command=ip -n {host.name} link set {host.device} down"


def test_a_host_is_cut_off_and_returns(cluster: Cluster, quiet: str, report: Callable[..., None]) -> None:
    """Neither side waits for ever, both name whom they have lost; when the cable is back, torchrun continues."""
    pulled = cluster.folder / "pulled"
    for number in range(2):
        cluster.torchrun(number, cluster.words([cut(cluster.hosts[1], 9, pulled)], "--resume", "auto"), restarts=2)
    cluster.until(pulled.exists)
    seconds = cluster.until(lambda: all(cluster.lost(1 - n, on=n, step=9) for n in range(2)))
    cluster.hosts[1].link("up")
    assert cluster.wait() == [0, 0], cluster.output()
    assert "resumed from step-00000008" in cluster.output()
    assert cluster.final() == {quiet}
    status = json.loads((cluster.out / "status.json").read_text())
    assert status["state"] == "completed"
    text = f"a host is cut off at step 9 and returns (lost after {LOST_S} s without an answer)"
    report("cluster", text, injected=1, survived=1, bits_equal=True, seconds=round(seconds, 1))


def test_a_host_is_switched_off_and_replaced(cluster: Cluster, quiet: str, report: Callable[..., None]) -> None:
    """The other host's torchrun waits for a new one in its place; the command is the same, so is the end."""
    pulled, one, other = cluster.folder / "pulled", *cluster.hosts
    words = cluster.words([cut(other, 9, pulled)], "--resume", "auto")
    for number in range(2):
        cluster.torchrun(number, words, restarts=2)
    cluster.until(pulled.exists)
    other.power_off()
    seconds = cluster.until(lambda: cluster.lost(1, on=0, step=9))
    assert one.processes[-1].poll() is None, cluster.output()
    other.link("up")
    cluster.torchrun(1, words, restarts=2)
    assert cluster.wait() == [0, 0], cluster.output()
    assert "resumed from step-00000008" in cluster.output()
    assert cluster.final() == {quiet}
    text = "a host is switched off at step 9, another takes its place"
    report("cluster", text, injected=1, survived=1, bits_equal=True, seconds=round(seconds, 1))


def test_the_first_host_is_switched_off(cluster: Cluster, quiet: str, report: Callable[..., None]) -> None:
    """With it go rank 0 and torchrun's store: the other side ends by itself, and the job started anew continues."""
    pulled, first, other = cluster.folder / "pulled", *cluster.hosts
    words = cluster.words([cut(first, 9, pulled)], "--resume", "auto")
    # How long TCP waits for an answer is a setting of each network namespace; by default about 15 minutes.
    ip("netns", "exec", other.name, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
    for number in range(2):
        cluster.torchrun(number, words, restarts=2)
    cluster.until(pulled.exists)
    first.power_off()
    seconds = cluster.until(lambda: cluster.lost(0, on=1, step=9))
    assert cluster.wait(1) == [1], cluster.output()
    first.link("up")
    for number in range(2):
        cluster.torchrun(number, words, restarts=2)
    assert cluster.wait() == [0, 0], cluster.output()
    assert cluster.final() == {quiet}
    text = "the host of rank 0 is switched off at step 9, the job is started again"
    report("cluster", text, injected=1, survived=1, bits_equal=True, seconds=round(seconds, 1))


def test_only_rank_0_needs_the_run_directory(cluster: Cluster, quiet: str, report: Callable[..., None]) -> None:
    """Ranks without a launcher, hosts that share no disk but the images'; the cable is out for a moment."""
    cluster.out = cluster.folder / "disk" / "run"
    cluster.out.parent.mkdir()
    private = f"mount -t tmpfs none '{cluster.out.parent}'"
    for number in range(2):
        cluster.rank(number, cluster.words([], "--max-steps", "8"), before=private if number else "")
    assert cluster.wait() == [0, 0], cluster.output()
    short, other = cluster.folder / "short", cluster.hosts[1]
    for number in range(2):
        words = cluster.words([f"shell:rank=0,step=12,once={short},command=true"], "--resume", "auto")
        cluster.rank(number, words, before=private if number else "")
    cluster.until(short.exists)
    other.link("down")
    time.sleep(LOST_S / 4)
    other.link("up")
    assert cluster.wait() == [0, 0], cluster.output()
    assert "resumed from step-00000008" in cluster.output()
    assert cluster.final() == {quiet}
    report("cluster", "ranks by hand, run directory on one host only, resumed", injected=1, survived=1, bits_equal=True)
    report("cluster", f"the link is down for {LOST_S / 4:g} s: no restart", injected=1, survived=1, bits_equal=True)


def test_a_host_with_other_images_is_refused(stripes: Path, tmp_path: Path, report: Callable[..., None]) -> None:
    shutil.copytree(stripes, tmp_path / "copy")
    next((tmp_path / "copy" / "train").rglob("*.jpg")).unlink()
    out = tmp_path / "run"
    words = ["train", "demo", *SETTINGS, "--data", stripes, "--out", out, "--device", "cpu"]
    with launch.ranks(tmp_path / "log", 2, launch.faulty(words, [f"images:rank=1,path={tmp_path / 'copy'}"])) as job:
        assert job.wait(120) == [1, 1]
        assert job.output.count("all ranks must see the same images, but those of rank 1 differ from rank 0's") == 2
    assert not out.exists()
    report("cluster", "a host's copy of the images lacks a file", injected=1, survived=1)
