"""Starts a real SGLang server on this machine, talks to it, and ends it. Used by the tests and the demo.

    with Server(model, EP2_ARGS, log="build/server.log") as server:
        print(server.generate("hello").ids)
        print(server.chat([{"role": "user", "content": "hello"}]))

The server is its own process group on 127.0.0.1; leaving the `with` block ends that group and nothing else.
"""

import base64
import contextlib
import importlib.resources
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import requests

from sglang_macs import cpu_compat

HOST = "127.0.0.1"
# Below 32768, where Linux begins to hand out ports for outgoing connections: one of those may be any port that SGLang
# takes for itself later. Away from SGLang's default 30000.
BASE_PORT, LAST_PORT = 20100, 29000
PORTS_PER_SERVER = 500  # with dp-attention SGLang takes further ports, up to about 240 above the one it serves on
RESERVATION = PORTS_PER_SERVER - 2  # above a server's port; the last one of its range is for NCCL
CPU_ARGS = [
    "--device", "cpu",
    # Without a bound, SGLang sizes the KV cache to the machine's memory: 12 GB, and 23 s to allocate.
    "--max-total-tokens", "8192",
    "--max-running-requests", "8",
    "--skip-server-warmup",  # `Server` waits for /health_generate, a forward pass through every rank, anyway
]  # fmt: skip
# Two ranks, experts split between them, attention data-parallel: the setting MACS is for, and the one in which
# Qwen3-VL-MoE works with an all-to-all (SGLang's deepstack rows do not fit when attention is tensor-parallel).
EP2_ARGS = ["--tp", "2", "--dp", "2", "--enable-dp-attention", "--ep-size", "2", *CPU_ARGS]
IMAGE_SLOT = "<|vision_start|><|image_pad|><|vision_end|>"  # how Qwen-VL prompts mark an image


class ServerError(RuntimeError):
    """A server did not start, died, or refused a request. The message ends with the log's last lines."""


@dataclass(frozen=True)
class Generation:
    """Answer of `Server.generate`: `ids` are the generated token ids, `meta` is SGLang's `meta_info`."""

    ids: list[int]
    text: str
    meta: dict[str, Any]


def reserve_port(start: int = BASE_PORT) -> tuple[int, socket.socket]:
    """A port from `start` on, in steps of `PORTS_PER_SERVER`, that nobody listens on, and what reserves it.

    SGLang listens only when its model is loaded: without a reservation two servers started together would get one port,
    and each would take the other's health for its own. It is a socket bound to a port that SGLang leaves alone: unlike
    a file in a shared folder, it holds among users and nobody can stand in its way by a name. It goes when it is closed
    or the process ends.
    """
    for port in range(start, LAST_PORT, PORTS_PER_SERVER):
        reservation = socket.socket()
        try:
            reservation.bind((HOST, port + RESERVATION))
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
                probe.bind((HOST, port))
        except OSError:
            reservation.close()
            continue
        return port, reservation
    raise ServerError(f"no free port on {HOST}: tried {start} to {LAST_PORT}; end servers that are no longer needed")


def prompt(text: str, images: int = 0, slot: str = IMAGE_SLOT) -> str:
    """A single user turn in the tiny models' chat format, for `/generate` (which applies no template).

    slot: what stands for an image.
    """
    return f"<|im_start|>user\n{slot * images}{text}<|im_end|>\n<|im_start|>assistant\n"


def data_uri(content: bytes, mime: str = "image/jpeg") -> str:
    """Image bytes as a data URI, as both of SGLang's HTTP interfaces take them."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def photograph_files() -> dict[str, bytes]:
    """scikit-learn's two sample photographs (427 x 640 pixels): `{"china": jpeg bytes, "flower": jpeg bytes}`."""
    folder = importlib.resources.files("sklearn.datasets.images")
    return {name: (folder / f"{name}.jpg").read_bytes() for name in ("china", "flower")}


def photographs() -> list[str]:
    """`photograph_files()` as data URIs."""
    return [data_uri(content) for content in photograph_files().values()]


class Server:
    """Context manager around one `python -m sglang.launch_server`; see the module's docstring.

    `env` holds variables to add (None removes one). With `--device cpu`, those of `sglang_macs.cpu_compat` are added
    before them.
    """

    def __init__(
        self,
        model: Path | str,
        args: list[str],
        *,
        env: dict[str, str | None] | None = None,
        log: Path | str = "build/server.log",
        timeout: float = 240.0,
        python: str = sys.executable,
    ):
        self.model, self.args, self.timeout, self.python = Path(model), list(args), timeout, python
        self.env = _merged(
            {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}, _cpu_environment(args), env or {}
        )
        self.log, self.port = Path(log), BASE_PORT  # the real port is taken on entry
        self._port_reservation: socket.socket | None = None
        self.process: subprocess.Popen | None = None
        self.start_seconds = float("nan")  # launch to healthy

    @property
    def url(self) -> str:
        """Root of the HTTP interface."""
        return f"http://{HOST}:{self.port}"

    @property
    def command(self) -> list[str]:
        """The command line of the server."""
        where = ["--host", HOST, "--port", str(self.port)]
        if "--dp" not in self.args or "--enable-dp-attention" in self.args:  # else each replica needs one
            # SGLang would take any port that is free now, and listen on it half a minute later.
            where += ["--nccl-port", str(self.port + PORTS_PER_SERVER - 1)]
        return [self.python, "-m", "sglang.launch_server", "--model-path", str(self.model), *where, *self.args]

    def __enter__(self) -> "Server":
        if not (self.model / "config.json").exists():
            raise ServerError(f"no checkpoint at {self.model}: build one with `python -m sglang_macs.tiny_models`")
        self.port, self._port_reservation = reserve_port()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            # A session of its own, so that the whole family of processes can be ended by its group id.
            self.process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _wait_until_healthy(self) -> None:
        """Return when `/health_generate` answers, which takes a real forward pass through every rank."""
        started, progress = time.monotonic(), _Progress(self.model.name)
        while True:
            elapsed = time.monotonic() - started
            if self.process.poll() is not None:
                progress.end("died")
                raise ServerError(self._report(f"server exited with {self.process.returncode} after {elapsed:.0f} s"))
            if elapsed > self.timeout:
                progress.end("timed out")
                raise ServerError(self._report(f"server not healthy after {self.timeout:.0f} s; raise `timeout`?"))
            try:
                if requests.get(f"{self.url}/health_generate", timeout=20).ok:
                    break
            except requests.RequestException:
                pass
            progress.show(elapsed, self.log)
            time.sleep(0.25)
        self.start_seconds = time.monotonic() - started
        progress.end(f"healthy after {self.start_seconds:.1f} s")

    def stop(self, grace: float = 1.0) -> None:
        """End the server by SIGTERM to its launcher, and by SIGKILL what is left of its group after `grace` seconds.

        Only the launcher: it takes a scheduler that dies before it for a crash, and sleeps 5 s over its diagnosis.
        The grace is short: all requests are answered, and draining takes SGLang another 4 to 10 s.
        """
        if self.process is None:
            return
        group = self.process.pid  # start_new_session made the leader's pid the group's id
        self.resume()
        self.process.send_signal(signal.SIGTERM)
        if not _group_ends(group, self.process, grace):
            _signal_group(group, signal.SIGKILL)
            _group_ends(group, self.process, 5.0)
        self.process.wait()
        self.process = None
        self._port_reservation.close()

    def pause(self) -> None:
        """Stop all its processes where they are, so that measuring another server has the cores to itself."""
        _signal_group(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Undo `pause`."""
        _signal_group(self.process.pid, signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Processor time of all its processes that run, so far."""
        return sum(times.user + times.system for times in self.of_processes(psutil.Process.cpu_times))

    def of_processes(self, look: Callable[[psutil.Process], Any]) -> list[Any]:
        """What `look` finds of each of its processes."""
        return _of_members(self.process.pid, look)

    def get(self, path: str, **kwargs) -> Any:
        """GET `path`; returns the decoded JSON, or the text where the answer is none (e.g. `/metrics`)."""
        answer = self._request("GET", path, **kwargs)
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def post(self, path: str, body: dict, **kwargs) -> Any:
        """POST `body` as JSON to `path`; returns the decoded answer."""
        return self._request("POST", path, json=body, **kwargs).json()

    def chat(self, messages: list[dict], *, max_tokens: int = 8, **fields) -> dict:
        """OpenAI chat completion, greedy unless `fields` say otherwise; returns the whole answer."""
        body = {"model": self.model.name, "messages": messages, "temperature": 0, "max_tokens": max_tokens, **fields}
        return self.post("/v1/chat/completions", body)

    def generate(self, text: str, images: list[str] | str | None = None, *, max_new_tokens: int = 8, **sampling):
        """Native `/generate`, greedy unless `sampling` says otherwise; `images` are data URIs or paths.

        `text` is taken as it is: `prompt(text, images=n)` adds the chat format and the image slots.
        """
        body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": max_new_tokens, **sampling}}
        if images:
            body["image_data"] = images
        answer = self.post("/generate", body)
        return Generation(list(answer["output_ids"]), answer["text"], answer["meta_info"])

    def flush_cache(self) -> None:
        """Forget all cached prefixes, so that the next request is a full prefill.

        An answer arrives a moment before its request has ended on the ranks, so the server waits until they are idle.
        """
        self._request("POST", "/flush_cache", params={"timeout": 60})

    def _request(self, method: str, path: str, *, timeout: float = 120.0, **kwargs) -> requests.Response:
        try:
            answer = requests.request(method, f"{self.url}{path}", timeout=timeout, **kwargs)
        except requests.RequestException as error:
            raise ServerError(self._report(f"{method} {path}: {type(error).__name__}: {error}")) from error
        if not answer.ok:
            raise ServerError(self._report(f"{method} {path}: HTTP {answer.status_code}: {answer.text[:500]}"))
        return answer

    def log_text(self) -> str:
        """Everything the server has printed so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _report(self, what: str, lines: int = 30) -> str:
        tail = "\n".join(line[:400] for line in self.log_text().splitlines()[-lines:])  # SGLang prints 20 kB lines
        return f"{what}\ncommand: {' '.join(self.command)}\nlast lines of {self.log}:\n{tail}"


class _Progress:
    """One line on stderr: rewritten on a terminal, repeated every 10 s elsewhere (CI logs)."""

    def __init__(self, name: str):
        self.name, self.tty, self.last = name, sys.stderr.isatty(), 0.0

    def show(self, elapsed: float, log: Path) -> None:
        if self.tty:
            latest = (log.read_text(errors="replace").splitlines() or [""])[-1][:70]
            print(f"\r\033[K{self.name}: starting {elapsed:4.0f} s  {latest}", end="", file=sys.stderr)
        elif elapsed - self.last >= 10:
            self.last = elapsed
            print(f"{self.name}: starting, {elapsed:.0f} s", file=sys.stderr)
        sys.stderr.flush()

    def end(self, what: str) -> None:
        print(f"{chr(13) + chr(27) + '[K' if self.tty else ''}{self.name}: {what}", file=sys.stderr, flush=True)


def _cpu_environment(args: list[str]) -> dict[str, str]:
    """What SGLang needs on CPU, if `args` ask for it, for as many ranks as they ask for."""
    given = dict(itertools.pairwise(args))
    if given.get("--device") != "cpu":
        return {}
    ranks = int(given.get("--tp", given.get("--tensor-parallel-size", given.get("--tp-size", "1"))))
    return cpu_compat.environment(ranks)


def _merged(*extras: dict[str, str | None]) -> dict[str, str]:
    """This process's environment with `extras` on top, in order; None removes a variable."""
    merged = {**os.environ}
    for extra in extras:
        merged |= extra
    return {name: value for name, value in merged.items() if value is not None}


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _group_ends(group: int, leader: subprocess.Popen, seconds: float) -> bool:
    """Wait up to `seconds` until no process of `group` runs (the leader is reaped on the way); True if so."""
    deadline = time.monotonic() + seconds
    while _group_runs(group):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
        leader.poll()
    return True


def _group_runs(group: int) -> bool:
    """True if a process of `group` runs. Zombies do not count: in a container, nobody may ever reap orphans."""
    return any(status != psutil.STATUS_ZOMBIE for status in _of_members(group, psutil.Process.status))


def _of_members(group: int, look: Callable[[psutil.Process], Any]) -> list[Any]:
    """What `look` finds of each process of `group`; one that ends meanwhile is none."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group:
                found.append(look(process))
    return found


def states(server: Server) -> list[dict]:
    """MACS's counters of a server, those of each data-parallel rank."""
    return [state["macs"] for state in server.get("/server_info")["internal_states"]]
