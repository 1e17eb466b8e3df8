"""One word-level tokenizer for all families, for base and teacher alike, with a real chat template."""

from __future__ import annotations

from pathlib import Path

from bridgelm.data.toy import hops, jugs, knights

PAD, END, UNKNOWN = "<|pad|>", "<|end|>", "<|unk|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
# Only the assistant's turn is closed by the end token: it is also the end of generation, and prompts stay short.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{{ ' <|end|> ' if message['role'] == 'assistant' else ' ' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|> ' }}{%- endif -%}"
)


def words() -> list[str]:
    """The vocabulary, in the order of the ids: special tokens, numbers, words."""
    numbers = [str(n) for n in range(knights.SIDE**2)]  # the largest of any family
    rest = [word for family in (hops, jugs, knights) for word in family.WORDS]
    return list(dict.fromkeys([PAD, END, UNKNOWN, *ROLES, *numbers, *rest]))


def tokenizer():
    """The tokenizer as an ordinary Hugging Face fast tokenizer (imports transformers, hence not at the top)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="left",
    )


def save(folder: Path) -> None:
    tokenizer().save_pretrained(folder)
