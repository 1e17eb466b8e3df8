"""Tokenizers and chat templates of the common kinds, made on the spot."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

QWEN = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
LLAMA = (
    "{{ bos_token }}{%- for m in messages -%}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
)
# The generation prompt opens a think block; a finished turn shows neither the block nor what was thought.
THINK = (
    "{%- for m in messages -%}{%- set text = m['content'].split('</think>')[-1] if m['role'] == 'assistant'"
    " else m['content'] -%}{{ '<|im_start|>' + m['role'] + '\n' + text + '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"
)
# The generation prompt has an empty think block that a finished assistant turn does not have.
DIFFERENT = QWEN.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>\n\n'")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
TEXTS = ["What is 2 + 3? The answer is 5.",
         "<think>\nTwo and three make five.\n</think>\n\nSo the answer is \\boxed{5}",
         "Überraschung: naïve café costs 3 €", "user assistant system\n\n", "im_end im_end im_end"]


def byte_level(template: str | None, eos: str | None = "<|im_end|>", pad: str | None = "<|pad|>",
               bos: str | None = None):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:  # what Llama 3 does outside chats: it must not come on top of the template's own
        pairs = [(bos, core.token_to_id(bos))]
        core.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=pairs)  # type: ignore[assignment]
    names = {"eos_token": eos, "pad_token": pad, "bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template,
                                        **{k: v for k, v in names.items() if v})
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def word_level():
    template = (
        "{%- for m in messages -%}{{ '<|' + m['role'] + '|> ' + m['content'] + (' <|end|> ' if m['role'] == 'assistant'"
        " else ' ') }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|> ' }}{%- endif -%}"
    )
    special = ["<|pad|>", "<|end|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, "go", "left", "right", "1", "2"])},
                                      unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unk|>",
                                   additional_special_tokens=special[3:], chat_template=template)
