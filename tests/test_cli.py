"""The command: what it does without torch, and that odd arguments and files end in one line and status 2."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_macs import __version__, cli
from sglang_macs.errors import MacsError, printable
from sglang_macs.simulate import loads
from tests.support import traces
from tests.support.chat_server import ChatServer, questions, serving
from tests.support.info_server import answering, body

ROOT = Path(__file__).resolve().parent.parent

# ---- Without torch -------------------------------------------------------------------------------------------------

ALONE = """
import sys

ALLOWED = set(sys.argv.pop(1).split(",")) | {"sglang_macs"} | sys.stdlib_module_names


class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Nothing())
from sglang_macs.cli import main

sys.exit(main())
"""


def run_alone(allowed: str, *arguments: str) -> subprocess.CompletedProcess:
    """The command where only this package, the standard library and `allowed` can be imported."""
    command = [sys.executable, "-c", ALONE, allowed, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        *([name, "--help"] for name in ("calibrate", "compare", "doctor", "report", "set", "simulate", "top")),
    ],
    ids=" ".join,
)
def test_help_needs_nothing(arguments):
    done = run_alone("", *arguments)
    assert done.returncode == 0 and not done.stderr and ("usage:" in done.stdout or __version__ in done.stdout)


def test_top_needs_nothing():
    state = {"version": __version__, "rank": 0, "dispatches": 3}
    with answering(body([state])) as url:
        done = run_alone("", "top", url, "--once")
    assert done.returncode == 0 and "dispatches 3" in done.stdout, done.stderr


def test_report_needs_numpy_alone(tmp_path):
    traces.record(tmp_path / "trace")
    done = run_alone("numpy", "report", str(tmp_path / "trace"), "-o", str(tmp_path / "page.html"))
    assert done.returncode == 0 and "<html" in (tmp_path / "page.html").read_text(), done.stderr


def test_compare_needs_numpy_alone(tmp_path):
    (tmp_path / "chats.jsonl").write_text(questions(48))
    with serving(ChatServer()) as server:
        words = ["compare", server.url, "--gamma", "0.5", "--requests", str(tmp_path / "chats.jsonl")]
        done = run_alone("numpy", *words, "--concurrency", "4", "-o", str(tmp_path / "page.html"))
    assert done.returncode == 1 and "loss found" in done.stdout, done.stderr


def test_simulate_needs_numpy_alone():
    done = run_alone("numpy", "simulate", "--ep", "8", "--batches", "1", "--gamma", "1.1")
    assert done.returncode == 0 and "not measured" in done.stdout, done.stderr


@pytest.mark.parametrize("words", ["simulate", "calibrate --dataset d --model-path . --out p"])
def test_a_module_that_is_missing_is_named_in_one_line(words):
    done = run_alone("", *words.split())
    assert done.returncode == 2 and "got no module" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_package_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "sglang_macs", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"sglang-macs {__version__}\n"


def test_a_reader_that_stops_ends_no_command_with_a_traceback():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "sglang_macs", "simulate", "--ep", "8", "--batches", "1", "--gamma", "1.1"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert not done.stderr


# ---- One line, status 2 --------------------------------------------------------------------------------------------


def ends_in_one_line(capsys, *arguments: str) -> str:
    """Runs the command, which must refuse its arguments. Returns the line."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.endswith("\n") and error[:-1].isprintable(), (arguments, status, error)
    assert error.startswith("sglang-macs"), error
    return error


NOT_NUMBERS = ("", "x", "nan", "1,,2", "0x10", "\x1b[2J", "9" * 5000, "1\n2")
NUMBERS = {
    ("top", "--interval"): ("-1", "0", "inf"),
    ("calibrate", "--samples"): ("-1", "0", "19", "inf", "1.5", "1000000000"),
    ("calibrate", "--interval"): ("-1", "inf"),
    ("calibrate", "--patience"): ("-1", "inf"),
    ("report", "--row-us"): ("-1", "inf"),
    ("report", "--replica"): ("-1", "7", "1.5", "inf"),
    ("compare", "--gamma"): ("0", "-1", "1e-9"),
    ("compare", "--concurrency"): ("0", "-1", "1.5", "inf", "100000"),
    ("compare", "--max-tokens"): ("0", "-1", "1.5", "inf", "100000"),
    ("compare", "--most-divergence"): ("-1", "inf"),
    ("compare", "--most-lost"): ("-1", "1.1", "inf"),
    ("set", "--gamma"): ("0", "-1", "1e-9"),
    ("set", "--min-tokens"): ("-1", "1.5", "inf", "10000000000"),
    ("set", "--verify-every"): ("-1", "1.5", "inf", "10000000000"),
    ("set", "--wait"): ("-1", "inf", "1e9"),
    ("simulate", "--visual-share"): ("-0.1", "1.1", "inf"),
    ("simulate", "--noise"): ("-1", "3", "inf"),
    ("simulate", "--ep"): ("0", "-8", "1", "7", "12", "2048", "8,0", "8,", "8,8.0", ",".join(["8"] * 1000)),
    ("simulate", "--gamma"): ("0", "-1", "inf", "1e300", "1,nan", "1,"),
    ("simulate", "--tokens"): ("0", "-1", "1.5", "10000000000"),
    ("simulate", "--context"): ("-1", "1.5", "10000000000"),
    ("simulate", "--batches"): ("0", "-1", "100000000"),
    ("simulate", "--redundant"): ("-1", "1.5", "1025", "inf"),
    ("simulate", "--tile"): ("0", "-1", "100000000"),
    ("simulate", "--seed"): ("-1", "1.5", "1e3", "99999999999999999999"),
}
OTHERS = {
    ("simulate", "--machine"): ("", "h800", "\x1b[2J"),
    ("simulate", "--model"): ("", "gpt", "x" * 5000),
    ("simulate", "--presets"): ("", "fast", "off", "rank,", "rank,,cai", "\x1b[2J"),
    ("simulate", "--set"): ("", "=", "speed=3", "launch_us", "launch_us=", "launch_us=-1", "launch_us=0",
                            "launch_us=nan", "launch_us=inf", "launch_us=1e300", "launch_us=1e-300",
                            "gpus_per_node=1.5", "name=3", "plan_us=3", "gpus_per_node=" + "9" * 5000),
    ("simulate", "--loads"): ("", "/", "/nowhere", "/dev/zero", "\x1b[2J"),
    ("simulate", "--from"): ("", "/", "/nowhere", "/nowhere.pt", "/dev/zero", "http://\x1b[2J", "http://127.0.0.1:9"),
    ("simulate", "--api-key"): ("\x1b[2J", "a\nb", "ключ"),
    ("simulate", "--cacert"): ("", "/", "/nowhere", "/dev/zero"),
    ("simulate", "--plot"): ("", "/", "/nowhere/a.png", "a.xyz", "/dev/null", ".png/a.png"),
    ("report", "--run"): ("", "no-such", "\x1b[2J", "x" * 5000),
    ("report", "--output"): ("", "/", "/nowhere/page.html", "/dev/full"),
    ("report", "TRACE"): ("", "/nowhere", "/dev/null", "\x1b[2J"),
    ("top", "URL"): ("", "x", "file:///etc/passwd", "http://\x1b[2J", "http://127.0.0.1:9"),
    ("calibrate", "--server"): ("", "x", "file:///etc/passwd", "http://127.0.0.1:9"),
    ("calibrate", "--dataset"): ("", "/", "/nowhere", "/dev/zero"),
    ("calibrate", "--model-path"): ("", "/", "/nowhere", "/dev/zero"),
    ("calibrate", "--out"): ("", "/", "/nowhere/p.json", "/dev/null"),
    ("calibrate", "--api-key"): ("\x1b[2J", "a\nb", "ключ"),
    ("calibrate", "--cacert"): ("", "/", "/nowhere", "/dev/zero"),
    ("compare", "URL"): ("", "x", "file:///etc/passwd", "http://\x1b[2J", "http://127.0.0.1:9"),
    ("compare", "OTHER"): ("", "x", "file:///etc/passwd", "http://\x1b[2J", "http://127.0.0.1:9"),
    ("compare", "--requests"): ("", "/", "/nowhere", "/dev/zero", "/dev/null"),
    ("compare", "--match"): ("", "regex", "\x1b[2J"),
    ("compare", "--answers"): ("", "/", "/nowhere/a.jsonl", "/dev/null"),
    ("compare", "--output"): ("", "/", "/nowhere/page.html", "/dev/full"),
    ("compare", "--api-key"): ("\x1b[2J", "a\nb", "ключ"),
    ("compare", "--admin-api-key"): ("\x1b[2J", "a\nb", "ключ"),
    ("compare", "--cacert"): ("", "/", "/nowhere", "/dev/zero"),
    ("set", "URL"): ("", "x", "file:///etc/passwd", "http://\x1b[2J", "http://127.0.0.1:9"),
    ("set", "--preset"): ("", "fast", "\x1b[2J"),
    ("set", "--importance"): ("", "os:getcwd", "\x1b[2J"),
    ("set", "--verify"): ("", "yes"),
    ("set", "--trace"): ("", "/tmp"),
    ("set", "--api-key"): ("\x1b[2J", "a\nb", "ключ"),
    ("set", "--admin-api-key"): ("\x1b[2J", "a\nb", "ключ"),
    ("set", "--cacert"): ("", "/", "/nowhere", "/dev/zero"),
    ("top", "--api-key"): ("\x1b[2J", "a\nb", "ключ"),
    ("top", "--cacert"): ("", "/", "/nowhere", "/dev/zero"),
}  # fmt: skip
# What takes no odd value.
NOTHING_OR_YES = {"--help", "--json", "--fp8", "--low-latency", "--off", "--on", "--once", "--exchange"}
CASES = [
    (command, argument, odd)
    for (command, argument), values in {**NUMBERS, **OTHERS}.items()
    for odd in (*values, *(NOT_NUMBERS if (command, argument) in NUMBERS else ()))
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with `model`, which `calibrate` takes for a checkpoint until transformers load it, and `trace`."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"architectures": ["A"], "model_type": "no such type"}')
    save_file({"model.layers.0.mlp.gate.weight": torch.ones(2, 2)}, str(folder / "model" / "model.safetensors"))
    traces.record(folder / "trace")
    (folder / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    return folder


def usual(command: str, inputs: Path, argument: str) -> dict[str, str]:
    """Arguments with which a command would run for a short while."""
    url = "https://127.0.0.1:9" if argument == "--cacert" else "http://127.0.0.1:9"
    source = {"--dataset": "/nowhere"} if argument == "--dataset" else {"--server": url}
    loads = {"--from": url} if argument in ("--api-key", "--cacert") else {}
    other = {"OTHER": url} if argument == "OTHER" else {}  # beside URL: argparse takes no flag between them
    return {
        "compare": {"URL": url, **other, "--requests": str(inputs / "chats.jsonl")},
        "simulate": {"--ep": "8", "--batches": "1", "--gamma": "1.1", "--presets": "rank"} | loads,
        "report": {"TRACE": str(inputs / "trace")},
        "top": {"URL": url},
        "set": {"URL": url, "--min-tokens": "1"},
        "calibrate": {**source, "--model-path": str(inputs / "model"), "--out": str(inputs / "p.json")},
    }[command]


@pytest.mark.parametrize(("command", "argument", "odd"), CASES, ids=[f"{c} {a} {o[:12]!r}" for c, a, o in CASES])
def test_odd_arguments_end_in_one_line(capsys, inputs, command, argument, odd):
    given = {**usual(command, inputs, argument), argument: odd}
    words = [f"{name}={value}" if name.startswith("--") else value for name, value in given.items()]
    error = ends_in_one_line(capsys, command, *words)
    of = "server" if odd.startswith("http") else "trace" if odd == "/" else "--from"
    names = {"URL": "server", "OTHER": "server", "--server": "server", "TRACE": "trace", "--from": of}
    wrong = names.get(argument, argument)
    assert wrong in error and len(error) < 2000
    assert not (inputs / "p.json").exists()


def test_every_argument_is_among_the_cases():
    chosen = next(action for action in cli.build_parser()._actions if action.dest == "command").choices
    for command in set(chosen) - {"doctor"}:  # whose arguments are a server's
        actions = chosen[command]._actions
        names = {action.option_strings[-1] if action.option_strings else action.dest.upper() for action in actions}
        assert names - NOTHING_OR_YES == {a for c, a in {**NUMBERS, **OTHERS} if c == command}, command


@pytest.mark.parametrize("words", ["", "no-such", "top a b", "top --no-such", "calibrate", "simulate --seed"])
def test_commands_that_are_none_end_in_one_line(capsys, words):
    ends_in_one_line(capsys, *words.split())


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(sorted({**NUMBERS, **OTHERS})), odd=TEXT)
def test_no_text_ends_a_command_in_a_traceback(tmp_path_factory, inputs, case, odd):
    command, argument = case
    given = {**usual(command, inputs, argument), argument: odd}
    words = [f"{name}={value}" if name.startswith("--") else value for name, value in given.items()]
    here = os.getcwd()
    os.chdir(tmp_path_factory.getbasetemp())  # where a name that can be one makes its file
    try:
        status = cli.main([command, *words])
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(here)
    assert status in (0, 2)


# ---- Odd loads -----------------------------------------------------------------------------------------------------

GOOD_LOADS = {"schema": loads.SCHEMA, "source": "a test", "top_k": 8, "layers": {"0": [[[3] * 128, [1] * 128]]}}


def of_layer(number: object) -> dict:
    """Changes of loads: one layer, each row of which is `number`."""
    return {"layers": {"0": [[[number] * 128] * 2]}}


def loads_file(folder: Path, **changes) -> str:
    path = folder / "loads.json"
    path.write_text(json.dumps({**GOOD_LOADS, **changes}))
    return str(path)


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 0}, {"top_k": "many"}, {"top_k": float("inf")}, {"top_k": float("nan")}, {"top_k": None}, {"layers": {}},
     {"layers": []}, {"layers": 3}, {"layers": {"a": []}}, {"layers": {"0": "rows"}},
     {"layers": {"0": [[[1] * 4] * 2]}}, of_layer(float("nan")), of_layer(1e300), of_layer(10**400), of_layer(-1),
     of_layer(0), of_layer("x"),
     {"layers": {str(i): [[[1] * 128] * 2] for i in range(300)}}, {"schema": ["x"]}, {"schema": "\x1b[2J"}],
    ids=range(20),
)  # fmt: skip
def test_odd_loads_end_in_one_line(tmp_path, capsys, changes):
    path = loads_file(tmp_path, **changes)
    assert "--loads" in ends_in_one_line(capsys, "simulate", "--ep", "8", "--batches", "1", "--loads", path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"schema": ' + "9" * 5000 + "}", "\xff"], ids=range(3))
def test_loads_that_no_parser_takes_end_in_one_line(tmp_path, capsys, text):
    (tmp_path / "l.json").write_text(text)
    ends_in_one_line(capsys, "simulate", "--loads", str(tmp_path / "l.json"))


def test_what_loads_call_themselves_does_not_steer_the_terminal(tmp_path, capsys):
    path = loads_file(tmp_path, source="\x1b]0;owned\x07")
    assert cli.main(["simulate", "--ep", "8", "--batches", "1", "--gamma", "1.1", "--loads", path]) == 0
    printed = capsys.readouterr().out
    assert "owned" in printed and "\x1b" not in printed and "\x07" not in printed


def test_extreme_loads_and_figures_make_no_warning(tmp_path, capsys):
    path = loads_file(tmp_path, layers={"0": [[[1e12] + [0] * 127, [0] * 128]]})
    few = ["simulate", "--ep", "2,128", "--batches", "1", "--gamma", "0.01,100", "--loads", path]
    for more in ("--noise=2", "--noise=1e-300", "--tokens=1", "--set=hbm_efficiency=1e-6", "--tile=1"):
        assert cli.main([*few, more]) == 0
    for share in ("0", "1", "5e-324", "0.9999999999999999"):
        assert cli.main(["simulate", "--ep", "8", "--batches", "1", "--gamma", "1", "--visual-share", share]) == 0
    printed = capsys.readouterr()
    assert "nan" not in printed.out and not printed.err


# ---- Errors --------------------------------------------------------------------------------------------------------


def test_an_error_is_one_printable_line_of_bounded_length():
    for got in ("\x1b[2J\n\u202e", "x" * 10_000, 10**5000, os.strerror(errno.ENOSPC)):
        text = str(MacsError("what\n", got, "expected\t", "fix"))
        assert text.isprintable() and len(text) < 2000
    assert printable("a\tb\x07") == "a b?"


def _served(received: int, applied: int, gamma: float, refused: str = "") -> dict:
    told = {"received": received, "applied": applied, "refused": refused, "changes": [[applied, 41]]}
    return {"version": __version__, "rank": 0, "config": {"gamma": gamma}, "control": told}


@pytest.mark.parametrize(
    ("updated", "states", "status", "says"),
    [
        ([True, True], [_served(0, 0, 1.1), _served(1, 1, 1.05)], 0, "gamma 1.1 -> 1.05; on all ranks from pass 41 on"),
        ([True, True], [_served(0, 0, 1.1), _served(1, 0, 1.1)], 0, "it takes effect before the next pass"),
        ([True, False], [_served(0, 0, 1.1), _served(1, 1, 1.1, "gamma: too much")], 2, "refused, gamma: too much"),
    ],
)
def test_set_asks_and_tells_what_became_of_it(capsys, monkeypatch, updated, states, status, says):
    from sglang_macs.observe.server_info import Server

    asked, answers = [], iter(states)
    monkeypatch.setattr(Server, "states", lambda self: [next(answers, states[-1])])
    monkeypatch.setattr(Server, "change", lambda self, options: asked.append(options) or all(updated))
    assert cli.main(["set", "http://127.0.0.1:9", "--gamma", "1.05", "--on", "--wait", "0"]) == status
    assert asked == [{"macs_on=True": 1, "macs_gamma=1.05": 1}]
    out, err = capsys.readouterr()
    assert says in (err if status else out)


@pytest.mark.parametrize(("given", "asks_with"), [([], "all"), (["--admin-api-key", "admin"], "admin")])
def test_set_changes_with_the_admin_key_and_reads_with_the_other(monkeypatch, given, asks_with):
    """SGLang takes the one alone for the first where both are set, and the other alone for the second."""
    from sglang_macs.observe.server_info import Server

    keys = []
    monkeypatch.setattr(Server, "states", lambda self: keys.append(self.api_key) or [_served(0, 0, 1.1)])
    monkeypatch.setattr(Server, "change", lambda self, options: keys.append(self.api_key) or True)
    assert cli.main(["set", "http://127.0.0.1:9", "--off", "--api-key", "all", *given]) == 0
    assert keys == ["all", asks_with, "all"]


def test_set_without_an_option_says_what_it_takes(capsys):
    assert "--gamma 1.05" in ends_in_one_line(capsys, "set", "http://127.0.0.1:9")
