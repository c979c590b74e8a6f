"""The tiny checkpoints: reproducible, in both layouts, with an unequal load, and nothing of the user's deleted."""

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.questions import QUESTIONS
from sglang_macs import tiny_models


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tiny_models.build_qwen3_vl_moe(tmp_path_factory.mktemp("vl") / "model", seed=3)


def test_same_seed_same_bits_and_another_seed_others(built, tmp_path):
    again = tiny_models.build_qwen3_vl_moe(tmp_path / "again", seed=3)
    other = tiny_models.build_qwen3_vl_moe(tmp_path / "other", seed=4)
    first, second, third = (load_file(p / "model.safetensors") for p in (built, again, other))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert not any(torch.equal(first[n], third[n]) for n in first if n.endswith(("proj", "proj.weight", "gate.weight")))


def test_twin_differs_only_in_the_layout_of_fused_experts(built):
    ours, theirs = (load_file(p / "model.safetensors") for p in (built, tiny_models.reference_path(built)))
    fused = [n for n in ours if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(fused) == 2 * 3
    assert ours[fused[0]].shape[0] == 16 and all(torch.equal(ours[n].transpose(1, 2), theirs[n]) for n in fused)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours.keys() - set(fused))


PARTS = {"internvl": "language_model.", "kimi_vl": "language_model.", "qwen3_omni": "thinker."}


@pytest.mark.parametrize("kind", PARTS)
def test_the_reference_of_a_family_is_a_part_of_it(tmp_path, kind):
    out = tiny_models.ensure(tmp_path / "InternVL3_5", kind)
    whole, part = (load_file(path / "model.safetensors") for path in (out, tiny_models.reference_path(out)))
    assert all(torch.equal(whole[PARTS[kind] + name], weight) for name, weight in part.items())
    assert len(whole) >= len(part) > 100


@pytest.mark.parametrize("kind", ["kimi_vl", "glm4v_moe", "deepseek_v3"])
def test_a_correction_bias_changes_the_selection_of_some_tokens_and_not_of_all(tmp_path, kind):
    weights = load_file(tiny_models.ensure(tmp_path / "m", kind) / "model.safetensors")
    gates = [name for name in weights if name.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    for name in gates:
        gate, bias = weights[name].float(), weights[name.replace("weight", "e_score_correction_bias")].float()
        tokens = torch.randn(500, gate.shape[1], generator=torch.Generator().manual_seed(0))
        scores = (tokens @ gate.T).sigmoid()
        chosen = [values.topk(4).indices.sort(dim=1).values for values in (scores, scores + bias)]
        assert 0.2 < (chosen[0] != chosen[1]).any(dim=1).float().mean() < 0.95


def test_kimi_vl_puts_as_many_tokens_as_its_pictures_have(tmp_path):
    from PIL import Image
    from transformers import AutoProcessor

    out = tiny_models.build_kimi_vl(tmp_path / "kimi-vl")
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    pictures = [Image.new("RGB", size) for size in ((640, 427), (60, 30))]
    features = processor(text="a<|media_pad|>b<|media_pad|>", images=pictures)
    rows, columns = features["image_grid_hws"][0].tolist()
    assert rows * columns <= 640 and features["image_grid_hws"][1].tolist() == [2, 4]
    assert features["pixel_values"].shape == (rows * columns + 8, 3, 14, 14)
    token = processor.tokenizer.convert_tokens_to_ids("<|media_pad|>")
    assert int((features["input_ids"] == token).sum()) == (rows * columns + 8) // 4


def test_norms_of_qwen3_5_are_one_as_sglang_and_transformers_read_them(tmp_path):
    """Most of its norms' weights are added to one; that of linear attention is not."""
    weights = load_file(tiny_models.build_qwen3_5_moe(tmp_path / "m") / "model.safetensors")
    norms = {name: set(weights[name].tolist()) for name in weights if name.endswith("norm.weight")}
    text = {name: values for name, values in norms.items() if "visual" not in name}
    ones = {name for name, values in text.items() if values == {1.0}}
    assert ones == {f"model.language_model.layers.{layer}.linear_attn.norm.weight" for layer in range(3)}
    assert len(text) == 3 + 2 * 4 + 2 + 1 and all(values == {0.0} for name, values in text.items() if name not in ones)


def test_layers_of_qwen3_5_are_those_that_sglang_reads(tmp_path):
    from sglang.srt.utils.hf_transformers_utils import get_config

    out = tiny_models.build_qwen3_5_moe(tmp_path / "m", layers=8)
    kinds = {name.split(".")[4] for name in load_file(out / "model.safetensors") if ".layers.3." in name}
    text = get_config(str(out), trust_remote_code=False).text_config
    assert text.full_attention_layer_ids == [3, 7] and "self_attn" in kinds and "linear_attn" not in kinds


def test_internvl_is_built_where_sglang_knows_it(tmp_path):
    with pytest.raises(ValueError, match="name must contain InternVL3_5, got"):
        tiny_models.build_internvl(tmp_path / "model")


def test_visual_tokens_load_the_first_half_of_the_experts(vl_reference):
    """Rows of rank 0 of two over the mean, per layer: 1.05 to 1.6 with a photograph; text alone is close to even."""
    routes = []
    gates = [m for name, m in vl_reference.model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _, __, out: routes.append(out[2])) for gate in gates]
    loads = {}
    for question in QUESTIONS:
        routes.clear()
        with torch.no_grad():
            vl_reference.model(**vl_reference._inputs(question))
        loads[question] = [(ids < 8).float().mean().item() * 2 for ids in routes]
    for hook in hooks:
        hook.remove()
    visual = torch.tensor([load for question, load in loads.items() if question.image])
    text = torch.tensor([load for question, load in loads.items() if not question.image])
    assert visual.shape[1] == 3 and 1.15 < visual.mean() < 1.5 and visual.min() > 1.0 and visual.max() < 1.6
    assert text.mean() < visual.mean() - 0.1


def test_fp8_blocks_hold_the_same_experts_to_an_eighth_bit(tmp_path):
    sizes = {"hidden": 256, "layers": 1, "intermediate": 128}
    plain = load_file(tiny_models.build_qwen3_moe(tmp_path / "plain", **sizes) / "model.safetensors")
    blocks = load_file(tiny_models.build_qwen3_moe(tmp_path / "fp8", fp8=True, **sizes) / "model.safetensors")
    quantised = [name for name, weight in blocks.items() if weight.dtype == torch.float8_e4m3fn]
    assert len(quantised) == 16 * 3
    for name in quantised:
        scale = blocks[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        error = (blocks[name].float() * scale - plain[name].float()).abs().max() / plain[name].float().abs().max()
        assert 0 < error < 2**-4
    assert all(torch.equal(plain[name], blocks[name]) for name in plain.keys() - set(quantised))


def test_copies_of_the_last_layer_are_found_under_their_own_names(tmp_path):
    out = tiny_models.build_qwen3_vl_moe(tmp_path / "deep", copies=2)
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    read = {name: load_file(out / place)[name] for name, place in places.items()}
    assert json.loads((out / "config.json").read_text())["text_config"]["num_hidden_layers"] == 5
    last = [name for name in read if ".layers.2." in name]
    assert len(last) > 8 and not any(".layers.5." in name for name in read)
    assert all(torch.equal(read[name], read[name.replace(".2.", f".{i}.")]) for name in last for i in (3, 4))
    assert read.keys() >= load_file(out / "model.safetensors").keys() and tiny_models.reference_path(out) == out


def test_ensure_builds_once_and_again_for_other_options(tmp_path):
    out = tiny_models.ensure(tmp_path / "m", "qwen3_moe", layers=1)
    weights = out / "model.safetensors"
    before = weights.stat().st_mtime_ns
    tiny_models.ensure(out, "qwen3_moe", layers=1)
    assert weights.stat().st_mtime_ns == before
    tiny_models.ensure(out, "qwen3_moe", layers=2)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "layers must be at least 3, got 2"),
        ({"hidden": 100}, "hidden must be a multiple of 64"),
        ({"num_experts": 15}, "num_experts must be even"),
        ({"top_k": 9}, "top_k at most half"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_models.build_qwen3_vl_moe(tmp_path / "m", **options)


def test_a_folder_without_a_checkpoint_is_never_cleared(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no checkpoint"):
        tiny_models.build_qwen3_moe(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
