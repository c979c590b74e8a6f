"""Control: SGLang itself on CPU, without MACS, answers token for token what transformers answers.

If one of these fails, no test of MACS on a server means anything. `stock` runs with nothing but the import shims of
`cpu_compat/site`. SGLang's own expert parallelism dies on CPU without the hooks of `cpu_compat.gaps` (that it still
does is checked too: the day it does not, they can go), so `hooked` adds these, by a plugin of their own, still without
MACS.
"""

from pathlib import Path

import pytest

from benchmarks.questions import QUESTIONS, TEXT_QUESTIONS, Question
from benchmarks.serving import CPU_ARGS, Server, ServerError, data_uri, photograph_files
from sglang_macs.cpu_compat import SITE_DIR

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

NO_PLUGIN = {"SGLANG_PLUGINS": "none"}  # a list of the plugins to load; there is none of this name
TP2 = ["--tp", "2", *CPU_ARGS]
EP2 = ["--tp", "2", "--ep-size", "2", *CPU_ARGS]
PLUGIN = """
import pkgutil

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang_macs import cpu_compat


def define_missing(target, value):
    owner, name = target.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    if not hasattr(owner, name):
        setattr(owner, name, value)


def register():
    import multiprocessing

    if multiprocessing.parent_process() is not None:  # the launcher must not import the model stack
        cpu_compat.register(lambda target, fn, kind: HookRegistry.register(target, fn, HookType(kind)), define_missing)
"""


@pytest.fixture
def gaps_plugin(tmp_path) -> dict[str, str]:
    """Environment of a server that loads one plugin: `cpu_compat`'s hooks, nothing of MACS."""
    info = tmp_path / "gaps_only-0.dist-info"
    info.mkdir()
    (tmp_path / "gaps_only.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gaps-only\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\ngaps_only = gaps_only:register\n")
    return {"SGLANG_PLUGINS": "gaps_only", "PYTHONPATH": f"{SITE_DIR}:{tmp_path}"}


def ask(server: Server, question: Question, tokens: int) -> list[int]:
    """The served model's greedy tokens."""
    images = [data_uri(photograph_files()[question.image])] if question.image else None
    return server.generate(question.prompt, images, max_new_tokens=tokens).ids


def compare(server: Server, reference, questions=QUESTIONS) -> None:
    """Every question, twice (the second time from the prefix cache), against transformers."""
    for question in (*questions, *questions):
        expected = reference.answer(question)
        got = ask(server, question, len(expected.ids))
        assert got == expected.ids, f"{question}: margins {expected.margins}"


def test_reference_is_decisive(vl_reference, text_reference):
    """The questions are worth asking: answers differ, and no token hinges on rounding (one bf16 step here is 1/16)."""
    answers = [vl_reference.answer(question) for question in QUESTIONS]
    texts = [text_reference.answer(question) for question in TEXT_QUESTIONS]
    assert min(min(answer.margins) for answer in (*answers, *texts)) > 0.35
    assert len({tuple(answer.ids) for answer in answers}) >= 6 and len({tuple(t.ids) for t in texts}) == len(texts)
    photographs = [a.prompt_tokens for a, q in zip(answers, QUESTIONS, strict=True) if q.image]
    assert all(64 <= tokens <= 256 for tokens in photographs)


@pytest.mark.nightly
def test_stock_tensor_parallel_equals_transformers(vl_model, vl_reference, server_log):
    with Server(vl_model, TP2, env=NO_PLUGIN, log=server_log) as server:
        compare(server, vl_reference)
    assert "sglang_macs" not in server.log_text().replace(str(SITE_DIR), "")


@pytest.mark.nightly
def test_stock_expert_parallel_still_needs_the_hooks(vl_model, server_log):
    server = Server(vl_model, EP2, env=NO_PLUGIN, log=server_log)
    with pytest.raises(ServerError, match="index -1 is out of bounds"), server:
        pass


# Not with dp-attention: without an all-to-all, SGLang then reduce-scatters through NCCL, which a CPU has not.
@pytest.mark.nightly
def test_hooked_expert_parallel_equals_transformers(vl_model, vl_reference, gaps_plugin, server_log):
    with Server(vl_model, EP2, env=gaps_plugin, log=server_log) as server:
        compare(server, vl_reference)


@pytest.mark.nightly
def test_hooked_text_model_equals_transformers(text_model, text_reference, gaps_plugin, server_log):
    with Server(text_model, EP2, env=gaps_plugin, log=server_log) as server:
        compare(server, text_reference, TEXT_QUESTIONS)


def test_a_dead_server_says_why(tmp_path, vl_model, server_log):
    dead = Server(vl_model, [*TP2, "--no-such-flag"], env=NO_PLUGIN, log=server_log)
    with pytest.raises(ServerError, match=r"exited with 2 after") as caught, dead:
        pass
    assert "unrecognized arguments: --no-such-flag" in str(caught.value)
    with pytest.raises(ServerError, match="no checkpoint at"), Server(Path(tmp_path), TP2, log=server_log):
        pass
