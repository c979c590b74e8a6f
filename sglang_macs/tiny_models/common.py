"""What all tiny checkpoints share: the folder, the tokenizer, the sizes of the language model."""

import shutil
from pathlib import Path

VOCAB = 512
SEED = 4  # chosen for a decisive model: tests/support/reference.py says how decisive

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "What is in this picture? Describe the image in one sentence.",
    "a mixture of experts sends every token to a few experts and adds up what they answer",
    "the slowest rank sets the pace of the whole batch, all others wait for it",
    "hello world, how many visual tokens does a photograph of a flower have?",
)


def check_sizes(hidden: int, layers: int, num_experts: int, top_k: int, *, min_layers: int) -> None:
    """Refuse what SGLang or the routers' construction cannot take."""
    if hidden % 64:
        raise ValueError(f"tiny model: hidden must be a multiple of 64 (4 heads of 32), got {hidden}; try 128")
    if layers < min_layers:
        raise ValueError(f"tiny model: layers must be at least {min_layers}, got {layers}; see the builder's docstring")
    if num_experts % 2 or not 0 < top_k <= num_experts // 2:
        raise ValueError(
            f"tiny model: num_experts must be even and top_k at most half of it, got {num_experts} and {top_k}; "
            "try 16 and 4"
        )


def fresh(path: Path | str) -> Path:
    """An empty folder at `path`; only a folder that holds a checkpoint, or nothing, is cleared."""
    path = Path(path)
    if path.exists() and any(path.iterdir()) and not (path / "config.json").exists():
        raise FileExistsError(f"tiny model: {path} exists and holds no checkpoint; remove it or choose another folder")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def make_tokenizer(special: tuple[str, ...], names: dict[str, str] | None = None):
    """Byte-level BPE with `VOCAB` ids at most, trained on `CORPUS`: any text can be encoded.

    names: attributes under which a processor looks for some of the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(special),
        **(names or {}),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def words_of(tokenizer, special: tuple[str, ...]) -> range:
    """Ids of the ordinary tokens: the trainer numbers the special ones first."""
    return range(len(special), len(tokenizer))


def text_config(
    tokenizer, hidden: int, layers: int, num_experts: int, top_k: int, intermediate: int, head_dim: int = 32
) -> dict:
    """Config fields of the language model, shared by both kinds."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
