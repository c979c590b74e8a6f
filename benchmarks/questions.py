"""What the tiny models are asked where answers are compared token for token."""

from dataclasses import dataclass

from benchmarks.serving import prompt


@dataclass(frozen=True)
class Question:
    """One user turn; `image` names a photograph of `serving.photograph_files()`."""

    text: str
    image: str | None = None

    @property
    def prompt(self) -> str:
        """The turn in the tiny models' chat format."""
        return prompt(self.text, images=self.image is not None)


# Chosen for the tiny VL model: with the outputs of its parts perturbed by 0.6 % (three times what bfloat16 does), 12
# times, no token of these answers changes and the two best logits stay 0.3 apart (0.4 unperturbed). Other questions are
# as good for anything but an exact comparison. `sglang_macs.tiny_models` has the levers.
QUESTIONS = (
    Question("hello world"),
    Question("How many experts answer?"),
    Question("Why is the sky blue?"),
    Question("a"),
    Question("What is in this picture?", "china"),
    Question("What is in this picture?", "flower"),
    Question("Describe the image in one sentence.", "flower"),
    Question("How many objects are there?", "china"),
)
# The same for the tiny text model.
TEXT_QUESTIONS = (
    Question("hello world"),
    Question("The quick brown fox jumps over the lazy dog."),
    Question("Why is the sky blue?"),
    Question("Count to ten."),
)
NEW_TOKENS = 12
