"""Two hosts on one machine, network namespaces joined by a veth pair, and one SGLang server over both.

    python -m benchmarks.multinode [--rate 100mbit] [--model wide] [--out FILE.json]

As root: bytes on the wire, seconds and bounds, without and with clipping. What the kernel counts on the cable is split
into rows of the all-to-all, the plans' exchange, and the rest: both parts follow exactly from the servers' counters.

The server is launched as users launch a cluster: one command a host, the same but for --node-rank. Each host has a
/dev/shm of its own. Needs CAP_NET_ADMIN and CAP_SYS_ADMIN, `ip`, and `tc` for a rate. docs/guide/multinode.md has
results.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import requests

from benchmarks.bench_plan import commit
from benchmarks.check_cost import MODELS
from benchmarks.check_serving import crops
from benchmarks.serving import EP2_ARGS, Server, ServerError, prompt
from sglang_macs import cpu_compat, tiny_models

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "multinode"
CLONE_NEWNET = 0x40000000
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT, INIT_PORT = 20100, 20050
EP2 = [*EP2_ARGS, "--moe-a2a-backend", "macs", "--macs-verify", "true"]
# A collective that waits longer than this ends the server: the peer is gone. The default of torch is 30 minutes.
DIST_TIMEOUT_S = 20
# How long TCP sends again before it gives a connection up: 15 tries are 15 minutes, 6 are 25 s (tcp(7)). SGLang's
# schedulers exchange small messages even when idle, so a lost peer is noticed by them first.
SYSCTLS = {"tcp_retries2": 6, "tcp_keepalive_time": 10, "tcp_keepalive_intvl": 5, "tcp_keepalive_probes": 3}


# ---- The network ---------------------------------------------------------------------------------------------------


def why_not() -> str:
    """What this machine lacks for network namespaces, or ""."""
    probe = f"macs-probe-{os.getpid()}"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "del", probe)
    except FileNotFoundError:
        return "no `ip` command (Debian: iproute2)"
    except ServerError as error:
        return f"{error} (needs root with CAP_NET_ADMIN and CAP_SYS_ADMIN)"
    return ""


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServerError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Network:
    """Two namespaces with one cable between them, interfaces m0 and m1. rate: as `tc` takes it, e.g. "100mbit"."""

    def __init__(self, rate: str | None = None) -> None:
        self.rate = rate
        self.names = [f"macs-{os.getpid()}-{host}" for host in range(2)]

    def __enter__(self) -> "Network":
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
            ends = ("m0", "netns", self.names[0], "type", "veth", "peer", "m1", "netns", self.names[1])
            _run("ip", "link", "add", *ends)
            for host, name in enumerate(self.names):
                ip = ("ip", "-n", name)
                _run(*ip, "addr", "add", f"{ADDRESSES[host]}/24", "dev", f"m{host}")
                _run(*ip, "link", "set", "lo", "up")
                _run(*ip, "link", "set", f"m{host}", "up")
                with self.inside(host):
                    for key, value in SYSCTLS.items():
                        Path(f"/proc/sys/net/ipv4/{key}").write_text(str(value))
                if self.rate:
                    shape = ("root", "tbf", "rate", self.rate, "burst", "64kb", "latency", "100ms")
                    _run("tc", "-n", name, "qdisc", "add", "dev", f"m{host}", *shape)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in self.names:  # its interface goes with it
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @contextlib.contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """This thread, and the processes it starts, on one of the hosts."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{self.names[host]}") as there:
            if libc.setns(there.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.names[host]}")
            try:
                yield
            finally:
                libc.setns(home.fileno(), CLONE_NEWNET)

    def sent_bytes(self) -> int:
        """What both hosts have put on the cable so far, headers included."""
        total = 0
        for host in range(2):
            with self.inside(host):
                counters = Path("/proc/thread-self/net/dev").read_text()
            total += int(re.search(rf"m{host}:\s*(.*)", counters).group(1).split()[8])
        return total

    def cut(self) -> None:
        """Pulls the cable: packets are lost in both directions, connections are not closed."""
        _run("ip", "-n", self.names[1], "link", "set", "m1", "down")


# ---- The server ----------------------------------------------------------------------------------------------------


class Cluster:
    """One server over both hosts of a network; leaving the `with` block ends its processes.

    args: those of `sglang.launch_server`, the same on both hosts. logs: folder of node-0.log and node-1.log.
    """

    def __init__(self, network: Network, model: Path, args: list[str], logs: Path, timeout: float = 300.0) -> None:
        self.network, self.model, self.args, self.logs, self.timeout = network, Path(model), args, logs, timeout
        self.nodes: list[subprocess.Popen] = []
        self.url = f"http://{ADDRESSES[0]}:{PORT}"

    def command(self, host: int) -> list[str]:
        """What is typed on one host."""
        nodes = ["--nnodes", "2", "--node-rank", str(host), "--dist-init-addr", f"{ADDRESSES[0]}:{INIT_PORT}"]
        where = ["--host", ADDRESSES[host], "--port", str(PORT), "--dist-timeout", str(DIST_TIMEOUT_S)]
        serve = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(self.model)]
        return [*serve, *self.args, *nodes, *where]

    def environment(self, host: int) -> dict[str, str]:
        own = {"GLOO_SOCKET_IFNAME": f"m{host}", "SGLANG_HOST_IP": ADDRESSES[host], "HOST_IP": ADDRESSES[host]}
        return {**os.environ, **cpu_compat.environment(2), "HF_HUB_OFFLINE": "1", **own}

    def log_text(self, host: int) -> str:
        return (self.logs / f"node-{host}.log").read_text(errors="replace")

    def __enter__(self) -> "Cluster":
        self.logs.mkdir(parents=True, exist_ok=True)
        # A /dev/shm of its own: SGLang takes ranks that share one for neighbours and waits on a loopback socket.
        mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        try:
            for host in range(2):
                with self.network.inside(host), (self.logs / f"node-{host}.log").open("w") as log:
                    start = {"stdout": log, "stderr": log, "stdin": subprocess.DEVNULL, "start_new_session": True}
                    command, env = [*mount, *self.command(host)], self.environment(host)
                    self.nodes.append(subprocess.Popen(command, env=env, **start))
            self._wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for node in self.nodes:  # each the leader of its own group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        self.nodes = []

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            for host, node in enumerate(self.nodes):
                if node.poll() is not None:
                    raise ServerError(f"node {host} exited with {node.returncode}:\n{self.log_text(host)[-3000:]}")
            with contextlib.suppress(requests.RequestException), self.network.inside(0):
                if requests.get(f"{self.url}/health_generate", timeout=20).ok:
                    return
            time.sleep(0.5)
        raise ServerError(f"not healthy after {self.timeout:.0f} s:\n{self.log_text(0)[-3000:]}")

    def generate(self, text: str, images: list[str] | None = None, max_new_tokens: int = 8) -> list[int]:
        """Greedy token ids, asked on host 0."""
        body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens}}
        if images:
            body["image_data"] = images
        with self.network.inside(0):
            answer = requests.post(f"{self.url}/generate", json=body, timeout=120)
        answer.raise_for_status()
        return answer.json()["output_ids"]

    def states(self) -> list[dict]:
        """MACS's counters, of the ranks that report to host 0."""
        with self.network.inside(0):
            info = requests.get(f"{self.url}/server_info", timeout=60).json()
        return [state["macs"] for state in info["internal_states"]]

    def wait_until_ended(self, seconds: float) -> list[float | None]:
        """Seconds after which each node's launcher had exited, or None."""
        start, ended = time.monotonic(), [None, None]
        while None in ended and time.monotonic() - start < seconds:
            for host, node in enumerate(self.nodes):
                if ended[host] is None and node.poll() is not None:
                    ended[host] = time.monotonic() - start
            time.sleep(0.2)
        return ended


# ---- Comparison ----------------------------------------------------------------------------------------------------


def questions(count: int) -> list[tuple[str, list[str]]]:
    """(text, images) of image chats whose prefixes all differ."""
    return [(prompt(f"{i}: what is this?", images=1), [uri]) for i, uri in enumerate(crops(count))]


def over_two_hosts(model: Path, name: str, count: int, rate: str | None) -> dict:
    """One server over both hosts: tokens, seconds of each request, bytes on the cable and what they are, counters."""
    with Network(rate) as network, Cluster(network, model, [*EP2, *CASES[name]], OUT / name) as cluster:
        cluster.generate(*questions(1)[0])
        states, sent = cluster.states(), network.sent_bytes()
        tokens, seconds = [], []
        for question in questions(count):
            start = time.perf_counter()
            tokens.append(cluster.generate(*question))
            seconds.append(time.perf_counter() - start)
        sent, after = network.sent_bytes() - sent, cluster.states()
    named = payload(model, states, after)
    named["other_bytes"] = sent - sum(named.values())
    return {"name": name, "tokens": tokens, "seconds": seconds, "bytes": sent, **named, "states": after}


def payload(model: Path, before: list[dict], after: list[dict]) -> dict[str, int]:
    """Bytes that MoE layers put on the cable between two readings of both ranks' counters, headers not included.

    A row is H bf16 values and travels twice, to its expert and back. An all-reduce between two ranks is one histogram
    (docs/design/method.md, section 3) in each direction.
    """
    text = json.loads((model / "config.json").read_text())["text_config"]
    rows = sum(state["remote_rows"] for state in after) - sum(state["remote_rows"] for state in before)
    plans = sum(state["planned"] for state in after) - sum(state["planned"] for state in before)
    experts = text["num_local_experts"]  # so transformers calls them when it saves a configuration
    histogram = 4 * (experts * 2 * after[0]["config"]["buckets"] + 4)
    return {"row_bytes": rows * 2 * 2 * text["hidden_size"], "exchange_bytes": plans * histogram}


def on_one_host(model: Path, args: list[str], count: int) -> list[list[int]]:
    """The same server and questions with both ranks on this host: its tokens."""
    with Server(model, [*EP2, *args], log=OUT / "one-host.log") as server:
        server.generate(*questions(1)[0])
        return [server.generate(*question).ids for question in questions(count)]


RANK = ["--macs-preset", "rank", "--macs-gamma", "1.0", "--macs-act", "always"]  # each plan's bytes are wanted
CASES = {
    "off": ["--macs-preset", "off"],
    "inf": ["--macs-preset", "rank", "--macs-gamma", "inf"],
    "rank 1.0": RANK,
    "rank 1.0, no re-routing": [*RANK, "--macs-reroute", "none"],
    "cai 1.0": ["--macs-preset", "cai", "--macs-gamma", "1.0"],
}


def summary(row: dict) -> str:
    """One line of the terminal."""
    megabytes = {key: row[f"{key}bytes"] / 1e6 for key in ("", "row_", "exchange_", "other_")}
    parts = "{:7.1f} MB on the cable: rows {:.1f}, exchange {:.2f}, rest {:.1f}".format(*megabytes.values())
    line = f"{row['name']:<24} {parts}; {statistics.median(row['seconds']):.2f} s a request"
    line += f"; bounds checked {row['checks']}, violated {row['violations']}"
    return line + (f"; tokens equal to one host's: {row['equal_to_one_host']}" if "equal_to_one_host" in row else "")


def measured(options: argparse.Namespace, model: Path, name: str) -> dict:
    """One row of the result file."""
    row = over_two_hosts(model, name, options.requests, options.rate)
    states = row.pop("states")
    for key in ("checks", "violations"):
        row[key] = sum(sum(state[key].values()) for state in states)
    row["own"] = {key: sum(state["own"][key] for state in states) for key in states[0]["own"]}
    if options.compare:
        row["equal_to_one_host"] = row["tokens"] == on_one_host(model, CASES[name], options.requests)
    return row


def save(options: argparse.Namespace, rows: list[dict]) -> None:
    head = {"gpu": "none", "cpu": f"{os.uname().machine}, {os.cpu_count()} threads", "commit": commit()}
    head |= {"command": f"python -m benchmarks.multinode --model {options.model} --rate {options.rate}"}
    head |= {"date": datetime.now(UTC).date().isoformat(), "requests": options.requests}
    options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", help="of the cable, each direction, e.g. 100mbit; default: not limited")
    parser.add_argument("--model", choices=list(MODELS), default="tiny", help="wide: layers of a real model's width")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--compare", action="store_true", help="tokens with those of one host, too: twice the servers")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    if missing := why_not():
        print(f"multinode: {missing}", file=sys.stderr)
        return 2
    model = ROOT / "build" / "models" / f"{options.model}-qwen3-vl-moe"
    tiny_models.ensure(model, "qwen3_vl_moe", **MODELS[options.model])
    rows = []
    for name in options.cases:
        rows.append(measured(options, model, name))
        print(summary(rows[-1]), flush=True)
    if options.out:
        save(options, rows)
    return 0 if all(row.get("equal_to_one_host", True) and not row["violations"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
