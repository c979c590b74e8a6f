"""benchmarks/serving.py without SGLang: a stand-in server, whose processes must all be gone afterwards, no others."""

import os
import subprocess
import sys
import time

import pytest

from benchmarks import serving
from benchmarks.serving import Server, ServerError

# Serves HTTP after a moment, with a child that ignores SIGTERM, as a stuck scheduler would.
STAND_IN = """
import http.server, os, signal, subprocess, sys, time
if os.environ.get("DIE"):
    print("x" * 5000); print("the reason"); sys.exit(3)
stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ok = self.path in ("/health_generate", "/json")
        self.send_response(200 if ok else 418); self.send_header("content-type", "application/json"); self.end_headers()
        self.wfile.write(b'{"answer": 42}')
    def log_message(self, *a): pass
if os.environ.get("HANG"): time.sleep(600)
http.server.HTTPServer((sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])),
                       Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes servers that run `STAND_IN` in SGLang's place."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    (tmp_path / "config.json").write_text("{}")

    def make(**options) -> Server:
        return Server(tmp_path, [], log=tmp_path / "log.txt", **options)

    def command(self):
        return [sys.executable, str(script), "--host", serving.HOST, "--port", str(self.port)]

    monkeypatch.setattr(Server, "command", property(command))
    return make


def alive(pid: int) -> bool:
    """True if `pid` runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_whole_group_ends_and_nothing_else(stand_in):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with stand_in() as server:
            leader, child = server.process.pid, int(server.log_text().split()[1])
            assert server.get("/json") == {"answer": 42} and alive(leader) and alive(child)
            with pytest.raises(ServerError, match="GET /nothing: HTTP 418"):
                server.get("/nothing")
            server.stop(grace=1.0)
        assert not alive(leader) and not alive(child) and alive(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def test_a_paused_server_stands_still_until_it_is_resumed_or_stopped(stand_in):
    with stand_in() as server:
        server.pause()
        with pytest.raises(ServerError, match="Timeout"):
            server.get("/json", timeout=0.5)
        used = server.cpu_seconds()
        time.sleep(0.2)
        assert server.cpu_seconds() == used > 0
        server.resume()
        assert server.get("/json") == {"answer": 42}
        server.pause()
        leader = server.process.pid
    assert not alive(leader)


def test_two_servers_get_two_ports(stand_in):
    with stand_in() as one, stand_in() as two:
        assert abs(one.port - two.port) >= serving.PORTS_PER_SERVER
        held = [server._port_reservation for server in (one, two)]
    assert [reservation.fileno() for reservation in held] == [-1, -1]  # given back


RESERVE = """
import sys
from benchmarks import serving
port, held = serving.reserve_port()
print(port, flush=True)
sys.stdin.read()
"""


def test_a_reservation_holds_among_processes_of_any_user_and_leaves_no_file(tmp_path, monkeypatch):
    """Files in the shared temporary folder could belong to somebody else, or be links to the user's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    port, own = serving.reserve_port()
    command = [sys.executable, "-c", RESERVE]
    with own, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = int(other.stdout.readline())
        third, reservation = serving.reserve_port(theirs)
        reservation.close()
        other.communicate()
    assert len({port, theirs, third}) == 3
    assert not list(tmp_path.iterdir())


def test_a_death_is_reported_with_the_last_lines(stand_in):
    with pytest.raises(ServerError) as caught, stand_in(env={"DIE": "1"}):
        pass
    assert "server exited with 3" in str(caught.value) and "the reason" in str(caught.value)
    assert "x" * 401 not in str(caught.value)  # long lines are cut


def test_a_hang_is_reported_and_ended(stand_in, monkeypatch):
    server, family = stand_in(env={"HANG": "1"}, timeout=2.0), []

    def stop() -> None:
        family.extend(server.of_processes(lambda process: process.pid))
        Server.stop(server, grace=0.2)

    monkeypatch.setattr(server, "stop", stop)
    with pytest.raises(ServerError, match="not healthy after 2 s"), server:
        pass
    assert family and not any(map(alive, family))


def test_environment_is_merged_and_none_removes(monkeypatch):
    monkeypatch.setenv("MACS_TEST_REMOVED", "1")
    server = Server("nowhere", ["--device", "cpu", "--tp", "2"], env={"MACS_TEST_REMOVED": None, "MACS_TEST": "2"})
    assert "MACS_TEST_REMOVED" not in server.env and server.env["MACS_TEST"] == "2"
    assert server.env["SGLANG_USE_CPU_ENGINE"] == "1" and server.env["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
    assert "SGLANG_USE_CPU_ENGINE" not in set(Server("nowhere", ["--tp", "2"]).env) - set(os.environ)


def test_photographs_are_two_jpeg_data_uris():
    uris = serving.photographs()
    assert len(set(uris)) == 2 and all(uri.startswith("data:image/jpeg;base64,/9j/") for uri in uris)


def test_a_server_listens_only_on_ports_that_it_has_reserved(tmp_path):
    """SGLang's own choice was taken by another server when it came to listen on it, seven starting side by side."""

    def ports(*args: str) -> list[int]:
        server = Server(tmp_path, list(args))
        words = server.command
        return [int(words[words.index(flag) + 1]) for flag in ("--port", "--nccl-port") if flag in words]

    port, for_ranks = ports(*serving.EP2_ARGS)
    assert port < for_ranks < port + serving.PORTS_PER_SERVER
    assert len(ports()) == 2
    assert len(ports("--dp", "2")) == 1, "replicas of one server cannot share it"
