"""The launch files for clusters: what each node would really start, through SGLang's own parser."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sglang_macs.cpu_compat import environment

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "deploy" / "slurm" / "serve.sbatch"
KUBERNETES = ROOT / "deploy" / "kubernetes" / "leaderworkerset.yaml"
NODES = 2

# Programs that only say what they were asked for; `srun` runs its command once for each node.
STUBS = {
    "python3": 'printf "%s\\0" "$@" >> "$ARGV_FILE"; printf "\\n" >> "$ARGV_FILE"',
    "scontrol": 'printf "node-a\\nnode-b\\n"',
    "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done',
}


def started(tmp_path: Path, command: list[str], **variables: str) -> list[list[str]]:
    """argv of every `python3` that a script starts."""
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ARGV_FILE": str(tmp_path / "argv"), **variables}
    subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return [line.split("\0")[:-1] for line in (tmp_path / "argv").read_text().splitlines()]


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    found = list(yaml.safe_load_all(KUBERNETES.read_text()))
    return {document["kind"]: document for document in found}


@pytest.fixture(scope="module")
def argv(tmp_path_factory, documents) -> dict[str, list[list[str]]]:
    """What each node starts, by launch file."""
    folder = tmp_path_factory.mktemp("deploy")
    slurm = started(folder, ["bash", str(SLURM)], SLURM_JOB_NUM_NODES=str(NODES), SLURM_JOB_NODELIST="node-[a-b]")
    script = folder / "launch.sh"
    script.write_text(documents["ConfigMap"]["data"]["launch.sh"])
    pods = documents["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    kubernetes = []
    for index, template in enumerate(("leaderTemplate", "workerTemplate")):
        container = pods[template]["spec"]["containers"][0]
        assert container["command"] == ["bash", "/launch/launch.sh"]
        lws = {"LWS_LEADER_ADDRESS": "leader", "LWS_GROUP_SIZE": str(pods["size"]), "LWS_WORKER_INDEX": str(index)}
        given = {entry["name"]: entry["value"] for entry in container["env"]}
        one = folder / template
        one.mkdir()
        kubernetes += started(one, ["bash", str(script)], **lws, **given)
    return {"slurm": slurm, "kubernetes": kubernetes}


PARSE = """
import argparse, json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
from sglang_macs import plugin
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
for argv in json.load(sys.stdin):
    args = parser.parse_args(argv)
    config = plugin.from_args(args)
    names = ("nnodes", "node_rank", "dist_init_addr", "tp_size", "dp_size", "ep_size", "moe_a2a_backend", "port")
    print("PARSED", json.dumps({name: getattr(args, name) for name in names} | {"gamma": config.gamma}))
"""


@pytest.fixture(scope="module")
def parsed(argv) -> dict[str, list[dict]]:
    """The same after SGLang's parser, our plugin loaded."""
    every = [node[2:] for nodes in argv.values() for node in nodes]
    env = {**os.environ, **environment(ranks=1)}
    command = [sys.executable, "-c", PARSE]
    done = subprocess.run(command, input=json.dumps(every), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    return {name: [lines.pop(0) for _ in nodes] for name, nodes in argv.items()}


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_every_node_starts_the_same_server_but_for_its_rank(argv, parsed, name):
    assert [node[:2] for node in argv[name]] == [["-m", "sglang.launch_server"]] * NODES
    assert [node["node_rank"] for node in parsed[name]] == [0, 1]
    first, second = ({k: v for k, v in node.items() if k != "node_rank"} for node in parsed[name])
    assert first == second
    assert (first["nnodes"], first["moe_a2a_backend"], first["gamma"]) == (NODES, "macs", 1.1)
    assert first["tp_size"] == first["dp_size"] == first["ep_size"] == NODES * 8
    assert first["dist_init_addr"] in ("node-a:20000", "leader:20000")


def test_kubernetes_documents_fit_together(documents, parsed):
    spec = documents["LeaderWorkerSet"]["spec"]
    assert documents["LeaderWorkerSet"]["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    group = spec["leaderWorkerTemplate"]
    assert group["size"] == NODES and group["restartPolicy"] == "RecreateGroupOnPodRestart"
    launch = documents["ConfigMap"]["metadata"]["name"]
    for template in ("leaderTemplate", "workerTemplate"):
        pod = group[template]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert volumes["launch"]["configMap"]["name"] == launch
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    service, port = documents["Service"]["spec"], parsed["kubernetes"][0]["port"]
    assert service["selector"]["role"] == group["leaderTemplate"]["metadata"]["labels"]["role"]
    leader = group["leaderTemplate"]["spec"]["containers"][0]
    assert service["ports"][0]["targetPort"] == leader["readinessProbe"]["httpGet"]["port"] == port


def test_slurm_asks_for_what_the_launch_needs():
    options = dict(
        line[8:].lstrip("-").split("=")
        for line in SLURM.read_text().splitlines()
        if "#SBATCH --" in line and "=" in line
    )
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "1", "8")
    subprocess.run(["bash", "-n", str(SLURM)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SLURM)], check=True)


def test_a_node_that_fails_ends_the_job():
    assert "--kill-on-bad-exit=1" in SLURM.read_text()
