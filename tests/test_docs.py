"""What the documents claim is what the code has: flags, hooks, make targets, subcommands, scripts, paths."""

import functools
import re
import shlex
import subprocess
import sys

import pytest

from sglang_macs import cli, config
from sglang_macs.cpu_compat import environment, gaps
from sglang_macs.engine import launcher, scheduler_process
from tests.support.pages import OF_THEIR_TIME, PAGES, ROOT

# Of this repository.
FOLDERS = "benchmarks csrc deploy docs lab models requirements scripts sglang_macs tests tools".split()  # noqa: SIM905


def links(text: str) -> set[str]:
    """Targets of Markdown links and pictures, without those elsewhere and without anchors."""
    return set(re.findall(r"\]\((?!http|#)([^)#]+)", text))


def paths(text: str) -> set[str]:
    """Files and folders of this repository that stand in code or commands; NAME and * stand for anything. Of a
    measurement's command, behind its commit, the paths are those of that commit.
    """
    text = re.sub(r"https?://\S+|commit \w{7,40}, `[^`]*`|<!-- cost: .*\n.*", "", text)
    found = re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./*-]+)", text)
    return {re.sub(r"\b[A-Z]+\b(?=\.json)", "*", path.rstrip(".")) for path in found}


def commands(text: str) -> list[str]:
    """Command lines in indented blocks, continued lines joined, comments cut."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.split("  #")[0].strip() for line in re.findall(r"^(?: {4}|\t)(\S.*)$", joined, re.MULTILINE)]


def flags_after(words: str) -> dict[str, set[str]]:
    """{page: long flags} of all commands that contain `words`, in blocks and in `code`."""
    found = {}
    for page, text in PAGES.items():
        lines = [line for line in (*commands(text), *re.findall(r"`([^`\n]+)`", text)) if words in line]
        found[page] = {flag for line in lines for flag in re.findall(r"(?<!\S)(--[a-z][a-z0-9-]+)", line)}
    return found


@functools.cache
def sglang_flags() -> set[str]:
    """Every flag of SGLang's own parser with the plugin in it."""
    program = "import argparse\nfrom sglang.srt.plugins import load_plugins\nload_plugins()\n"
    program += "from sglang.srt.server_args import ServerArgs\nparser = argparse.ArgumentParser()\n"
    program += "ServerArgs.add_cli_args(parser)\nprint('FLAGS', *parser._option_string_actions)"
    env = {**environment(2), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    return set(next(line for line in done.stdout.splitlines() if line.startswith("FLAGS ")).split())


def test_the_flag_table_is_that_of_the_config():
    assert config.flag_table() in PAGES["docs/guide/flags.md"], "run: make format"


def test_hook_ledger_lists_exactly_what_is_registered():
    ledger = re.findall(r"^\| `((?:sglang|torch)\.\S+)` \| (\w+) \|", PAGES["docs/design/hooks.md"], re.MULTILINE)
    hooks = [(h.target, h.kind) for h in (*launcher.HOOKS, *scheduler_process.HOOKS)]
    assert ledger == hooks + [(g.target, g.kind) for g in gaps.GAPS]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^ +|=\S+ )make ([a-z-]+)", PAGES[page], re.MULTILINE))
    assert named <= targets, named - targets
    assert named or page != "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    lost = {link for link in links(PAGES[page]) if not (ROOT / page).parent.joinpath(link).exists()}
    assert not lost


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith(OF_THEIR_TIME)])
def test_paths_exist(page):
    assert not {path for path in paths(PAGES[page]) if not any(ROOT.glob(path))}


def test_pages_that_code_names_exist():
    named = {}
    for folder in sorted({*FOLDERS} - {"docs", "models"}):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".sh", ".yaml", ".sbatch", ".h", ".cpp", ".cu", ".cuh"):
                found = re.findall(r"(?<![\w/.-])docs/[\w/]+\.(?:md|png)", path.read_text(encoding="utf-8"))
                named |= dict.fromkeys(found, path)
    lost = {page: path for page, path in named.items() if not (ROOT / page).exists()}
    assert len(named) > 10 and not lost


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_macs_exist(page):
    known = {config.flag(n) for n in config.MacsConfig.__dataclass_fields__} | {"--macs-*", "--macs-"}
    named = set(re.findall(r"--macs-[a-z-]*", PAGES[page]))
    assert named <= known, named - known


@pytest.mark.parametrize("page", PAGES)
def test_subcommands_and_their_flags_exist(page):
    chosen = next(a for a in cli.build_parser()._actions if a.dest == "command").choices
    for words in re.findall(r"(?:`|^ +)sglang-macs ([a-z][^`\n]*)", PAGES[page], re.MULTILINE):
        name, *rest = shlex.split(words.split(" -- ")[0].split("  #")[0], posix=False)
        assert name in chosen, f"sglang-macs {name}"
        flags = set(re.findall(r"--[a-z][a-z-]+", " ".join(rest)))
        assert flags <= set(chosen[name]._option_string_actions), f"sglang-macs {words}"


# What adds options to a script's, and where these stand. Those may add options of another place, which comes later.
SHARED_OPTIONS = {
    "common_options.parser_of": "e2e/common_options.py",
    "common_options.add_variants": "e2e/common_options.py",
    "result_file.add_options": "gpu/result_file.py",
}
PROGRAM = re.compile(r"python3? (?:-m )?((?:benchmarks|scripts|tools|lab)[./][\w./]+)(.*)")


@pytest.mark.parametrize("page", PAGES)
def test_flags_of_scripts_exist(page):
    """A script's flags are looked for in its source: importing all of them would take their dependencies."""
    for line in commands(PAGES[page]):
        if script := PROGRAM.search(line):
            source = (ROOT / script[1].removesuffix(".py").replace(".", "/")).with_suffix(".py").read_text()
            for call, shared in SHARED_OPTIONS.items():
                if call in source:
                    source += (ROOT / "benchmarks" / shared).read_text(encoding="utf-8")
            lost = {flag for flag in re.findall(r"--[a-z][a-z-]+", script[2]) if f'"{flag}"' not in source}
            assert not lost, line


@pytest.mark.server
def test_flags_of_launches_exist():
    known = (*sglang_flags(), "--")
    for words in ("launch_server", "doctor --", "FLAGS="):
        for page, named in flags_after(words).items():
            lost = {flag for flag in named if not any(k.startswith(flag) for k in known)}  # argparse takes a prefix
            assert not lost, f"{page}: {lost}"
    assert flags_after("launch_server")["docs/guide/quickstart.md"]
