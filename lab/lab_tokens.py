"""The lab's tokenizer, and the rows of token ids that questions and answers become."""

from pathlib import Path

import torch
from torch import Tensor

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))  # their ids: the trainer's first
VOCAB = 512
HOLE = -1  # a place of a row that holds nothing; rows are closed up over their holes
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CORPUS = (
    "Read the digits. How many digits? How many digits are red? green? blue? yellow? white?",
    "What colour is 7? red green blue yellow white",
    "Where is 7? top left top right bottom left bottom right",
    "Which digit is larger? left right",
    "What is behind the digits? nothing noise temple flower",
    "What is 47+8? Copy 314159. Given k3 m7 a5. What is k? Which letter has the digit?",
    "user assistant " + " ".join(LETTERS),
)


def train_tokenizer():
    """A byte-level BPE `tokenizers.Tokenizer` of at most `VOCAB` ids: the questions' words whole, digits one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    return bpe


DOCUMENT_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_image|>", "<|end_of_image|>")
DOCUMENT_SPECIAL += ("<|image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>")  # the same ids up to VIDEO
DOCUMENT_WORDS = """user assistant Read Copy Given What Which How is are the of at in has value bar part row line comes
after picture shows many shapes circles squares triangles begin end does most highest lowest largest smallest first
second third colour red green blue orange purple black word and Name
City Street Code Date Total Phone Room Item Number"""


def document_tokenizer():
    """A byte-level `tokenizers.Tokenizer`: the questions' words whole, all others letter by letter, as a word that is
    read for the first time has to be.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = DOCUMENT_WORDS.split()
    kept = [*DOCUMENT_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words, *(f"\u0120{w}" for w in words)]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(kept)}, merges=[], ignore_merges=True))
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in DOCUMENT_SPECIAL])
    assert bpe.get_vocab_size() <= VOCAB
    return bpe


class Vocabulary:
    """Token ids of phrases as constants on one device."""

    def __init__(self, path: Path | str, device: torch.device | str = "cpu"):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(path))
        self.device = torch.device(device)
        self._cache: dict[str, Tensor] = {}
        self.digits = self.table([str(i) for i in range(10)])[:, 0]  # [10]
        self.letters = self.table([f" {c}" for c in LETTERS])[:, 0]  # [26], as they stand in a question
        self.answer_letters = self.table(list(LETTERS))[:, 0]  # [26], as an answer begins
        self.opening = self.row("<|im_start|>user\n")
        self.again = self.row("\n<|im_start|>user\n")  # opens a later turn
        self.closing = self.row("<|im_end|>\n<|im_start|>assistant\n")

    def row(self, text: str) -> Tensor:
        """[n] i64."""
        if text not in self._cache:
            self._cache[text] = torch.tensor(self.tokenizer.encode(text).ids, device=self.device)
        return self._cache[text]

    def table(self, texts: list[str] | tuple[str, ...]) -> Tensor:
        """[len(texts), longest] i64, holes behind the shorter ones."""
        key = "\0".join(texts)
        if key not in self._cache:
            rows = [torch.tensor(self.tokenizer.encode(text).ids) for text in texts]
            table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=HOLE)
            self._cache[key] = table.to(self.device)
        return self._cache[key]

    def text(self, ids: Tensor) -> str:
        """What a row says, special tokens and padding left out."""
        return self.tokenizer.decode([i for i in ids.tolist() if i >= 0])


def join_columns(parts: list[Tensor], n: int) -> Tensor:
    """[n, sum of widths]: each part is [n, w], [n] or a phrase [w] that every row repeats (told apart by `n`)."""
    columns = [part if part.ndim == 2 else part.expand(n, -1) for part in parts]
    return torch.cat(columns, 1)


def close_up(ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows [n, w] without their holes, `PAD` behind; and the order [n, width] in which columns were taken."""
    order = (ids == HOLE).int().argsort(dim=1, stable=True)[:, :width]
    ids = ids.gather(1, order)
    return ids.masked_fill(ids == HOLE, PAD), order
