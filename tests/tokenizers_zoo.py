"""Tokenizers small enough to tokenise by hand, one for each convention, and chat templates for them."""

from string import ascii_lowercase
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = {"<s>": 0, "</s>": 1, "<pad>": 2, "<|user|>": 3, "<|assistant|>": 4, "<|end|>": 5, "?": 6}
BPE_VOCAB = {
    **SPECIAL,
    "Ġ": 7,
    "Ċ": 8,
    ":": 9,
    **{letter: 10 + k for k, letter in enumerate(ascii_lowercase)},
    "hi": 40,
    "Ġhi": 41,
    "ok": 42,
    "Ġok": 43,
    "ye": 44,
    "yes": 45,
    "Ġyes": 46,
    "ĠĠ": 47,
}
"""`a` to `z` are 10 to 35; merges up to the words hi, ok and yes, with and without a space before."""

MERGES = [("h", "i"), ("Ġ", "hi"), ("o", "k"), ("Ġ", "ok"), ("y", "e"), ("ye", "s"), ("Ġ", "yes"), ("Ġ", "Ġ")]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hi", "ok", "yes", "no", "##s", "?", ":", "user", "assistant"]
"""The WordPiece vocabulary: a word's id is its place."""

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_BLOCKS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
)
STRIPPING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}u: {{ m.content | trim }}\n"
    "{% else %}a: {{ m.content | trim }} {{ eos_token }}\n{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n{% else %}{{ m.content }}<|end|>\n{% endif %}"
    "{% endfor %}"
)
GENERATION_OPEN = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}<|end|>{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)
WITHOUT_END = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
WITHOUT_END_BLOCKS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TWO_BLOCKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}hi{% endgeneration %}?"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
MISPLACED = (
    "{% set all %}"
    + CHAT_BLOCKS.removeprefix("{{ bos_token }}")
    + "{% endset %}{{ bos_token }}{{ all }}"  # in a {% set %}
)
COUNTING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | length }}:{{ m.content }}<|end|>{% endfor %}"
WORDS_ONLY = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
LAST_TURN_DIFFERS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}ok ok{% endif %}{{ m.content }}<|end|>{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}hi{{ m.content }}{% else %}{{ m.content.split('?')[-1] }}"
    "{% endif %}<|end|>{% endfor %}"
)
CALLING = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.calls }}<|end|>{% endfor %}"
TWICE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ m.content }}<|end|>{% endfor %}"
FORGETTING = (
    "{% for m in messages %}{% if loop.last or m.role == 'user' %}<|{{ m.role }}|>{{ m.content }}{% endif %}"
    "{% endfor %}"
)
REFUSING = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"


def bpe(*, bos: bool = False, eos: bool = False, pad: bool = True, chat: str | None = None, **more: Any) -> Any:
    """Byte-level BPE which puts `<s>` before a text, `</s>` after it, or neither."""
    inner = Tokenizer(models.BPE(vocab=BPE_VOCAB, merges=MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    around = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    inner.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 0), ("</s>", 1)])
    inner.add_special_tokens([AddedToken(word, special=True) for word in ("<|user|>", "<|assistant|>", "<|end|>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>" if pad else None, **more
    )
    tokenizer.chat_template = chat
    return tokenizer


def trimming_bpe(**settings: Any) -> Any:
    """As GPT-2's: a token's offsets leave out the whitespace it begins with."""
    tokenizer = bpe(**settings)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def wordpiece(*, chat: str | None = None, **more: Any) -> Any:
    """As BERT's: `[CLS]` before, `[SEP]` after, whitespace dropped, no end-of-sequence token."""
    inner = Tokenizer(models.WordPiece({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", **more
    )
    tokenizer.chat_template = chat
    return tokenizer


def letters(alphabet: str) -> Any:
    """A tokenizer that knows a few letters only, drops all others, and puts `<s>` before a text."""
    inner = Tokenizer(models.BPE(vocab={word: k for k, word in enumerate(("<s>", "</s>", *alphabet))}, merges=[]))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
