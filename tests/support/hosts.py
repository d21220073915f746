"""Several hosts on one Linux machine for tests, each with its own address, processes and /tmp/ray.

A host is a network namespace on a bridge, with a process namespace of its own. Needs root, `ip`, `unshare` and
`nsenter`; the machine's own network is not touched.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NET = "10.79.0"
_MOST = 10  # hosts
TOOLS = ("ip", "unshare", "nsenter", "mount")


def why_not() -> str | None:
    """Return why this machine cannot run hosts, or None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else "namespaces are not permitted here"


@dataclass(frozen=True)
class Host:
    """One host: its address and its first process."""

    address: str
    pid: int

    def words(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` on this host, in the current folder."""
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(Path.cwd()), *command]
        return ["nsenter", "-t", str(self.pid), "-m", "-p", "-n", "-u", "--", *inside]


class Hosts(list[Host]):
    """Hosts that can be added, killed, cut off from the others, and reconnected."""

    def __init__(self, env: Mapping[str, str], folder: Path):
        super().__init__()
        self._env, self._folder = dict(env), folder
        self._processes: list[subprocess.Popen] = []

    def start(self, command: Sequence[str]) -> Host:
        """Start one more host, which runs `command` as long as it lives."""
        i = len(self)
        name, address = f"rvh{i}", f"{NET}.{10 + i}"
        _ip(f"netns add {name}", f"-n {name} link set lo up")
        _ip(f"link add v{i} netns rvhsw type veth peer name eth0 netns {name}")
        _ip(f"-n rvhsw link set v{i} master br0 up", f"-n {name} addr add {address}/24 dev eth0")
        _ip(f"-n {name} link set eth0 up")
        self._processes.append(_start(name, command, self._env, self._folder / f"{name}.log"))
        self.append(Host(address, _only_child(self._processes[-1].pid)))
        return self[-1]

    def kill(self, number: int) -> None:
        """Kill all processes of a host at once, as in a power failure."""
        os.kill(self[number].pid, signal.SIGKILL)
        self._processes[number].wait()

    def cut(self, number: int) -> None:
        """Disconnect a host from the network."""
        _ip(f"-n rvhsw link set v{number} down")

    def heal(self, number: int) -> None:
        """Reconnect a host to the network."""
        _ip(f"-n rvhsw link set v{number} up")

    def end(self) -> None:
        """Kill all hosts."""
        for process in self._processes:
            process.kill()
            process.wait()


@contextmanager
def start_hosts(commands: Sequence[Sequence[str]], env: Mapping[str, str], folder: Path) -> Iterator[Hosts]:
    """Start hosts that run one command each until the context ends; their output is in `folder`."""
    _remove()
    _ip("netns add rvhsw", "-n rvhsw link set lo up", "-n rvhsw link add br0 type bridge", "-n rvhsw link set br0 up")
    hosts = Hosts(env, folder)
    try:
        for command in commands:
            hosts.start(command)
        yield hosts
    finally:
        hosts.end()
        _remove()


def _start(name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen:
    own = f"mount --make-rprivate / && hostname {name} && mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && exec "
    words = ["ip", "netns", "exec", name, "unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child"]
    words += ["--mount-proc", "sh", "-c", own + '"$@"', "host", *command]
    with open(log, "wb") as file:
        return subprocess.Popen(words, env=dict(env), stdout=file, stderr=file, stdin=subprocess.DEVNULL)


def _only_child(pid: int) -> int:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        children = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
        if children:
            return int(children[0])
        time.sleep(0.1)
    raise RuntimeError("a host did not start")


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)


def _remove() -> None:
    for name in ["rvhsw", *(f"rvh{i}" for i in range(_MOST))]:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
