"""The lab of documents: answers follow from what is shown, nothing judged was trained on, logits are transformers'."""

import ast
import json
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from lab import (
    lab_canvas,
    lab_cases,
    lab_checkpoint,
    lab_documents,
    lab_entropy,
    lab_judge,
    lab_methods,
    lab_sample,
    lab_stock,
    lab_trainer,
)
from lab.lab_architecture import LAYOUTS
from lab.lab_documents import TASKS, TEXT_ROOM, TRAIN_MIX
from lab.lab_model import LabModel, initialise
from lab.lab_sample import HELD_OUT, SIZES, TRAIN, Dice, part_of
from lab.lab_suites import DOCUMENTS_SMALL, SUITES
from lab.lab_tasks import NO_LABEL
from lab.lab_tokens import IMAGE, PAD, VISION_END, VISION_START, document_tokenizer

SIZE_OF = {task: size for size, tasks in reversed(TRAIN_MIX.items()) for task in tasks}  # where each is first asked
MODALITY = {layer: torch.tensor([1] * 8 + [0] * 16 + [-1] * 8, dtype=torch.int8) for layer in (1, 2, 3)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    document_tokenizer().save(str(path))
    return path


@pytest.fixture(scope="module")
def makers(tokenizer):
    """Of held-out and of training samples."""
    return lab_documents.makers(tokenizer)


@pytest.fixture(scope="module")
def model():
    """Random weights, uneven biases."""
    made = LabModel(DOCUMENTS_SMALL)
    initialise(made, 0)
    generator = torch.Generator().manual_seed(1)
    for layer in made.arch.moe_layers:
        made.moe(layer).gate.e_score_correction_bias.copy_(0.05 * torch.randn(32, generator=generator))
    made.experts_by = "loop"
    return made.eval()


def samples(task: str, count: int, part: str = HELD_OUT, seed: int = 3):
    dice = Dice(seed, part)
    return [dice.make(TASKS[task], SIZE_OF[task]) for _ in range(count)]


# -- answers, worked out again from the content ---------------------------------------------------------------------


def split(content: tuple, kind: type) -> list:
    return [x for x in content if type(x) is kind]


@pytest.mark.parametrize("task", ["bar_value", "bar_extreme", "pie_extreme"])
def test_answers_follow_from_the_chart(task):
    for sample in samples(task, 20):
        words = split(sample.content, str)
        values = split(sample.content, float if task == "pie_extreme" else int)
        of = dict(zip(words, values, strict=False))
        colour_of = dict(zip(of, words[len(of) :], strict=False))
        for question, answer in sample.turns:
            asked = question.rstrip("?").split()[-1]
            if asked in ("highest", "largest"):
                assert of[answer] == max(of.values())
            elif asked in ("lowest", "smallest"):
                assert of[answer] == min(of.values())
            elif question.startswith("What colour"):
                assert colour_of[asked] == answer
            else:
                assert str(of[asked]) == answer


def test_lines_and_tables_are_read_at_row_and_column():
    for sample in samples("line_value", 20):
        places, values = split(sample.content, int)[:-1], ast.literal_eval(sample.content[-1])
        for question, answer in sample.turns:
            colour, place = re.fullmatch(r"What is (\w+) at (\d+)\?", question).groups()
            assert answer == str(values[colour][places.index(int(place))])
    for task in ("table_cell", "table_extreme"):
        for sample in samples(task, 20):
            *words, cells = sample.content
            cells = ast.literal_eval(cells)
            rows, columns = words[: len(cells)], words[len(cells) :]
            for question, answer in sample.turns:
                if task == "table_cell":
                    column, row = re.fullmatch(r"What is (\w+) of (\w+)\?", question).groups()
                    assert answer == str(cells[rows.index(row)][columns.index(column)])
                else:
                    numbers = [row[columns.index(question.rstrip("?").split()[-1])] for row in cells]
                    assert numbers[rows.index(answer)] == max(numbers) and numbers.count(max(numbers)) == 1


def test_pages_forms_and_words_are_read_as_written():
    for sample in samples("read_line", 10):
        lines = ast.literal_eval(sample.content[0])
        for question, answer in sample.turns:
            line = lines[int(re.search(r"\d+", question)[0]) - 1]
            assert answer == " ".join(line[:2] if "begin" in question else line[-2:])
    for sample in samples("next_word", 10):
        lines = ast.literal_eval(sample.content[0])
        after = {a: b for line in lines for a, b in pairwise(line)}
        assert all(after[q.rstrip("?").split()[-1]] == a for q, a in sample.turns)
    for sample in samples("form_field", 10):
        filled = ast.literal_eval(sample.content[0])
        assert all(filled[q.rstrip("?").split()[-1]] == a for q, a in sample.turns)
    assert all(s.turns == (("Read the word.", s.content[0]),) for s in samples("read_word", 10))


def test_what_is_counted_is_there():
    def total(shapes, what: str) -> int:
        return sum(what in ("shapes", kind, f"{colour} shapes") for kind, colour, _ in shapes)

    for sample in samples("count", 20):
        for question, answer in sample.turns:
            assert int(answer) == total(sample.content, question.removeprefix("How many ").rstrip("?"))
    for size in ("pair", "trio"):
        dice = Dice(5, HELD_OUT)
        for sample in [dice.make(TASKS["more"], size) for _ in range(20)]:
            counts = dict(zip(("first", "second", "third"), map(len, sample.content), strict=False))
            assert len(counts) == SIZES[size].pictures
            for question, answer in sample.turns:
                if question.startswith("How many"):
                    assert counts[question.split()[-2]] == int(answer)
                else:
                    assert [k for k, v in counts.items() if v == max(counts.values())] == [answer]


def test_pictures_are_told_apart_by_what_they_show():
    ordinals = ("first", "second", "third")
    for sample in samples("which_shows", 10):
        of_picture = {word: ordinals[i // 3] for i, word in enumerate(sample.content)}
        assert all(of_picture[q.rstrip("?").split()[-1]] == a for q, a in sample.turns)
    for sample in samples("compare_bars", 10):
        *labels, values = sample.content
        for question, answer in sample.turns:
            bars = [chart[labels.index(question.rstrip("?").split()[-1])] for chart in ast.literal_eval(values)]
            assert bars[ordinals.index(answer)] == max(bars) and bars.count(max(bars)) == 1


@pytest.mark.parametrize("task", ["copy", "lookup", "chain", "maximum"])
def test_answers_follow_from_the_text(task):
    for sample in samples(task, 20):
        (told,) = sample.content
        if task == "copy":
            assert sample.turns == ((f"Copy {told}.", told),)
            continue
        assert sample.turns[0][0].startswith(f"Given {told}. ")
        for question, answer in sample.turns:
            asked = question.rstrip("?").split()[-1]
            if task == "maximum":
                assert int(answer) == (max if asked == "largest" else min)(map(int, told.split(", ")))
            else:
                of = dict(re.split(" is | ", pair, maxsplit=1) for pair in told.split(", "))
                value = of[asked]
                while not value.isdigit():
                    value = of[value]
                assert value == answer


# -- parts, pictures, rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_nothing_that_is_judged_was_trained_on(task):
    """By words, each of which belongs to one part, and by contents."""
    held, trained = (samples(task, 40, part, seed=9) for part in (HELD_OUT, TRAIN))
    assert all(part_of(s.content) == HELD_OUT for s in held) and all(part_of(s.content) == TRAIN for s in trained)
    assert not {repr(s.content) for s in held} & {repr(s.content) for s in trained}
    dice = {part: Dice(1, part) for part in (HELD_OUT, TRAIN)}
    words = [{dice[part].word() for _ in range(500)} for part in dice]
    assert not words[0] & words[1] and min(map(len, words)) > 100


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_sample_and_picture_of_the_right_size(task):
    (one,), (again,) = samples(task, 1), samples(task, 1)
    assert one.turns == again.turns and one.content == again.content
    size = SIZES[SIZE_OF[task]]
    if size is None:
        assert one.draw() == []
        return
    pictures = lab_documents.pixels(one)
    assert pictures.shape == (size.pictures, 3, size.height, size.width) and pictures.dtype == np.uint8
    assert np.array_equal(pictures, lab_documents.pixels(one)) and np.array_equal(pictures, lab_documents.pixels(again))
    assert all(p.std() > 5 for p in pictures)  # something is to be seen


def test_text_is_drawn_where_it_is_put_and_as_wide_as_is_told():
    canvas = lab_canvas.Canvas(120, 40)
    canvas.text(20, 20, "kolme", "DejaVuSans", 14)
    dark = np.argwhere(canvas.picture().min(0) < 128)
    (top, left), (bottom, right) = dark.min(0), dark.max(0)
    width = lab_canvas.text_width("kolme", "DejaVuSans", 14)
    assert abs(left - 20) <= 2 and abs(right - (20 + width)) <= 3 and top < 20 < bottom and bottom - top < 14


@pytest.mark.parametrize("part", [0, 1])
def test_all_prompts_are_what_the_tokenizer_makes_of_their_text(makers, part):
    """So that a server, which sees text, gets the very tokens that the model was trained on; within a row's room."""
    make = makers[part]
    for name, tasks in TRAIN_MIX.items():
        for sample in make.samples(name, dict.fromkeys(tasks, 2), seed=4):
            row = make.row(sample, name)
            text = make.words.tokenizer.decode(row.ids, skip_special_tokens=False)
            assert make.words.tokenizer.encode(text).ids == row.ids
            assert len(row.ids) <= lab_documents.width_of(name)
            size = SIZES[name]
            assert row.ids.count(IMAGE) == (0 if size is None else size.pictures * size.tokens)
            said = make.words.tokenizer.decode([x for x in row.labels if x != NO_LABEL])
            kept = sample.turns[: 1 if part == 0 else row.labels.count(2)]  # an answer ends with token 2
            assert said == "".join(answer for _, answer in kept) and kept


def test_a_batch_has_its_pictures_beside_its_rows(makers):
    torch.manual_seed(0)
    held, _ = makers
    text, trio = held.batch({"text": {"copy": 2}, "trio": {"more": 2, "which_shows": 1}})
    assert text.pictures is None and trio.pictures.shape == (9, 3, 96, 128)
    assert (trio.ids[:, 3] == VISION_START).all() and (trio.ids[:, 4 + 48] == VISION_END).all()
    assert all((row[length:] == PAD).all() for row, length in zip(trio.ids, trio.length, strict=True))
    assert lab_judge.by_task([trio], [torch.tensor([True, False, True])]) == {
        "more/trio": [True, False],
        "which_shows/trio": [True],
    }
    torch.manual_seed(0)
    assert torch.equal(held.batch({"text": {"copy": 2}})[0].ids, text.ids)


def test_a_ring_gives_rows_that_were_drawn_and_forgets_the_oldest(makers, tmp_path):
    mix = {"plate": {"count": 2, "read_word": 1}}
    stock, rows = lab_stock.Stock(mix, 4, tmp_path, torch.device("cpu")), set()
    for turn in range(4):  # of 2 batches each: two more than fit
        drawn = lab_stock.draw(makers[1], "plate", mix["plate"], seed=turn)
        np.savez(tmp_path / f"plate-0-{turn}.npz", **drawn)
        if turn >= 2:
            rows |= {tuple(r) for r in drawn["ids"].tolist()}
    assert stock.refill(2) == 1 and float(stock.rings["plate"].held) == 6  # files have two batches
    assert stock.refill(16) == 3 and not list(tmp_path.iterdir())
    assert stock.taken == 24 and float(stock.rings["plate"].held) == 12
    torch.manual_seed(0)
    seen = [tuple(r) for _ in range(40) for r in stock.batch()[0].ids.tolist()]
    assert set(seen) == rows
    (group,) = stock.batch()
    assert group.pictures.shape == (3, 3, 64, 128) and group.pictures.float().std() > 0


class Longest(Dice):
    """Words of six letters, and as many of everything as there can be."""

    def word(self, longest: int = 6) -> str:
        syllables = [
            self.choice(lab_sample.ONSETS) + self.choice(lab_sample.VOWELS) + self.choice("nrslt") for _ in "12"
        ]
        return "".join(syllables)[:longest]

    def randint(self, low: int, high: int) -> int:
        return high


@pytest.mark.parametrize("name", TEXT_ROOM)
def test_the_longest_question_fits_into_a_training_row(makers, name):
    """One that does not ends the process that draws it."""
    for task in TRAIN_MIX[name]:
        # Pictures that all show as many have none with the most: drawn as usual.
        dice = (Dice if task == "more" else Longest)(1, TRAIN)
        for _ in range(4):
            sample = TASKS[task](dice, name)
            first = [replace(sample, turns=(turn,)) for turn in sample.turns]
            rows = [makers[1].row(s, name) for s in (sample, *first)]
            lab_documents.padded(rows, lab_documents.width_of(name))


def test_a_stock_whose_worker_has_died_ends_the_training(tmp_path):
    stock = lab_stock.Stock({"plate": {"count": 2}}, 4, tmp_path, torch.device("cpu"))
    stock.workers = [
        subprocess.Popen([sys.executable, "-c", script]) for script in ("import time; time.sleep(60)", "exit(3)")
    ]
    try:
        stock.workers[1].wait()
        with pytest.raises(SystemExit, match="status 3"):
            stock.refill(10)
        with pytest.raises(SystemExit, match="status 3"):  # nor is a first filling waited for
            stock.fill(0.3, 60)
    finally:
        stock.end()
    assert stock.workers[0].wait() != 0


# -- model ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_transformers(model, tmp_path):
    """Tower, positions, partial M-RoPE, groups, biases and the shared expert, with one and more pictures."""
    from PIL import Image

    from sglang_macs.cpu_compat import allow_torchvision

    allow_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    lab_checkpoint.write_skeleton(tmp_path, model.arch)
    lab_checkpoint.save_weights(model, tmp_path)
    ours = lab_checkpoint.load(tmp_path)
    reference = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path)
    make, _ = lab_documents.makers(tmp_path / "tokenizer.json")
    torch.manual_seed(0)
    groups = make.batch({"text": {"chain": 2}, "plate": {"count": 1}, "sheet": {"table_cell": 1}, "trio": {"more": 2}})
    logits, _ = ours([lab_judge.as_batch(g) for g in groups])
    for group, out in zip(groups, logits, strict=True):
        for row in range(len(group.ids)):
            ids, images = group.ids[row, : group.length[row]], None
            text = make.words.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            if group.size is not None:
                count = group.size.pictures
                text = text.replace("<|image|>" * group.size.tokens, "<|image|>")
                shown = group.pictures[row * count : (row + 1) * count]
                images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in shown]
            inputs = processor(text=[text], images=images, return_tensors="pt")
            assert inputs["input_ids"][0].tolist() == ids.tolist()
            torch.testing.assert_close(out[row, : len(ids)], reference(**inputs).logits[0], rtol=1e-3, atol=1e-3)


def test_weights_come_in_parts_and_back(model, monkeypatch, tmp_path):
    """The bound on a part is what lets the large model come back from a GPU machine, file by file."""
    monkeypatch.setattr(lab_checkpoint, "SHARD", 600_000)
    lab_checkpoint.write_architecture(tmp_path, model.arch)
    lab_checkpoint.save_weights(model, tmp_path)
    parts = list(tmp_path.glob("model-0*.safetensors"))
    assert len(parts) > 3 and all(p.stat().st_size < 650_000 for p in parts)
    again = lab_checkpoint.load(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        exact = tensor if name.endswith("correction_bias") else tensor.bfloat16().float()
        assert torch.equal(again[name], exact), name


def test_the_router_chooses_by_score_and_bias_within_the_best_groups(model):
    """Worked out again token by token; weights are of the scores alone."""
    gate, arch = model.moe(1).gate, model.arch
    x = torch.randn(20, arch.hidden, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits, ids, weights = gate(x)
    per_group = arch.experts // arch.groups
    for token in range(20):
        score = [1 / (1 + math.exp(-v)) for v in logits[token].tolist()]
        biased = [s + b for s, b in zip(score, gate.e_score_correction_bias.tolist(), strict=True)]
        best = [sum(sorted(biased[g * per_group : (g + 1) * per_group])[-2:]) for g in range(arch.groups)]
        kept = sorted(range(arch.groups), key=best.__getitem__)[-arch.topk_groups :]
        allowed = [e for e in range(arch.experts) if e // per_group in kept]
        chosen = sorted(allowed, key=biased.__getitem__)[-arch.top_k :]
        assert sorted(ids[token].tolist()) == sorted(chosen)
        total = sum(score[e] for e in chosen)
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            assert weight == pytest.approx(arch.scaling * score[expert] / total, rel=1e-4)


def test_biases_move_against_the_load_and_rest_within_the_band(model):
    routing = lab_cases.Routing(1, *[torch.zeros(8, 1)] * 2, torch.zeros(8, 4, dtype=torch.long), *[torch.zeros(8)] * 2)
    rows = [0] * 2 + [1] * 16 + [2] * 12 + list(range(3, 32)) * 1
    ids = torch.tensor((rows + [2] * 60)[: 4 * 16]).view(16, 4)
    before = model.moe(1).gate.e_score_correction_bias.clone()
    lab_trainer.move_biases(model, [replace(routing, ids=ids)])
    moved = model.moe(1).gate.e_score_correction_bias - before
    model.moe(1).gate.e_score_correction_bias.copy_(before)
    load = torch.bincount(ids.flatten(), minlength=32) / (ids.numel() / 32)
    low, high = lab_trainer.BIAS_BAND
    expected = torch.where(load > high, -1.0, torch.where(load < low, 1.0, 0.0)) * lab_trainer.BIAS_STEP
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)
    assert {-1.0, 0.0, 1.0} == set((expected / lab_trainer.BIAS_STEP).round().tolist())


def test_a_step_learns_and_a_saved_state_goes_on_as_if_nothing_had_happened(makers, tmp_path):
    """A few steps on one batch: its loss falls; and resumed from the disk they give the same weights."""
    torch.manual_seed(0)
    batch = makers[1].batch({"text": {"maximum": 3}, "plate": {"count": 2}})

    def trainer(seed: int) -> lab_trainer.Trainer:
        place, dtype = torch.device("cpu"), torch.float32
        return lab_trainer.Trainer(DOCUMENTS_SMALL, lambda: batch, place, 2e-3, seed, dtype, "loop", warmup=1)

    first = trainer(1)
    losses = []
    for step in range(8):
        if step == 5:
            first.save(tmp_path / "state.pt", step, 12.5, [{"step": 3}])
        first.step()
        losses.append(float(first.figures[0]))
    assert losses[-1] < 0.8 * losses[0]
    second = trainer(2)
    assert second.restore(tmp_path / "state.pt") == (5, 12.5, [{"step": 3}])
    for _ in range(3):
        second.step()
    for name, weight in second.model.state_dict().items():
        torch.testing.assert_close(weight, first.model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda s: s.name)
def test_positions_of_the_training_layout_outlast_those_that_are_judged(suite):
    """A CUDA graph of the step reads them where they were: were they forgotten, it would read whatever came there."""
    judged = sum(suite.repeats[size] for size in suite.train) + 2  # train.held_out_batches
    assert judged + 1 < LAYOUTS


# -- methods --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def course(model, makers):
    mixes = {"small": {"text": {"lookup": 6}, "plate": {"count": 10}, "pair": {"more": 4}}}
    return lab_cases.Course(model, makers[0], mixes, torch.float32, (0,))


@pytest.fixture(scope="module")
def case(course):
    with torch.no_grad():
        return course.case(0, 0, 0, 8)


@pytest.mark.parametrize("method", lab_methods.methods(MODALITY), ids=lambda m: m.name)
def test_methods_meet_the_bound_behind_a_router_with_biases_and_groups(method, case):
    """Re-routing stays within the token's groups, as its router would; kept slots keep their weights."""
    given = case.inputs[0]
    after = method.decide(given, 1.1)
    allowed = 1.1 * given.ids.numel() / 8
    assert lab_methods.fullest(given, given.ids) > allowed, "a layer that no method has to touch proves nothing"
    if method.name != "visual top-k":  # may miss it: text alone can be too much
        assert lab_methods.fullest(given, after.ids) <= allowed
    same = after.ids == given.ids
    assert torch.equal(after.weights[same], given.weights[same]) and not same.all()
    moved = (after.ids >= 0) & ~same
    if moved.any():
        token = moved.nonzero()[:, 0]
        open_ = given.router.selection(given.logits)[token, after.ids[moved]]
        assert torch.isfinite(open_).all() or (open_ > -1e30).all()
        score = given.logits.sigmoid()
        first = given.weights[:, 0] / score.gather(1, given.ids[:, :1])[:, 0]
        expected = first[token] * score[token, after.ids[moved]]
        torch.testing.assert_close(after.weights[moved], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_fifths_of_entropy_are_fifths_and_dropping_one_costs_something(course):
    found = json.loads(json.dumps(lab_entropy.study(course, (0,))))
    assert set(found["measures"]) == set(lab_entropy.MEASURES) and found["cases"] == 1
    assert len(found["kl"]["entropy"]) == 5 and len(found["kl"]["chance"]) == 1
    assert all(v > 0 for row in found["kl"].values() for v in row)


def test_each_fifth_has_as_many_visual_tokens_and_no_text(case):
    fifths = lab_entropy._fifths(case.inputs[0])
    counts = Counter(fifths[case.inputs[0].visual].tolist())
    assert (fifths[~case.inputs[0].visual] == -1).all()
    assert set(counts) == set(range(5)) and max(counts.values()) - min(counts.values()) <= 1


def test_the_committed_model_answers():
    """Above chance on what it has never seen: the training that a CPU can do teaches something."""
    suite = SUITES["documents-small"]
    log = json.loads((suite.checkpoint / "train.json").read_text())["log"]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    make, _ = suite.makers(suite.checkpoint / "tokenizer.json")
    torch.manual_seed(11)
    groups = make.batch({"text": {"copy": 20, "maximum": 20}, "plate": {"count": 40}})
    with torch.no_grad():
        logits, _ = lab_checkpoint.load(suite.checkpoint)([lab_judge.as_batch(g) for g in groups])
    right = lab_judge.by_task(groups, [lab_judge.exact(x, g.labels) for x, g in zip(logits, groups, strict=True)])
    share = {task: sum(rows) / len(rows) for task, rows in right.items()}
    assert share["copy/text"] > 0.8 and share["maximum/text"] > 0.8 and share["count/plate"] > 0.35  # chance: 0.25
