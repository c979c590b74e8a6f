"""SGLang's real server gives the lab model's answers, transformers' and the evaluator's: the same three times."""

import lab_checkpoint
import lab_material
import pytest
import torch
from lab_judge import as_batch, exact
from lab_questions import of_group
from lab_tasks import Maker
from lab_tokens import Vocabulary
from serving import EP2_ARGS, Server, data_uri, prompt

TRAINED = (lab_checkpoint.CHECKPOINT / "model.safetensors").exists()
MIX = {  # mostly what the model has learned, and some that it gets wrong
    "text": {"copy": 4, "lookup": 3},
    "wide": {"read": 6, "compare": 2},
    "square": {"colour": 2, "count_colour": 1, "where": 2},
    "large": {"scene": 2, "read": 1},
}


@pytest.mark.server
@pytest.mark.nightly
@pytest.mark.skipif(not TRAINED, reason="no trained checkpoint here")
def test_server_and_evaluator_agree_on_the_answers():
    """Right and wrong alike. Greedy tokens of the evaluator's f32 and the server's bf16 may differ on a near tie."""
    make = Maker(Vocabulary(lab_checkpoint.CHECKPOINT / "tokenizer.json"), lab_material.load("held_out"), "held_out")
    torch.manual_seed(5)
    groups = make.batch(MIX)
    model = lab_checkpoint.load()
    with torch.no_grad():
        logits, _ = model([as_batch(g) for g in groups])
    ours = [x for group, out in zip(groups, logits, strict=True) for x in exact(out, group.labels).tolist()]
    asked = [question for group in groups for question in of_group(group, make.words)]
    arguments = [*EP2_ARGS, "--moe-a2a-backend", "macs", "--macs-gamma", "inf", "--macs-min-tokens", "0"]
    with Server(lab_checkpoint.CHECKPOINT, arguments, log="build/test-lab.log") as server:
        answers = [
            server.generate(
                prompt(q.text, images=q.picture is not None),
                data_uri(q.picture, "image/png") if q.picture else None,
                max_new_tokens=14,
            ).text.strip()
            for q in asked
        ]
    served = [answer == q.answer for answer, q in zip(answers, asked, strict=True)]
    assert sum(a != b for a, b in zip(served, ours, strict=True)) <= 1, list(
        zip(served, ours, answers, asked, strict=True)
    )
    assert sum(served) >= 0.85 * len(served)
