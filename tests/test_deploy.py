"""The launches that deployment files and pages name: what each would really start, through SGLang's own parser, and
resolved as `sglang-macs doctor -- FLAGS` does, with a tiny model in place of theirs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from sglang_macs.cli import doctor
from sglang_macs.cpu_compat import environment
from sglang_macs.plan import profile

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "deploy" / "slurm" / "serve.sbatch"
KUBERNETES = ROOT / "deploy" / "kubernetes" / "leaderworkerset.yaml"
PAGES = {page.stem: page for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"))}
WHAT_THE_READER_HAS = "--model-path MODEL --tp 2 --dp 2 --enable-dp-attention --ep-size 2"  # in place of a page's `...`
NODES = 2
KEYS = {"API_KEY": "of clients", "ADMIN_API_KEY": "of admins"}
DEFAULT_CHUNK = {"cuda": 8192, "cpu": 4096}  # SGLang's on an H100 or H200, and without a GPU

# Programs that only say what they were asked for; `srun` runs its command once for each node.
STUBS = {
    "python3": 'printf "%s\\0" "$@" >> "$ARGV_FILE"; printf "\\n" >> "$ARGV_FILE"',
    "scontrol": 'printf "node-a\\nnode-b\\n"',
    "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i SLURMD_NODENAME=localhost "$@"; done',
}
STUBS |= dict.fromkeys(("python", "sglang-macs"), STUBS["python3"])


def started(tmp_path: Path, command: list[str], **variables: str) -> list[list[str]]:
    """argv of every `python3` that a script starts."""
    for name, body in STUBS.items():
        stub = tmp_path / name
        stub.write_text(f"#!/bin/bash\n{body}\n")
        stub.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ARGV_FILE": str(tmp_path / "argv"), **KEYS, **variables}
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
        given = {e["name"]: e["value"] if "value" in e else KEYS.get(e["name"], "10.0.0.1") for e in container["env"]}
        one = folder / template
        one.mkdir()
        kubernetes += started(one, ["bash", str(script)], **lws, **given)
    return {"slurm": slurm, "kubernetes": kubernetes}


LAUNCH = re.compile(r"(?:\w+=\S+ )*(?:FLAGS=|python3? -m sglang.launch_server|sglang-macs doctor -- )")


def launches_on(page: Path) -> str:
    """The lines of a page's indented blocks that set FLAGS, launch a server or have the doctor look at one."""
    lines = re.findall(r"^ {4}(\S(?:.*\\\n)*.*)$", page.read_text(), re.MULTILINE)
    wanted = [line for line in lines if LAUNCH.match(line)]
    missed = [line for line in lines if re.search(r"launch_server|doctor --|sglang serve", line) and line not in wanted]
    assert not missed, (page, missed)
    script = "\n".join(line.replace("--node-rank RANK", "--node-rank 1") for line in wanted)
    return script.replace(" ... ", f" {WHAT_THE_READER_HAS} ")


@pytest.fixture(scope="module")
def documented(tmp_path_factory) -> dict[str, list[list[str]]]:
    """The flags of each launch that a page names, by page, as a shell would pass them."""
    found = {}
    for name, page in PAGES.items():
        if script := launches_on(page):
            argv = started(tmp_path_factory.mktemp(name), ["bash", "-euc", script])
            found[name] = [words[2:] for words in argv]  # behind `-m sglang.launch_server`, or `doctor --`
    assert found.keys() == {"README", "quickstart", "multinode", "operations", "importance", "choosing", "compare"}
    assert len(found["quickstart"]) == 4
    return found


PARSE = """
import argparse, json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
from sglang_macs.engine import plugin
from sglang_macs.config import from_options
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
names = ("nnodes", "node_rank", "dist_init_addr", "tp_size", "dp_size", "ep_size", "moe_a2a_backend", "port", "device")
names += ("enable_dp_attention", "chunked_prefill_size", "mem_fraction_static", "enable_metrics")
names += ("api_key", "admin_api_key", "max_running_requests", "cuda_graph_max_bs_decode", "host")
for argv in json.load(sys.stdin):
    args = parser.parse_args(argv)
    config = from_options(vars(args))
    found = {name: getattr(args, name) for name in names} | {"gamma": config.gamma}
    resolved = plugin.try_launch([*argv, "--model-path", sys.argv[1], "--device", "cpu"])
    print("PARSED", json.dumps(found | {"resolved": resolved}))
"""


@pytest.fixture(scope="module")
def folder_of_the_reader(tmp_path_factory, vl_model) -> Path:
    """Where launches name files of theirs: the importance of docs/guide/importance.md, and a profile."""
    folder = tmp_path_factory.mktemp("reader")
    (own,) = re.findall(r"In `own.py`:\n\n((?: {4}.*\n|\n)+)", PAGES["importance"].read_text())
    (folder / "own.py").write_text(textwrap.dedent(own))
    config = json.loads((vl_model / "config.json").read_text())
    (architecture,), text = config["architectures"], config["text_config"]
    experts = text["num_local_experts"]
    shared = {layer: [0] * experts for layer in range(text["num_hidden_layers"])}
    profile.save(profile.Profile(architecture, experts, shared), str(folder / "profile.json"))
    return folder


@pytest.fixture(scope="module")
def parsed(argv, documented, vl_model, folder_of_the_reader) -> dict[str, list[dict]]:
    """The same after SGLang's parser, our plugin loaded; `resolved`: what the doctor's probe says of it."""
    launches = {name: [node[2:] for node in nodes] for name, nodes in argv.items()} | documented
    every = [flags for of_name in launches.values() for flags in of_name]
    env = {**os.environ, **environment(ranks=1), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PARSE, str(vl_model)]
    env["PYTHONPATH"] = os.pathsep.join([".", str(ROOT), env["PYTHONPATH"]])
    given = {"input": json.dumps(every), "env": env, "cwd": folder_of_the_reader}
    done = subprocess.run(command, **given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("PARSED ")]
    return {name: [lines.pop(0) for _ in of_name] for name, of_name in launches.items()}


def test_every_documented_launch_gives_its_ranks_chunks_that_pay(parsed):
    """SGLang divides --chunked-prefill-size by dp under dp-attention."""
    for name, launches in parsed.items():
        for flags in launches:
            device = flags["device"] or "cuda"
            groups = flags["dp_size"] if flags["enable_dp_attention"] else 1
            tokens = (flags["chunked_prefill_size"] or DEFAULT_CHUNK[device]) // groups
            assert tokens >= doctor.TOKENS_THAT_PAY["cpu" if device == "cpu" else "cuda"], (name, flags)
            if flags["chunked_prefill_size"]:
                assert flags["resolved"]["chunked_prefill_size"] == tokens, (name, flags)
            if (flags["chunked_prefill_size"] or 0) > 16384:  # SGLang would set aside 1.5 MB for each, undivided
                assert flags["mem_fraction_static"] == 0.7, (name, flags)


def test_every_page_and_file_launches_the_same_two_nodes(parsed):
    differing = {"node_rank", "dist_init_addr", "host"}
    nodes = [{k: v for k, v in flags.items() if k not in differing} for of in parsed.values() for flags in of]
    nodes = [flags for flags in nodes if flags["nnodes"] == NODES]
    assert len(nodes) == 6 and all(flags == nodes[0] for flags in nodes)
    assert nodes[0]["enable_metrics"]
    assert {"API_KEY": nodes[0]["api_key"], "ADMIN_API_KEY": nodes[0]["admin_api_key"]} == KEYS
    # DeepEP's buffers: 128 tokens of a rank, unless SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK says so.
    assert nodes[0]["max_running_requests"] == nodes[0]["cuda_graph_max_bs_decode"] * nodes[0]["dp_size"] == 128 * 16


def test_no_documented_server_is_open_to_every_network(parsed):
    """SGLang's own default is this machine alone; whoever names an address asks for keys."""
    for name, launches in parsed.items():
        for flags in launches:
            assert flags["host"] not in ("0.0.0.0", "::"), (name, flags)
            assert flags["host"] == "127.0.0.1" or (flags["api_key"] and flags["admin_api_key"]), (name, flags)


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
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/health", "port": 30000}
        assert "persistentVolumeClaim" in volumes["models"]
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    service, port = documents["Service"]["spec"], parsed["kubernetes"][0]["port"]
    assert service["selector"]["role"] == group["leaderTemplate"]["metadata"]["labels"]["role"]
    leader = group["leaderTemplate"]["spec"]["containers"][0]
    assert service["ports"][0]["targetPort"] == leader["readinessProbe"]["httpGet"]["port"] == port


OWN_KINDS = {"LeaderWorkerSet", "PodMonitor"}  # of operators; Kubernetes itself has no schema of them
KUBERNETES_VERSION = "1.37.0"


def pods_of(document: dict) -> list[dict]:
    """The pods that a document of an operator's makes, as Kubernetes gets them."""
    templates = document["spec"].get("leaderWorkerTemplate", {})
    return [
        {"apiVersion": "v1", "kind": "Pod", **templates[name]}
        for name in ("leaderTemplate", "workerTemplate")
        if name in templates
    ]


def test_every_document_passes_kubernetes_own_schemas():
    """kubernetes-validate brings the schemas along; kubeconform fetches them at every run."""
    validator = pytest.importorskip("kubernetes_validate")
    found = [one for path in KUBERNETES.parent.glob("*.yaml") for one in yaml.safe_load_all(path.read_text())]
    assert {document["kind"] for document in found} == {"ConfigMap", "Service", *OWN_KINDS}
    own = [document for document in found if document["kind"] not in OWN_KINDS]
    pods = [pod for document in found if document["kind"] in OWN_KINDS for pod in pods_of(document)]
    assert len(pods) == 2
    for document in own + pods:
        validator.validate(document, KUBERNETES_VERSION, strict=True)
    pods[0]["spec"]["containers"][0]["livenessProbes"] = {}
    with pytest.raises(validator.ValidationError, match="livenessProbes"):
        validator.validate(pods[0], KUBERNETES_VERSION, strict=True)


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
