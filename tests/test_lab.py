"""The model lab: its model is transformers', its tasks are what they say, its statistics are paired."""

import json
from dataclasses import replace

import pytest
import torch

from lab import (
    lab_cases,
    lab_checkpoint,
    lab_layers,
    lab_material,
    lab_methods,
    lab_muon,
    lab_statistics,
    lab_tokens,
    lab_trainer,
    plot,
    train,
)
from lab.lab_architecture import EXPERTS_BY, GLM, Architecture
from lab.lab_judge import RANKS, as_batch, by_task, exact
from lab.lab_model import LabModel, initialise
from lab.lab_pictures import COLOURS
from lab.lab_tasks import JUDGED, MAX_SLOTS, NO_LABEL, TASKS, TRAIN_MIX, Maker

CHECKPOINT = lab_checkpoint.CHECKPOINT
TRAINED = (CHECKPOINT / "model.safetensors").exists()
SMALL = {"text": {"copy": 2, "add": 2}, "wide": {"read": 2}, "square": {"where": 2}, "large": {"scene": 1}}


@pytest.fixture(scope="module")
def words():
    return lab_tokens.Vocabulary(CHECKPOINT / "tokenizer.json")


@pytest.fixture(scope="module")
def make(words):
    return Maker(words, lab_material.load("held_out"), "held_out")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The committed checkpoint; random weights in its place prove the same about the architecture."""
    if TRAINED:
        return CHECKPOINT
    out = tmp_path_factory.mktemp("lab")
    for file in CHECKPOINT.glob("*.json*"):
        (out / file.name).write_bytes(file.read_bytes())
    (out / "chat_template.jinja").write_bytes((CHECKPOINT / "chat_template.jinja").read_bytes())
    model = LabModel(Architecture())
    initialise(model, 0)
    lab_checkpoint.save_weights(model, out)
    return out


@pytest.fixture(scope="module")
def model(checkpoint):
    return lab_checkpoint.load(checkpoint)


def groups_of(make, mix, seed=0):
    torch.manual_seed(seed)
    return make.batch(mix)


@torch.no_grad()
def test_logits_are_transformers(checkpoint, model, make, tmp_path):
    """Vision tower, deepstack, M-RoPE, routing and experts, on pictures of every shape, through HF's own processor."""
    from PIL import Image

    from sglang_macs.cpu_compat import allow_torchvision

    allow_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    twin = lab_checkpoint.twin(checkpoint, tmp_path / "twin")
    reference = AutoModelForImageTextToText.from_pretrained(twin, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(twin)
    groups = groups_of(make, SMALL)
    logits, _ = model([as_batch(g) for g in groups])
    for group, ours in zip(groups, logits, strict=True):
        for row in range(len(group.ids)):
            ids = group.ids[row, : group.length[row]]
            text = make.words.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            image = None
            if group.pictures is not None:
                text = text.replace("<|image_pad|>" * group.size.tokens, "<|image_pad|>")
                image = [Image.fromarray(group.pictures[row].permute(1, 2, 0).byte().numpy())]
            inputs = processor(text=[text], images=image, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == ids.tolist()
            theirs = reference(**inputs).logits[0]
            torch.testing.assert_close(ours[row, : len(ids)], theirs, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_all_ways_of_running_experts_agree(model, make):
    """Also where slots are empty, and where padding goes through expert 0."""
    batch = [as_batch(g) for g in groups_of(make, {"text": {"lookup": 3}, "tiny": {"map": 2}})]
    outputs = []
    for model.experts_by in EXPERTS_BY:
        outputs.append(model(batch, lambda r: (r.ids.masked_fill(r.ids == 5, -1), r.weights))[0])
    model.experts_by = "dense"
    for other in outputs[1:]:
        for group, one, two in zip(batch, outputs[0], other, strict=True):
            for row, length in enumerate(group.length.tolist()):
                torch.testing.assert_close(one[row, :length], two[row, :length], rtol=1e-4, atol=1e-4)


def test_grouped_experts_have_the_gradients_of_dense_ones():
    train.check_grouped(replace(Architecture(), experts=8), torch.device("cpu"), torch.float32)
    broken = lab_layers.Permute.backward
    try:
        lab_layers.Permute.backward = staticmethod(lambda ctx, grad: (grad, None, None))
        with pytest.raises(SystemExit, match="differ"):
            train.check_grouped(replace(Architecture(), experts=8), torch.device("cpu"), torch.float32)
    finally:
        lab_layers.Permute.backward = broken


def test_muons_step_is_orthogonal_and_as_large_as_adamws():
    """Of a matrix, a stack of them and a convolution, in one step; the rate may be a tensor, as in a CUDA graph."""
    torch.manual_seed(0)
    shapes = ((48, 32), (32, 48), (5, 48, 32), (64, 3, 2, 4, 4))
    for rate in (0.01, torch.tensor(0.01)):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3  # the step does not depend on the gradient's scale
        lab_muon.Muon(params, rate, weight_decay=0.0).step()
        for old, new in zip(before, params, strict=True):
            step = lab_muon._as_matrices((old - new).detach()) / 0.01
            assert 0.1 < step.square().mean() ** 0.5 < 0.25
            values = torch.linalg.svdvals(step) / (0.2 * max(step.shape[1:]) ** 0.5)
            assert values.min() > 0.5 and values.max() < 1.3


def test_every_weight_is_stepped_by_one_optimiser():
    model = LabModel(replace(Architecture(), family=GLM, layers=2, dense=1, shared=64))
    for kind in ("muon", "adamw"):
        optimizers = lab_trainer.optimizers_of(model, 1e-3, kind, torch.device("cpu"))
        stepped = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
        assert sorted(stepped) == sorted(id(p) for p in model.parameters())


@torch.no_grad()
def test_attention_received_is_what_later_tokens_pay(make):
    """Each token's attention to itself and before it sums to 1; what padding pays does not count."""
    model = LabModel(replace(Architecture(), layers=1))
    initialise(model, 0)
    model.records_attention = True
    (group,) = groups_of(make, {"text": {"lookup": 3}})
    _, (routing,) = model([as_batch(group)])
    received = routing.received.view(group.ids.shape)
    for row, length in zip(received, group.length.tolist(), strict=True):
        assert 0 < row.sum() < length and row[0] > row[1:length].mean()  # the first token is seen by all
        assert (row[length - 1 :] == 0).all()


@torch.no_grad()
def test_the_seam_decides_what_the_experts_see(model, make):
    batch = [as_batch(g) for g in groups_of(make, {"text": {"lookup": 3}})]
    plain, routings = model(batch)
    same, _ = model(batch, lambda r: (r.ids, r.weights))
    nothing, _ = model(batch, lambda r: (torch.full_like(r.ids, -1), r.weights))
    assert torch.equal(plain[0], same[0]) and len(routings) == model.arch.layers
    assert not torch.allclose(plain[0], nothing[0], atol=0.1)


def test_all_prompts_are_what_the_tokenizer_makes_of_their_text(make):
    """So that a server, which sees text, gets the very tokens that the model was trained on."""
    for group in [*groups_of(make, TRAIN_MIX), *groups_of(make, JUDGED)]:
        for row, length in zip(group.ids, group.length.tolist(), strict=True):
            text = make.words.tokenizer.decode(row[:length].tolist(), skip_special_tokens=False)
            assert make.words.tokenizer.encode(text).ids == row[:length].tolist()
            assert (row[length:] == lab_tokens.PAD).all()


def answer_of(asked, row: int, words) -> str:
    return words.text(asked.answer[row])


@pytest.mark.parametrize("task", ["read", "count", "count_colour", "colour", "where", "compare", "describe"])
def test_answers_follow_from_the_picture(task, make, words):
    """Each answer worked out again from the scene, by plain loops."""
    torch.manual_seed(3)
    asked = TASKS[task](make, 40, "square")
    scene, colours = asked.scene, list(COLOURS)
    for i in range(40):
        question = words.text(asked.question[i])
        on = [j for j in range(MAX_SLOTS) if scene.on[i, j]]
        digit = {j: int(scene.digit[i, j]) for j in on}
        if task == "read":
            expected = "".join(str(digit[j]) for j in sorted(on, key=lambda j: int(scene.column[i, j])))
        elif task == "count":
            expected = str(len(on))
        elif task == "count_colour":
            colour = question.rstrip("?").split()[-1]
            expected = str(sum(colours[int(scene.colour[i, j])] == colour for j in on))
        elif task == "describe":
            order = sorted(on, key=lambda j: (int(scene.row[i, j]), int(scene.column[i, j])))
            expected = "".join(f"{digit[j]}{colours[int(scene.colour[i, j])]}" for j in order)
        elif task == "compare":
            expected = (
                "left" if digit[min(on, key=lambda j: int(scene.column[i, j]))] == max(digit.values()) else "right"
            )
        else:
            wanted = int(question.rstrip("?").split()[-1])
            (j,) = [j for j in on if digit[j] == wanted]
            if task == "colour":
                expected = colours[int(scene.colour[i, j])]
            else:
                expected = ("top", "bottom")[int(scene.row[i, j]) >= 2] + (" left", " right")[
                    int(scene.column[i, j]) >= 2
                ]
        assert answer_of(asked, i, words) == expected


@pytest.mark.parametrize("task", ["add", "copy", "lookup", "recall"])
def test_answers_follow_from_the_text(task, make, words):
    torch.manual_seed(4)
    asked = TASKS[task](make, 40, "text")
    for i in range(40):
        question = words.text(asked.question[i])
        if task == "add":
            a, b = question.removeprefix("What is ").rstrip("?").split("+")
            expected = str(int(a) + int(b))
        elif task == "copy":
            expected = question.removeprefix("Copy ").rstrip(".")
        else:
            table, wanted = question.removeprefix("Given ").split(". What is " if task == "lookup" else ". List ")
            digits = {pair[0]: pair[1] for pair in table.split()}
            names = wanted.rstrip("?.").split()
            expected = (
                digits[names[0]] if task == "lookup" else "".join(f" {letter}{digits[letter]}" for letter in names)
            )
        assert answer_of(asked, i, words) == expected


def turns_of(group, row: int, words) -> list[tuple[str, str]]:
    """(question, answer) of every turn, as text."""
    text = words.tokenizer.decode(group.ids[row, : group.length[row]].tolist(), skip_special_tokens=False)
    for mark in ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"):
        text = text.replace(mark, "")
    parts = text.split("<|im_start|>")[1:]
    said = [part.split("\n", 1)[1].removesuffix("\n").removesuffix("<|im_end|>") for part in parts]
    return list(zip(said[::2], said[1::2], strict=True))


def test_turns_of_a_talk_agree_and_are_all_labelled(make, words):
    """A talk is a table or a scene: what different turns say of it never contradicts."""
    (pictures,) = groups_of(make, {"square": {"talk": 30}}, seed=8)
    kinds, orders = set(), set()
    for row in range(30):
        turns = turns_of(pictures, row, words)
        labels = pictures.labels[row]
        labelled = words.text(labels[labels != NO_LABEL])
        assert labelled == "".join(answer for _, answer in turns)
        assert len(turns) == len({q for q, _ in turns if "colour is" in q}) * 2 + 4
        told = dict(turns)
        count = int(told["How many digits?"])
        for question, answer in turns:
            if question.startswith("How many digits are"):
                colour = question.rstrip("?").split()[-1]
                seen = sum(a == colour for q, a in turns if q.startswith("What colour"))
                assert seen <= int(answer) <= count - (min(count, 3) - seen)
        kinds |= {q.split()[0] for q, _ in turns}
        orders.add(turns[0][0].split()[0])
    assert kinds == {"How", "What", "Where"} and len(orders) == 3
    (tables,) = groups_of(make, {"text": {"lookup_talk": 30}}, seed=8)
    for row in range(30):
        (first, _), *_ = turns = turns_of(tables, row, words)
        pairs = {p[0]: p[1] for p in first.split(".")[0].removeprefix("Given ").split()}
        assert len(turns) == min(len(pairs), 6)
        for question, answer in turns:
            asked = question.split(". ")[-1].rstrip("?").split()[-1]
            assert answer == (pairs[asked] if asked in pairs else {d: c for c, d in pairs.items()}[asked])


def test_nothing_that_is_judged_was_trained_on(words, make):
    train = Maker(words, lab_material.load("train", variants=1), "train")
    assert not set(train.sums.tolist()) & set(make.sums.tolist())
    index = torch.arange(23)
    parts = [set(lab_material._part_of(index, part).tolist()) for part in ("train", "held_out")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(range(23))


def test_a_greedy_answer_is_right_only_if_every_token_is(make):
    (group,) = groups_of(make, {"text": {"copy": 4}})
    logits = torch.nn.functional.one_hot(group.labels.clamp(min=0), lab_tokens.VOCAB).float()
    assert exact(logits, group.labels).all()
    place = int((group.labels[1] != NO_LABEL).nonzero()[-1])
    logits[1, place] = 0
    logits[1, place, 0] = 1
    assert exact(logits, group.labels).tolist() == [True, False, True, True]
    assert by_task([group], [exact(logits, group.labels)]) == {"copy/text": [True, False, True, True]}


def test_the_layout_plans_prompts_and_nothing_else(make):
    groups = groups_of(make, SMALL)
    layout = lab_cases.lay_out(groups, RANKS)
    assert len(layout.tokens) == len(set(layout.tokens.tolist())) == sum(int(g.prompt.sum()) for g in groups)
    assert sum(layout.sizes) == len(layout.tokens) and len(layout.sizes) == RANKS
    flat = torch.cat([g.ids.flatten() for g in groups])[layout.tokens]
    assert torch.equal(layout.segment >= 0, flat == lab_tokens.IMAGE)


def test_a_model_that_answers_nothing_has_nothing_to_lose():
    """A smoke run's: its file must be JSON, which has no NaN."""
    statistics = lab_statistics.Statistics([0, 1], ["x", "x"], [{"a": 0}] * 2, [{"a": 5}] * 2)
    summary = statistics.summary([{"a": 0}] * 2, reference=[{"a": 0}] * 2)
    assert summary["kept"] == [1.0] * 3
    json.dumps(summary, allow_nan=False)


def test_statistics_are_paired():
    asked = [{"a": 10, "b": 10, "unlearned": 10}] * 6
    base = [{"a": 10 - i % 2, "b": 10, "unlearned": 2} for i in range(6)]
    statistics = lab_statistics.Statistics([0, 0, 1, 1, 2, 2], ["x", "y"] * 3, base, asked)
    same = statistics.summary(base)
    assert same["kept"] == [1.0, 1.0, 1.0] and same["accuracy"]["a"][0] == 0.95
    fewer = [
        {"a": row["a"], "b": row["b"] - 2, "unlearned": 0} for row in base
    ]  # what was never learned counts nowhere
    worse = statistics.summary(fewer, reference=base)
    assert worse["kept"][0] == round((0.95 + 0.8) / (0.95 + 1.0), 5)
    assert worse["kept_more_than_default"][0] < 0 and worse["kept_more_than_default"][2] < 0


def test_a_ratio_of_divergences_is_paired_and_has_its_interval():
    """Batches differ by a thousand times, but the one method has twice the other's divergence in each of them."""
    rows = [{"a": 1}] * 6
    statistics = lab_statistics.Statistics([0] * 6, ["m"] * 6, rows, rows)
    reference = [1e-6, 3e-5, 2e-4, 1e-3, 0.0, 5e-4]
    assert statistics.kl_ratio([2 * x for x in reference], reference) == pytest.approx([2.0, 2.0, 2.0])
    ratio, low, high = statistics.kl_ratio([3e-4] * 6, reference)
    assert low < ratio < high and ratio == pytest.approx(1.04, abs=0.01)
    assert statistics.kl_ratio([0.0] * 6, [0.0] * 6) == [0.0, 0.0, 0.0]
    table = [
        {"method": "twice", "kl_over_default": [2.0, 1.9, 2.1], "kept_more_than_default": [-0.1, -0.2, -0.05]},
        {"method": "less", "kl_over_default": [0.8, 0.6, 0.95], "kept_more_than_default": [0.0, -0.1, 0.1]},
        {"method": "gate"},
    ]
    assert plot._beyond(table, "kl_over_default", 1.0) == ("`twice`", "`less`")
    assert plot._beyond(table, "kept_more_than_default", 0.0) == ("none", "`twice`")


@torch.no_grad()
def test_shards_put_together_are_one_run(model, make):
    """Cases shared out give the figures that one process gives, times and intervals' draws apart; through JSON."""
    mixes = {"small": {"text": {"copy": 4}, "wide": {"read": 6}}}
    model.experts_by = "loop"
    plans = [(method, 1.0) for method in lab_methods.methods({}) if method.name in ("gate", "cai", "random")]
    course = lab_cases.Course(model, make, mixes, torch.float32, (0, 1))
    parts = {"main": lab_cases.Part(1, plans), "again": lab_cases.Part(1, plans[:1])}
    work = lab_cases.work_of(course, parts)
    assert [name for name, _ in work[:2]] == ["main", "again"] and len(work) == 4

    def figures(shares: list[list]) -> list[dict]:
        found = [lab_cases.run_work(course, parts, share, lambda _: None) for share in shares]
        shards = [{"findings": {k: json.loads(json.dumps(f.to_json())) for k, f in each.items()}} for each in found]
        rows = lab_statistics.merged(shards)["main"]["rows"]
        own = ("milliseconds_per_layer", "accuracy", "score", "kept", "kept_more_than_default")
        keep = [{k: v for k, v in row.items() if k not in own} for row in rows]
        return sorted(keep, key=lambda row: (row["bound"] or 0, row["method"]))

    one, two = figures([work]), figures([lab_cases.share_of(work, i, 2) for i in range(2)])
    model.experts_by = "dense"
    assert one == two and len(one) == 4
    assert max(row["share"]["clipped"] for row in one) > 0


@pytest.mark.parametrize("workers", [2, 3])
def test_every_worker_gets_its_share_of_every_part(workers):
    """Parts cost differently: whoever had all of the costly ones would be last by far."""
    parts = {name: lab_cases.Part(1, []) for name in ("main", "stress", "sweeps", "importance")}
    work = lab_cases.work_of(
        lab_cases.Course(None, None, {"a": {}, "b": {}, "c": {}}, torch.float32, (0, 1, 2), 0.0), parts
    )
    shares = [lab_cases.share_of(work, i, workers) for i in range(workers)]
    assert sorted(x for share in shares for x in share) == sorted(work)
    for name in parts:
        counts = [sum(part == name for part, _ in share) for share in shares]
        assert max(counts) - min(counts) <= 1, (name, counts)


def test_a_run_that_is_out_of_time_keeps_what_it_has(model, make):
    course, kept = lab_cases.Course(model, make, {"small": {"text": {"copy": 2}}}, torch.float32, (0, 1, 2), 0.0), []
    parts = {"main": lab_cases.Part(1, [])}
    with torch.no_grad():
        found = lab_cases.run_work(course, parts, lab_cases.work_of(course, parts), kept.append)
    assert not found["main"].seeds and not kept
    assert "main" not in lab_statistics.merged([{"findings": {"main": found["main"].to_json()}}])


@torch.no_grad()
def test_a_part_that_fails_costs_no_other(model, make, capsys):
    """What it had found counts, a case that it had begun does not; the run is red in the end."""
    course, kept = lab_cases.Course(model, make, {"small": {"text": {"copy": 2}}}, torch.float32, (0, 1, 2)), []
    decided = []

    def fails(given, bound):
        decided.append(given.layer)
        if len(decided) > 8:  # in the second case
            raise RuntimeError("no such operator")
        return lab_methods.keep_all(given, bound)

    part = lab_cases.Part(1, [(lab_methods.Method("m", fails, acts_above_bound_only=False), 1.0)])
    parts = {"main": lab_cases.Part(1, []), "bad": part}
    with pytest.raises(SystemExit, match="bad"):
        lab_cases.run_work(course, parts, lab_cases.work_of(course, parts), kept.append)
    found = kept[-1]
    assert len(found["main"].seeds) == 3 and len(found["bad"].seeds) == 1
    assert all(len(tally.kl) == 1 for tally in found["bad"].tallies.values())
    assert "no such operator" in capsys.readouterr().err


@pytest.mark.skipif(not TRAINED, reason="no trained checkpoint here")
@torch.no_grad()
def test_the_committed_checkpoint_answers(model, make):
    """Eight tasks on digits it has never seen; docs/results/quality.md has the full figures."""
    mix = {"text": {"copy": 20, "lookup": 20}, "wide": {"read": 40, "compare": 20}}
    mix["square"] = {"colour": 20, "where": 20, "count_colour": 20}
    groups = groups_of(make, {**mix, "large": {"scene": 10}}, seed=11)
    logits, _ = model([as_batch(g) for g in groups])
    right = by_task(groups, [exact(x, g.labels) for x, g in zip(logits, groups, strict=True)])
    for name, rows in right.items():
        assert sum(rows) >= 0.85 * len(rows), (name, sum(rows), len(rows))
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 12e6
