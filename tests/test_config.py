"""Options: presets, ranges, flags and their round trips; every refusal is one line that names what, got and
expected.
"""

import argparse
import dataclasses
import json
import math

import pytest

from sglang_macs import config
from sglang_macs.config import MacsConfig
from sglang_macs.errors import MacsError


def parse(*argv: str) -> MacsConfig:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.from_options(vars(parser.parse_args(argv)))


def test_presets_are_those_of_the_method():
    paper, rank, cai = (MacsConfig.from_preset(p) for p in ("paper", "rank", "cai"))
    assert (paper.scope, paper.load, paper.importance, paper.reroute) == ("expert", "effective", "entropy", "local")
    assert (rank.scope, rank.load, rank.importance, rank.reroute) == ("rank", "rows", "gate", "global")
    assert (cai.scope, cai.load, cai.importance, cai.reroute) == ("expert", "rows", "gate", "none")
    assert (cai.delta, cai.rho) == (0.0, 0.0)
    assert MacsConfig.from_preset("off").is_off


def test_an_option_overrides_its_preset():
    assert parse("--macs-preset", "cai", "--macs-reroute", "global").reroute == "global"
    assert parse("--macs-preset", "cai").reroute == "none"


def test_every_field_has_a_flag_that_reaches_it():
    values = {"preset": "paper", "gamma": "1.5", "scope": "rank", "load": "rows", "importance": "entropy_gate"}
    values |= {"reroute": "none", "reroute_rounds": "2", "exchange": "local", "delta": "0.5", "rho": "0.25"}
    values |= {"alpha": "2", "c_min": "3", "entropy_scope": "image", "protect_text": "false", "min_tokens": "7"}
    values |= {"decode": "true", "buckets": "64", "profile": "/p.json", "verify": "1", "verify_every": "5"}
    values |= {"trace": "/t", "trace_limit_mb": "8", "dispatch": "fused", "all_reduce": "peer"}
    values |= {"act": "always", "act_rows": "9", "layer_graphs": "false", "replicas": "keep"}
    values |= {"exempt": "false", "cache": "exact"}
    names = {f.name for f in dataclasses.fields(MacsConfig)}
    assert names == values.keys()
    parsed = parse(*(arg for name, value in values.items() for arg in (config.flag(name), value)))
    default = MacsConfig()
    for name in names:
        assert getattr(parsed, name) != getattr(default, name) or name in ("scope", "load"), name


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 0.0},
        {"gamma": -1.0},
        {"gamma": math.nan},
        {"rho": 2.0},
        {"rho": -0.1},
        {"rho": math.nan},
        {"delta": -1.0},
        {"delta": math.inf},
        {"alpha": 17.0},
        {"c_min": -1.0},
        {"buckets": 100},
        {"scope": "node"},
        {"preset": "fast"},
        {"reroute_rounds": -1},
        {"min_tokens": -5},
        {"preset": "off", "gamma": 1.0},
        {"no_such_option": 1},
    ],
    ids=str,
)
def test_bad_options_are_refused_in_one_line(options):
    with pytest.raises(MacsError) as caught:
        MacsConfig.from_preset(**options)
    text = str(caught.value)
    assert "got" in text and "expected" in text and "\n" not in text
    assert next(reversed(options)).replace("_", "-").split("-")[-1] in text


def test_json_round_trip_keeps_infinity():
    for made in (MacsConfig.from_preset("off"), MacsConfig.from_preset("rank", gamma=1.05, profile="x")):
        assert MacsConfig.from_json(made.to_json()) == made


def test_entropies_are_skipped_only_where_nothing_depends_on_them():
    assert not MacsConfig.from_preset("cai").needs_entropy(has_profile=True)
    assert not MacsConfig.from_preset("rank", delta=0.0).needs_entropy(has_profile=True)
    assert not MacsConfig.from_preset("rank").needs_entropy(has_profile=False)
    assert MacsConfig.from_preset("rank").needs_entropy(has_profile=True)
    assert MacsConfig.from_preset("rank", importance="entropy_gate").needs_entropy(has_profile=False)
    assert MacsConfig.from_preset("paper").needs_entropy(has_profile=False)


def test_flag_table_names_every_field():
    table = config.flag_table()
    for field in dataclasses.fields(MacsConfig):
        assert f"`{config.flag(field.name)}`" in table


# ---- Odd values, and the environment -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd", ["high", None, [], {}, True, object(), 10**400, 10**5000, "\0", "\ud800", 1j], ids=range(11)
)
@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MacsConfig)])
def test_a_value_of_another_type_is_refused_in_one_line(name, odd):
    try:
        made = MacsConfig.from_preset(**{name: odd})
    except MacsError as error:
        assert str(error).startswith(config.flag(name)) and str(error).isprintable() and len(str(error)) < 1000
    else:
        json.dumps(made.to_json())
        assert type(odd) in (str, bool, type(None)) or isinstance(getattr(made, name), int)


@pytest.mark.parametrize(
    "raw",
    ["", " ", "{", "[]", "4", "null", "\x1b[2J",
     '{"gamma": "high"}', '{"gamma": NaN}', '{"gamma": [1]}', '{"speed": 3}',
     '{"preset": {"a": 1}}', '{"verify": "yes"}', '{"profile": 4}', '{"trace": "a\\u0000b"}', '{"buckets": true}',
     '{"min_tokens": ' + "9" * 5000 + "}", '{"gamma": 1e999, "preset": "fast"}',
     "[" * 50_000, '{"a":' * 5000,
     '{"' + "x" * 100_000 + '": 1}'],
    ids=range(21),
)  # fmt: skip
def test_an_environment_that_holds_no_configuration_ends_in_one_line(monkeypatch, raw):
    monkeypatch.setenv(config.CONFIG_ENV, raw)
    if not raw:
        assert config.configured() is None
        return
    with pytest.raises(MacsError) as caught:
        config.configured()
    text = str(caught.value)
    assert text.startswith(config.CONFIG_ENV) and text.isprintable() and len(text) < 1000


def test_what_is_configured_is_read_back(monkeypatch):
    monkeypatch.setenv(config.CONFIG_ENV, "")
    for made in (MacsConfig.from_preset("off"), MacsConfig.from_preset(profile="inf", trace="/a b/é")):
        config.configure(made)
        assert config.configured() == made  # a profile called "inf" is no number
