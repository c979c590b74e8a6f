"""Profiles: what is read back is what was written, and nothing else is taken for a profile."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_macs.errors import MacsError
from sglang_macs.plan import profile
from sglang_macs.plan.profile import Profile

GOOD = Profile("Qwen3VLMoeForConditionalGeneration", 4, {0: [1, 0, -1, 0], 2: [0, 0, 0, 1]})


def write(path, **changes):
    profile.save(GOOD, str(path))
    raw = json.loads(path.read_text())
    raw.update(changes)
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return str(path)


def test_round_trip(tmp_path):
    profile.save(GOOD, str(tmp_path / "p.json"))
    read = profile.load(str(tmp_path / "p.json"))
    assert read == GOOD
    assert torch.equal(read.of_layer(2), torch.tensor([0, 0, 0, 1], dtype=torch.int8))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "someone-else/1"},
        {"schema": None},
        {"num_experts": None},
        {"num_experts": "many"},
        {"num_experts": float("inf")},
        {"modality": {"0": [1, 0]}},
        {"modality": {"0": [2, 0, 0, 0]}},
        {"modality": {"zero": [0, 0, 0, 0]}},
        {"modality": [1, 2]},
    ],
    ids=str,
)
def test_foreign_or_damaged_profiles_are_refused_in_one_line(tmp_path, changes):
    with pytest.raises(MacsError) as caught:
        profile.load(write(tmp_path / "p.json", **changes))
    assert str(caught.value).startswith("--macs-profile: got") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00\x01"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(MacsError, match="--macs-profile"):
        profile.load(str(tmp_path / "p.json"))


def test_a_truncated_profile_and_a_missing_one_are_refused(tmp_path):
    path = tmp_path / "p.json"
    write(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(MacsError, match="truncated"):
        profile.load(str(path))
    with pytest.raises(MacsError, match="No such file"):
        profile.load(str(tmp_path / "absent.json"))


def test_a_profile_of_another_model_or_without_the_layer_is_refused():
    GOOD.check_model("Qwen3VLMoeForConditionalGeneration", 4)
    with pytest.raises(MacsError, match="Qwen3MoeForCausalLM"):
        GOOD.check_model("Qwen3MoeForCausalLM", 4)
    with pytest.raises(MacsError, match="8 experts"):
        GOOD.check_model("Qwen3VLMoeForConditionalGeneration", 8)
    with pytest.raises(MacsError, match="no layer 1"):
        GOOD.of_layer(1)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_raises_anything_but_a_macs_error(tmp_path_factory, data):
    """One value of a good profile replaced by junk, or its bytes cut or inserted; what is read can be used."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    profile.save(GOOD, str(path))
    raw = path.read_bytes()
    if data.draw(st.booleans()):
        whole = json.loads(raw)
        target = whole["modality"] if data.draw(st.booleans()) else whole
        target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JUNK)
        raw = json.dumps(whole).encode()
    else:
        at = data.draw(st.integers(0, len(raw)))
        raw = raw[:at] + data.draw(st.binary(max_size=12)) + raw[at + data.draw(st.integers(0, 40)) :]
    path.write_bytes(raw)
    try:
        read = profile.load(str(path))
    except MacsError as error:
        assert "\n" not in str(error).replace("\\n", "")
        return
    for layer in read.modality:
        assert read.of_layer(layer).shape == (read.num_experts,)


def test_a_nest_too_deep_for_the_parser_is_refused(tmp_path):
    (tmp_path / "p.json").write_text("[" * 100_000)
    with pytest.raises(MacsError):
        profile.load(str(tmp_path / "p.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"modality": {}},
        {"modality": {"-1": [0, 0, 0, 0]}},
        {"modality": {"01": [0, 0, 0, 0]}},
        {"modality": {"٣": [0, 0, 0, 0]}},
        {"modality": {"123456": [0, 0, 0, 0]}},
        {"modality": {"0": [0.9, 0, 0, 0]}},
        {"modality": {"0": [float("nan"), 0, 0, 0]}},
        {"modality": {"0": [True, 0, 0, 0]}},
        {"modality": {"0": ["1", 0, 0, 0]}},
        {"modality": {"0": "1000"}},
        {"modality": {"0": {"0": 1, "1": 1, "2": 1, "3": 1}}},
        {"num_experts": "4"},
        {"num_experts": 4.0},
        {"num_experts": 0, "modality": {"0": []}},
        {"num_experts": -4},
        {"architecture": 4},
        {"architecture": None},
        {"evidence": []},
        {"evidence": {"samples": 0.5, "rows": {}, "p_value": {}, "fingerprint": ""}},
        {"evidence": {"samples": 1, "rows": {"0": [[1]] * 4}, "p_value": {}, "fingerprint": ""}},
        {"evidence": {"samples": 1, "rows": {}, "p_value": {"0": [2.0] * 4}, "fingerprint": ""}},
        {"evidence": {"samples": 1, "rows": {}, "p_value": {}, "fingerprint": 4}},
    ],
    ids=str,
)
def test_values_of_another_type_or_size_are_refused_in_one_line(tmp_path, changes):
    with pytest.raises(MacsError) as caught:
        profile.load(write(tmp_path / "p.json", **changes))
    assert str(caught.value).startswith("--macs-profile: got") and str(caught.value).isprintable()


def test_a_number_of_thousands_of_digits_is_refused(tmp_path):
    path = tmp_path / "p.json"
    profile.save(GOOD, str(path))
    path.write_text(path.read_text().replace('"num_experts": 4', '"num_experts": ' + "4" * 5000))
    with pytest.raises(MacsError, match="--macs-profile"):
        profile.load(str(path))


@pytest.mark.parametrize("what", ["/dev/zero", "/", "", "a\0b", "fifo"])
def test_only_a_regular_file_is_read(tmp_path, what):
    if what == "fifo":
        os.mkfifo(tmp_path / "fifo")  # nobody writes: opening it must not wait
        what = str(tmp_path / "fifo")
    with pytest.raises(MacsError, match="--macs-profile"):
        profile.load(what)


def test_a_profile_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    profile.save(GOOD, str(path))
    before = path.read_bytes()
    with pytest.raises(MacsError, match="no layers"):
        profile.save(Profile("A", 4, {}), str(path))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MacsError, match="No space left"):
        profile.save(Profile("A", 4, {0: [0, 0, 0, 0]}), str(path))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_profile_goes_where_a_link_points_and_over_no_device(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "p.json")
    profile.save(GOOD, str(tmp_path / "link.json"))
    assert (tmp_path / "link.json").is_symlink() and profile.load(str(tmp_path / "p.json")) == GOOD
    for path in ("/dev/null", str(tmp_path), "/nowhere/p.json", ""):
        with pytest.raises(MacsError, match="--out"):
            profile.save(GOOD, path)
