"""Profiles: what is read back is what was written, and nothing else is taken for a profile."""

import json

import pytest
import torch

from sglang_macs import profile
from sglang_macs.errors import MacsError
from sglang_macs.profile import Profile

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
