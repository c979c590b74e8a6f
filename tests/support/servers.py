"""What tests of real servers share: how they are launched, what they are asked, and what their counters must say."""

from pathlib import Path

from serving import Server, data_uri, photograph_files

from .reference import NEW_TOKENS, Question

BUILD = Path(__file__).resolve().parents[2] / "build"
LAYERS, TOP_K = 3, 4  # of the tiny models
MACS = ["--moe-a2a-backend", "macs", "--macs-verify", "true"]
INFINITE = [*MACS, "--macs-gamma", "inf", "--macs-min-tokens", "0"]


def serve(model, *arguments: str, log: str, kind: type[Server] = Server) -> Server:
    return kind(model, list(arguments), log=BUILD / f"test-{log}.log")


def states(server: Server) -> list[dict]:
    """Each data-parallel rank's counters."""
    return [state["macs"] for state in server.get("/server_info")["internal_states"]]


def ask(server: Server, question: Question) -> list[int]:
    """Greedy ids, from a full prefill."""
    server.flush_cache()
    image = data_uri(photograph_files()[question.image]) if question.image else None
    return server.generate(question.prompt, image, max_new_tokens=NEW_TOKENS).ids


def generate(server: Server, text: str, image: str | None = None, **fields) -> dict:
    """SGLang's whole answer to `/generate`: one token, unless `fields` say otherwise."""
    body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 1}, **fields}
    if image:
        body["image_data"] = data_uri(photograph_files()[image])
    return server.post("/generate", body)


def own(server: Server, kind: str) -> int:
    """One counter of the ranks' own assignments, over all ranks, and over both modalities unless `kind` names one."""
    return sum(count for state in states(server) for name, count in state["own"].items() if name.startswith(kind))


def assert_bounds_held(server: Server) -> None:
    for state in states(server):
        assert state["planned"] > 0 and state["misaligned"] == 0
        assert state["checks"]["bound"] == state["planned"]
        assert sum(state["violations"].values()) == 0, state["violations"]
