"""The one place where text becomes token ids and masks, for any Hugging Face tokenizer. No torch.

A demonstration is trained on as `prompt ids + the demo's own tokens + EOS`, never through the template's rendering of a
finished assistant turn: templates strip think blocks and change white space there, and the policy would then be taught
another sequence than the one it is asked to continue.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bridgelm.config.run_config import ModelConfig
from bridgelm.data.model_shapes import Positions, model_path, sizes_of
from bridgelm.errors import UserError
from bridgelm.types import Demo, Message, Problem

# Tokenizer classes that are nothing but their tokenizer.json. They are opened directly: AutoTokenizer imports torch.
GENERIC_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of a model, checked for what training needs: a pad token, an end token and a chat template."""
    path, section = model_path(model.name_or_path, model.section), model.section
    try:
        tokenizer = _open_tokenizer(path, model.revision)
    except (OSError, ValueError, ImportError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{section}.name_or_path: no tokenizer in {path!r} ({reason}); give a Hugging Face folder or "
                        "hub name with tokenizer files") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"{section}.name_or_path: the tokenizer of {path!r} has neither a pad nor an eos token; "
                            "set pad_token in its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token  # EOS stays a trained target: masks never look at pad ids
    if model.chat_template is not None:
        try:
            tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{section}.chat_template: {model.chat_template} cannot be read "
                            f"({error.strerror})") from None
    _check_vocabulary(tokenizer, model)
    if not tokenizer.chat_template:
        raise UserError(f"{section}.name_or_path: the tokenizer of {path!r} has no chat template; point "
                        f"{section}.chat_template at a Jinja file")
    return tokenizer


def load_chat(model: ModelConfig) -> Chat:
    """Tokenizer, system prompt and the model's own end tokens together."""
    from bridgelm.data.model_shapes import Positions

    return Chat(load_tokenizer(model), model.system_prompt, generation_eos(model), model.section, Positions.of(model))


def _check_vocabulary(tokenizer: Any, model: ModelConfig) -> None:
    rows = sizes_of(model).get("vocab_size")
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if rows is not None and last >= rows:
        raise UserError(f"{model.section}.name_or_path: the tokenizer of {model.name_or_path!r} numbers its tokens up "
                        f"to {last} ({token!r}), and the model's vocabulary has {rows}; save the model after "
                        f"resize_token_embeddings({last + 1}), or put the tokenizer that it was trained with beside it")


def generation_eos(model: ModelConfig) -> tuple[int, ...]:
    """The end tokens that generation_config.json names; empty where there is no such file."""
    path: str | Path = model_path(model.name_or_path)
    file: str | None
    if Path(path).is_dir():
        file = str(Path(path) / "generation_config.json")
    else:
        from transformers.utils.hub import cached_file

        file = cached_file(path, "generation_config.json", revision=model.revision,
                           _raise_exceptions_for_missing_entries=False)
    if file is None or not Path(file).is_file():
        return ()
    found = json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id")
    return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)


def _open_tokenizer(path: str, revision: str | None) -> Any:
    kwargs: dict[str, Any] = {} if revision is None else {"revision": revision}
    config = Path(path) / "tokenizer_config.json"
    whole = config.is_file() and (Path(path) / "tokenizer.json").is_file()
    if whole and json.loads(config.read_text(encoding="utf-8")).get("tokenizer_class") in GENERIC_CLASSES:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **kwargs)


class Chat:
    """Turns problems and demonstrations into ids.

    `eos_ids` stop generation; `eos_id` is the one that ends a demonstration. `opens_think` says that the template's
    generation prompt already opens a think block, so that a completion starts inside it.
    """

    def __init__(self, tokenizer: Any, system_prompt: str | None = None, eos_ids: Iterable[int] = (),
                 section: str = "model", positions: Positions | None = None):
        self.tokenizer, self.section, self.positions = tokenizer, section, positions
        self.system_prompt = system_prompt
        self.pad_id: int = tokenizer.pad_token_id
        special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        special.pop(tokenizer.unk_token, None)  # a word of no meaning: not a control token
        self.control_ids = frozenset(special.values())
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if special else None
        own_eos = tokenizer.eos_token_id
        stops = tuple(eos_ids) or (() if own_eos is None else (own_eos,))
        if not stops:
            raise UserError(f"{section}.name_or_path: the tokenizer has no eos token and there is no "
                            "generation_config.json that names one; set eos_token in tokenizer_config.json")
        closer = self._closing_token()
        # The model is known to emit its own end tokens; the template's closer may be an untrained row of a base model.
        self.eos_id: int = next((i for i in (closer, own_eos) if i is not None and i in stops), stops[0])
        self.eos_ids: frozenset[int] = frozenset(stops) | ({closer} if closer is not None else frozenset())
        self.opens_think = self._render([{"role": "user", "content": "x"}], True).rstrip().endswith("<think>")

    def prompt_ids(self, problem: Problem) -> np.ndarray:
        """The prompt up to where the assistant starts to write; the same ids as the tokenizer's own chat template,
        except that control tokens typed inside a message stay text."""
        messages = list(problem.messages)
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return np.asarray(self._encode(self._typed_specials_apart(messages)), dtype=np.int64)

    def plain_ids(self, before: str, typed: str, after: str) -> np.ndarray:
        """Text without a template, as a base model goes on with it. `typed` is a user's: control tokens in it stay
        text, and those of `before` and `after` are meant."""
        pieces: list[tuple[str, bool]] = []
        for text, apart in [(before, False), *self._pieces(typed), (after, False)]:
            if not apart and pieces and not pieces[-1][1]:  # one piece: a word is not torn where they meet
                pieces[-1] = (pieces[-1][0] + text, False)
            else:
                pieces.append((text, apart))
        start = self.tokenizer.bos_token_id
        opens = start is not None and self.tokenizer("x")["input_ids"][0] == start
        return np.asarray([start] * opens + self._encode(pieces), dtype=np.int64)

    def rendered(self, ids: Sequence[int] | np.ndarray) -> str:
        """What the ids say, control tokens shown."""
        return self.tokenizer.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def demo_ids(self, problem: Problem, demo: Demo) -> tuple[np.ndarray, np.ndarray]:
        """Ids of prompt + demonstration + EOS, and the mask of the tokens that its author wrote (EOS among them)."""
        prompt = self.prompt_ids(problem)
        written = self._encode(self._pieces(self._demo_text(demo.text)))
        ids = np.concatenate([prompt, np.asarray([*written, self.eos_id], dtype=np.int64)])
        return ids, np.arange(len(ids)) >= len(prompt)

    def encode(self, text: str) -> np.ndarray:
        """Text alone, control tokens in it taken for what they are."""
        return np.asarray(self._call(text, False), dtype=np.int64)

    def turn(self, ids: Sequence[int] | np.ndarray) -> str:
        """The whole of the assistant's turn, as a grader reads it: with the think block that the prompt opened."""
        return ("<think>" if self.opens_think else "") + self.text(ids)

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """What the ids say, special tokens left out."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True,
                                     clean_up_tokenization_spaces=False)

    def span(self, ids: Sequence[int] | np.ndarray, opening: str, closing: str) -> tuple[int, int] | None:
        """The tokens (start, end) that lie wholly between the first `opening` of an answer and the `closing` after it:
        none that is also part of one of them. None where one is missing."""
        def text(count: int) -> str:
            return self.tokenizer.decode([int(i) for i in ids[:count]], clean_up_tokenization_spaces=False)

        opening, closing = opening.strip(), closing.strip()  # white space goes with the token that follows it
        whole = text(len(ids))
        begin = whole.find(opening)
        stop = whole.find(closing, begin + len(opening)) if begin >= 0 else -1
        if stop < 0:
            return None
        counts = range(len(ids) + 1)  # both grow with the number of tokens: found by halving
        start = bisect_left(counts, begin + len(opening), key=lambda n: len(text(n)))
        end = bisect_right(counts, stop, key=lambda n: len(text(n))) - 1
        return start, max(start, end)

    def _demo_text(self, text: str) -> str:
        """A demonstration that repeats what stands there anyway: the opened `<think>`, or a typed end token."""
        if self.opens_think and text.lstrip().startswith("<think>"):
            text = text.lstrip().removeprefix("<think>").removeprefix("\n")
        for token in self.tokenizer.convert_ids_to_tokens(sorted(self.eos_ids)):
            text = text.removesuffix(token)
        return text

    def _render(self, messages: list[Message], generate: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"chat template: it refuses a conversation of {roles} ({error}); change the messages or "
                            f"{self.section}.system_prompt, or give another template as "
                            f"{self.section}.chat_template") from None

    def _closing_token(self) -> int | None:
        """The first control token that the template writes after an assistant's text."""
        mark = "assistantwrote7391"
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        try:
            after = self._render(turns, False).partition(mark)[2]
        except UserError:
            return None
        found = self._special.search(after) if self._special else None
        return self.tokenizer.convert_tokens_to_ids(found.group()) if found else None

    def _typed_specials_apart(self, messages: list[Message]) -> list[tuple[str, bool]]:
        """The rendered prompt as (text, typed by a user) pieces. Control tokens inside messages are swapped for marks
        before rendering, so the template cannot tell, and put back as plain text afterwards."""
        typed: list[str] = []
        nonce = "typedcontrol"
        while any(nonce in message["content"] for message in messages):
            nonce += "x"

        def swap(found: re.Match[str]) -> str:
            typed.append(found.group())
            return f"\ue000{nonce}{len(typed) - 1}\ue001"

        if self._special is None or not any(self._special.search(m["content"]) for m in messages):
            return [(self._render(messages, True), False)]
        marked = [{**m, "content": self._special.sub(swap, m["content"])} for m in messages]
        parts = re.split(f"\ue000{nonce}(\\d+)\ue001", self._render(marked, True))
        return [(typed[int(part)], True) if i % 2 else (part, False) for i, part in enumerate(parts)]

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """Author's text, cut at the control tokens typed in it."""
        if self._special is None:
            return [(text, False)]
        cuts = [0, *(at for found in self._special.finditer(text) for at in found.span()), len(text)]
        return [(text[start:end], i % 2 == 1) for i, (start, end) in enumerate(pairwise(cuts))]

    def _encode(self, pieces: list[tuple[str, bool]]) -> list[int]:
        ids: list[int] = []
        for text, typed in pieces:
            if text:
                ids += self._encode_typed(text) if typed else self._call(text, False)
        return ids

    def _encode_typed(self, text: str) -> list[int]:
        ids = self._call(text, True)
        if self.control_ids.isdisjoint(ids):
            return ids
        # A vocabulary may hold the token as an ordinary word too (word-level models): spell it out.
        spelled = [i for character in text for i in self._call(character, True)]
        return [i for i in spelled if i not in self.control_ids]

    def _call(self, text: str, split_special: bool) -> list[int]:
        # The template has written BOS already. Without `verbose=False` long texts print a warning of no use here.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=split_special,
                              verbose=False)["input_ids"]
