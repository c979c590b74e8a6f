"""`sglang-macs compare` against a server without a model: what it asks, resumes, puts back, and finds."""

import io
import json
import math
import os
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from lab import lab_chats, lab_questions
from lab.lmms_eval import utils
from sglang_macs import cli
from sglang_macs.compare import divergence, requests, run, statistics
from sglang_macs.compare.divergence import Token
from sglang_macs.errors import MacsError
from tests.support.chat_server import ChatServer, questions, serving

KEY, ADMIN_KEY = "a-key-of-clients", "a-key-of-admins"


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(questions(96))
    return path


def compare(asked, *arguments: str, concurrency: int = 4) -> int:
    out = asked.parent / "page.html"
    given = ["--requests", str(asked), "--concurrency", str(concurrency), "-o", str(out)]
    return cli.main(["compare", *arguments, *given, "--json", str(asked.parent / "figures.json")])


def figures(asked) -> dict:
    return json.loads((asked.parent / "figures.json").read_text())


# ---- What it finds -------------------------------------------------------------------------------------------------


def test_a_planted_loss_is_found_and_the_server_gets_its_options_back(asked, capsys):
    with serving(ChatServer()) as server:
        assert compare(asked, server.url, "--gamma", "0.5") == 1
        assert server.in_force == ("rank", 1.1)
    found = figures(asked)
    assert found["status"] == 1 and found["requests"] == 96
    assert found["clipped"]["clipped"] == 40 * 96 and found["clipped"]["assignments"] == 100 * 96
    beyond = {group["group"]: group["beyond"]["divergence"]["mean"] for group in found["groups"]}
    assert beyond["all"] > 0.01 and beyond["text"] > 0.01 and beyond["pictures"] > 0.01
    assert sum(name.startswith("prompts of") for name in beyond) == 3
    assert capsys.readouterr().out.splitlines()[-1].startswith("loss found beyond the noise floor: divergence")


def test_off_against_off_has_none(asked):
    with serving(ChatServer(preset="off")) as server:
        assert compare(asked, server.url, server.url) == 0
        assert not server.changes
    found = figures(asked)["groups"][0]
    assert found["floor"]["divergence"]["mean"] > 0  # it is noisy
    assert abs(found["beyond"]["divergence"]["mean"]) < found["floor"]["divergence"]["mean"]


def test_two_servers_that_differ(asked):
    with serving(ChatServer(preset="off")) as base, serving(ChatServer(gamma=0.5)) as other:
        assert compare(asked, base.url, other.url) == 1
        assert not base.changes and not other.changes
        assert len(base.bodies) == 2 * len(other.bodies) - 8  # warmed up once each, with a block of 8


def test_where_nothing_is_clipped_nothing_is_said(asked, capsys):
    with serving(ChatServer(clips=False)) as server:
        assert compare(asked, server.url) == 2
    assert "nothing was clipped under this load" in capsys.readouterr().out


def test_few_requests_cannot_tell_and_it_says_how_many_would(asked, capsys):
    asked.write_text(questions(8))
    with serving(ChatServer()) as server:
        assert compare(asked, server.url, "--gamma", "0.5") == 2
    assert figures(asked)["needed"] >= 40
    assert "requests would tell, 8 were asked" in capsys.readouterr().out


@pytest.mark.parametrize("match", ["equal", "contains"])
def test_right_answers_that_are_lost_are_a_loss(asked, match):
    with serving(ChatServer(preset="off")) as server:
        lines = []
        for line in questions(96).splitlines():
            chat = json.loads(line)
            answer = server.chat({**chat, "top_logprobs": 4})["choices"][0]["message"]["content"]
            lines.append(json.dumps({**chat, "reference": [answer.upper() if match == "equal" else answer.split()[1]]}))
        asked.write_text("\n".join(lines))
    with serving(ChatServer(loss=6.0)) as server:
        assert compare(asked, server.url, "--gamma", "0.3", "--match", match, "--most-divergence", "100") == 1
    found = figures(asked)
    assert found["accuracy"]["off"] > 0.95 and found["accuracy"]["on"] < 0.8
    assert found["findings"]["lost"]["status"] == 1 and found["findings"]["divergence"]["status"] == 0


# ---- What it asks --------------------------------------------------------------------------------------------------


def test_arms_get_the_same_requests_under_load_and_no_prefix_of_each_other(asked):
    with serving(ChatServer()) as server:
        compare(asked, server.url, "--gamma", "0.5", concurrency=8)
        assert 1 < server.most_at_once <= 8
    salts: dict[str, list[str]] = {}
    for body in server.bodies:
        assert body["temperature"] == 0 and body["logprobs"] and body["max_tokens"] == 8 and body["model"] == "model"
        salts.setdefault(body["cache_salt"], []).append(json.dumps(body["messages"]))
    _, *passes = salts.values()
    assert len(passes) == 3 * 12
    blocks: dict[str, int] = {}
    for messages in passes:
        blocks["".join(sorted(messages))] = blocks.get("".join(sorted(messages)), 0) + 1
    assert set(blocks.values()) == {3}  # every block in every arm, alike


def test_arms_of_a_block_come_in_every_order():
    order = list(run.passes_of(60))
    each = {tuple(arm for block, arm in order if block == number) for number in range(60)}
    assert len(each) == 6 and all(len(set(arms)) == 3 for arms in each)


def test_refused_requests_are_left_out_and_counted(asked, capsys):
    with serving(ChatServer(refuse="question 7 ")) as server:
        assert compare(asked, server.url, "--gamma", "0.5") == 1
    assert figures(asked)["refused"] == 1 and figures(asked)["requests"] == 95
    with serving(ChatServer(refuse="question")) as server:
        assert compare(asked, server.url, "--gamma", "0.5") == 2
        assert server.in_force == ("rank", 1.1)
    assert "every request refused" in capsys.readouterr().err


# ---- What it leaves behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["rank", "off", "observe"])
def test_options_are_put_back_whatever_happens(asked, preset):
    with serving(ChatServer(preset=preset, fail_after=40)) as server:
        before = server.in_force
        assert compare(asked, server.url, "--gamma", "0.5") == 2
        assert server.in_force == before
        assert server.settings.on.gamma == 1.1  # what --on would bring back


def once_behind(server: ChatServer, count: int) -> Callable[[], bool]:
    """True for one of the requests behind the first `count`, of which several come at once."""
    left = threading.Semaphore(1)
    return lambda: len(server.bodies) >= count and left.acquire(blocking=False)


@pytest.fixture
def interruptible():
    """SIGINT as in a terminal: what a script starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_and_put_options_back(asked, number, monkeypatch, capsys, interruptible):
    answers = str(asked.parent / "answers.jsonl")
    with serving(ChatServer()) as server:
        chat, once = server.chat, once_behind(server, 60)

        def interrupting(body):
            if once():
                os.kill(os.getpid(), number)
            return chat(body)

        monkeypatch.setattr(server, "chat", interrupting)
        assert compare(asked, server.url, "--gamma", "0.5", "--answers", answers) == 130
        assert server.in_force == ("rank", 1.1)
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_server_that_somebody_else_changes_ends_it(asked, capsys, monkeypatch):
    with serving(ChatServer()) as server:
        chat, once = server.chat, once_behind(server, 60)

        def changing(body):
            if once():
                server.change({"macs_preset=paper": 1, "macs_gamma=3": 1})
                server.change({"macs_preset=off": 1}) if "on" in body["cache_salt"].split()[-1] else None
            return chat(body)

        monkeypatch.setattr(server, "chat", changing)
        assert compare(asked, server.url, "--gamma", "0.5") == 2
        assert server.settings.now.gamma == 1.1
    assert "nobody else to change it" in capsys.readouterr().err


def test_a_killed_run_goes_on_and_ends_alike(asked, capsys):
    answers = asked.parent / "answers.jsonl"
    with serving(ChatServer(noise=0, fail_after=100)) as server:
        assert compare(asked, server.url, "--gamma", "0.5", "--answers", str(answers)) == 2
        done = len(answers.read_text().splitlines()) - 1
        assert 0 < done < 36
        with answers.open("a") as file:
            file.write('{"block": 3, "arm": "on", "ans')  # killed while it wrote
        server.settings = server.settings.changed({"gamma": 0.5})  # killed before it was put back
        server.fail_after, asked_before = None, len(server.bodies)
        assert compare(asked, server.url, "--gamma", "0.5", "--answers", str(answers)) == 1
        assert server.in_force == ("rank", 1.1)
        assert len(server.bodies) - asked_before == 8 * (36 - done + 1)  # one block more warms up
        first = figures(asked)
        assert compare(asked, server.url, "--gamma", "0.5") == 1  # at one go
        assert {k: v for k, v in figures(asked).items() if k != "clipped"} == {
            k: v for k, v in first.items() if k != "clipped"
        }
        count = len(server.bodies)
        assert compare(asked, server.url, "--gamma", "0.5", "--answers", str(answers)) == 1  # all is there
        assert len(server.bodies) == count
        assert compare(asked, server.url, "--gamma", "0.6", "--answers", str(answers)) == 2
    assert "of another comparison" in capsys.readouterr().err
    assert answers.stat().st_mode & 0o077 == 0


def test_keys_are_sent_and_never_shown(asked, capsys, monkeypatch):
    monkeypatch.setenv("SGLANG_ADMIN_API_KEY", ADMIN_KEY)
    answers = asked.parent / "answers.jsonl"
    with serving(ChatServer(key=KEY, admin_key=ADMIN_KEY)) as server:
        keyed = [server.url, "--gamma", "0.5", "--answers", str(answers)]
        assert compare(asked, *keyed, "--api-key", "wrong-key") == 2
        assert compare(asked, *keyed, "--api-key", KEY) == 1
    said = "".join(capsys.readouterr())
    written = "".join(path.read_text() for path in asked.parent.iterdir())
    for secret in (KEY, ADMIN_KEY, "wrong-key"):
        assert secret not in said and secret not in written


def test_the_page_needs_nothing_else_and_escapes_what_people_wrote(asked):
    asked.write_text(questions(96).replace("question", "<script>question"))
    with serving(ChatServer()) as server:
        compare(asked, server.url, "--gamma", "0.5")
    page = (asked.parent / "page.html").read_text()
    assert "&lt;script&gt;" in page and "<script" not in page
    assert "http-equiv" not in page and "src=" not in page and "nan" not in page.split("<main>")[1]
    assert (asked.parent / "page.html").stat().st_mode & 0o077 == 0


# ---- Requests ------------------------------------------------------------------------------------------------------


def test_the_labs_questions_are_chats_with_their_answers(tmp_path):
    path = tmp_path / "questions.jsonl"
    lab_chats.write(path, 16)
    loaded, asked = requests.load(str(path), 64), lab_questions.questions(lab_chats.MIX, 0)
    assert [one.references for one in loaded] == [(question.answer,) for question in asked]
    assert [one.pictures for one in loaded] == [bool(question.pictures) for question in asked]
    assert {one.pictures for one in loaded} == {True, False}


def test_lmms_eval_asks_the_same_and_judges_alike(tmp_path):
    """Its task, lab/lmms_eval: texts, pictures pixel by pixel, and who is right."""
    path = tmp_path / "questions.jsonl"
    lab_chats.write(path, 16)
    asked = lab_questions.questions(lab_chats.MIX, 0)
    for line, question in zip(path.read_text().splitlines(), asked, strict=True):
        doc = json.loads(line)
        assert utils.text(doc) == question.text
        shown = [picture.tobytes() for picture in utils.pictures(doc)]
        assert shown == [Image.open(io.BytesIO(png)).tobytes() for png in question.pictures]
        assert utils.results(doc, [f" {question.answer.upper()}\n"]) == {"right": 1.0}
        assert utils.results(doc, [f"{question.answer} or so"]) == {"right": 0.0}


def test_files_of_pictures_become_data_uris(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n123")
    part = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [part]}], "max_tokens": 9999}) + "\n\n")
    [request] = requests.load(str(path), 64)
    image = request.body["messages"][0]["content"][0]["image_url"]
    assert image["url"].startswith("data:image/png;base64,") and image["detail"] == "low"
    assert request.pictures and request.body["max_tokens"] == 64
    (tmp_path / "a.png").write_text("root:x:0:0")
    with pytest.raises(MacsError, match=r"line 1.*no picture"):
        requests.load(str(path), 64)


def test_a_log_of_sglangs_is_read(tmp_path):
    obj = {"messages": [{"role": "user", "content": "hi"}], "model": "m", "temperature": 1.0, "stream": True, "n": 1}
    obj |= {"max_completion_tokens": 5, "return_hidden_states": False, "chat_template_kwargs": {"x": 1}}
    event = {"timestamp": "t", "event": "request.received.openai", "obj": obj}
    lines = [
        "Loading weights ...",
        "[2026-12-01 00:40:30] INFO: started",
        f"[2026-12-01 00:40:31] {json.dumps(event)}",
        f"[2026-12-01 00:40:31] {json.dumps({**event, 'event': 'request.received', 'obj': {'text': 'hi'}})}",
        json.dumps({**event, "obj": {"prompt": "of a completion"}}),
    ]
    path = tmp_path / "server.log"
    path.write_text("\n".join(lines))
    [request] = requests.load(str(path), 64)
    assert request.body == {"messages": obj["messages"], "chat_template_kwargs": {"x": 1}, "max_tokens": 5}
    assert request.line == 3 and request.question == "hi" and not request.pictures


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": ', "line 1: got no JSON"),
        ('{"messages": []}', "line 1: got no messages"),
        ('{"messages": [{"role": "user", "content": "a"}], "reference": {}}', "line 1: got reference"),
        ('{"messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}', "without url"),
        ('{"messages": [{"content": [{"type": "image_url", "image_url": "data:image/png;base64,aa...aa"}]}]}', "cut"),
        ("a,b,c", "without a request"),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(tmp_path, line, words):
    path = tmp_path / "r.jsonl"
    path.write_text(line)
    with pytest.raises(MacsError, match=words):
        requests.load(str(path), 64)


# ---- Divergence ----------------------------------------------------------------------------------------------------


def top(probabilities: dict[str, float]) -> dict[str, float]:
    return {token: math.log(p) for token, p in probabilities.items()}


def test_divergence_is_that_of_whole_distributions_where_lists_are_whole():
    p, q = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 0.5, "b": 0.2, "c": 0.3}
    assert divergence.divergence(top(p), top(q)) == pytest.approx(
        sum(p[t] * math.log(p[t] / q[t]) for t in p), abs=1e-5
    )
    assert divergence.divergence(top(p), top(p)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_divergence_of_lists_is_a_lower_bound(seed):
    draw = np.random.default_rng(seed)
    p, q = draw.dirichlet(np.ones(50) * 0.2, 2) + 1e-9
    exact = float((p * np.log(p / q)).sum())
    lists = [top({str(i): float(side[i]) for i in np.argsort(-side)[:5]}) for side in (p, q)]
    assert 0 <= divergence.divergence(*lists) <= exact + 1e-4
    assert divergence.divergence(*lists) > 0.01  # these have next to nothing in common


def test_tokens_are_compared_up_to_the_first_that_differs():
    def answer(*words: str) -> list[Token]:
        return [Token(w, math.log(0.6), top({w: 0.6, "x": 0.3})) for w in words]

    same = divergence.compare(answer("a", "b"), answer("a", "b"))
    assert (same.tokens, same.divergence, same.drop, same.first) == (2, 0, 0, None)
    early = divergence.compare(answer("a", "b", "c"), answer("a", "d", "c"))
    assert early.tokens == 2 and early.first == 1 and early.divergence > 0 and early.drop > 0
    assert divergence.compare(answer("a", "b"), answer("a")).first == 1


# ---- Statistics ----------------------------------------------------------------------------------------------------


def heavy(draw: np.random.Generator, size) -> np.ndarray:
    """What divergences are like: most next to nothing, a few a thousand times as large."""
    return np.exp(draw.normal(-14, 3, size))


def test_under_the_null_a_loss_is_hardly_ever_found():
    draw = np.random.default_rng(1)
    found = 0
    for _ in range(4000):
        shared = heavy(draw, (12, 3))  # batches of an arm: a block's requests go up and down together
        arms = heavy(draw, (12, 16, 3)) + shared[:, None]
        off, again, on = arms[..., 0], arms[..., 1], arms[..., 2]
        excess = ((np.abs(on - off) + np.abs(on - again)) / 2 - np.abs(off - again)).mean(axis=1)
        found += statistics.judge(excess, 0.0, 2).status == 1  # nothing is allowed: only the test decides
    assert found <= 10  # 4 are expected at 0.001


def test_a_large_loss_is_always_found_and_a_small_one_is_none():
    draw = np.random.default_rng(2)
    for _ in range(200):
        assert statistics.judge(4e-4 + heavy(draw, (12, 16)).mean(axis=1), 2e-4, 2).status == 1
        assert statistics.judge(draw.normal(1e-5, 2e-5, 12), 2e-4, 2).status == 0
    assert statistics.judge(draw.normal(2e-4, 2e-4, 12), 2e-4, 2).status == 2


def test_too_few_blocks_say_nothing_and_how_many_would():
    few = statistics.judge(np.array([1.0, 1.1, 0.9]), 0.1)
    assert few.status == 2 and few.needed == statistics.fewest_blocks() == 10
    assert statistics.fewest_blocks(2) == 11
    noisy = statistics.judge(np.random.default_rng(0).normal(0.1, 0.5, 12), 0.2)
    assert noisy.status == 2 and noisy.needed > 12
    assert statistics.judge(np.zeros(0), 0.1).status == 2


def test_the_sign_flip_test_is_exact_and_its_approximation_near():
    assert statistics.sign_flip(np.array([1.0, 2, 3])) == 1 / 8
    assert statistics.sign_flip(np.array([-1.0, 2, 3])) == 2 / 8
    assert statistics.sign_flip(np.zeros(5)) == 1
    values = np.random.default_rng(3).normal(0.4, 1, 20)
    ways = 1 - 2 * ((np.arange(1 << 20, dtype=np.int32)[:, None] >> np.arange(20, dtype=np.int32)) & 1).astype(np.int8)
    assert statistics.sign_flip(values) == pytest.approx(np.mean(ways @ values >= values.sum()), abs=0.005)


def test_intervals_cover_and_widen_with_what_blocks_share():
    draw = np.random.default_rng(4)
    blocks = np.repeat(np.arange(20), 10)
    covered = 0
    for _ in range(200):
        values = draw.normal(1, 1, 200) + np.repeat(draw.normal(0, 1, 20), 10)
        found = statistics.estimate(values, blocks)
        covered += found.low <= 1 <= found.high
    assert covered >= 174  # of 95 %; without blocks it would be half
    assert math.isnan(statistics.estimate(np.array([math.nan]), np.array([0])).mean)


def test_thirds_hold_all_values_once():
    for values in ([1, 2, 3, 4, 5, 6], [5, 5, 5], [1, 1, 1, 9], list(range(100)), []):
        ranges = statistics.thirds(values)
        assert all(sum(low <= v <= high for low, high in ranges) == 1 for v in values)


# ---- Many at once --------------------------------------------------------------------------------------------------


def test_answers_keep_the_order_and_a_failure_ends_all():
    assert run.at_once(range(50), lambda i: i * i, 7) == [i * i for i in range(50)]
    begun, over, before = [], threading.Event(), set(threading.enumerate())

    def work(i: int) -> None:
        begun.append(i)
        if i == 3:
            raise MacsError("x", "y", "z")
        over.wait()

    with pytest.raises(MacsError):  # nobody waits for the other three
        run.at_once(range(1000), work, 4)
    under_way = set(threading.enumerate()) - before
    over.set()
    for thread in under_way:
        thread.join()
    assert sorted(begun) == [0, 1, 2, 3]
