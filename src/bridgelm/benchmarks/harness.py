"""Runs EleutherAI's lm-evaluation-harness on a run folder.

`python -m bridgelm.benchmarks.harness` is its command line with one more model, `bridgelm`. It needs the extra
`lm-eval`; see docs/harness.md."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

from pydantic import ValidationError

from bridgelm import __version__
from bridgelm.benchmarks.run import resolve, weights_digest
from bridgelm.config.run_config import ModelConfig
from bridgelm.data.chat import load_chat
from bridgelm.data.model_files import check_finite
from bridgelm.data.model_shapes import model_path
from bridgelm.errors import UserError
from bridgelm.model.loading import open_whole, pick_device

try:
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
except ImportError as missing:
    SAID = f"{missing}; bridgelm.benchmarks.harness needs more packages: pip install 'bridgelm[lm-eval]'"
    if __name__ != "__main__":
        raise ImportError(SAID) from None
    print(f"error: {SAID}", file=sys.stderr)
    sys.exit(2)

OURS = ("dtype", "chat_template", "system_prompt", "revision", "attention")  # keys of [model] that model_args may set
NOT_CHOSEN = "cuda:0"  # what the harness says where the user named no device


class Whole:
    """Stands in for AutoModelForCausalLM: a model that is part random, or not finite, is refused."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        model = open_whole(path, **options)
        check_finite(model.named_parameters(), f"model.name_or_path: {path!r}")
        return model


@register_model("bridgelm")
class BridgeLM(HFLM):
    """HFLM with the prompts, end tokens and data type that the model was trained with. `model` is a run folder, a
    Hugging Face folder or hub name, or `toy:base`; settings that are not of [model] are HFLM's own."""

    AUTO_MODEL_CLASS = Whole

    def __init__(self, model: str, which: str = "final", device: str | None = None, **settings: Any) -> None:
        config, facts = resolve(str(model), which)
        config = _changed(config, {key: settings.pop(key) for key in OURS if key in settings})
        if config.revision is not None:
            settings["revision"] = config.revision
        if config.attention != "auto":
            settings["attn_implementation"] = config.attention
        settings["trust_remote_code"] = False  # --trust_remote_code is for data sets
        self.chat = load_chat(config)
        # In bfloat16 each log-prob would be rounded to 8 bits.
        settings.setdefault("softmax_dtype", "float64" if config.dtype == "float64" else "float32")
        super().__init__(
            pretrained=model_path(config.name_or_path), tokenizer=self.chat.tokenizer, dtype=config.dtype,
            device=str(pick_device(config.device if device in (None, NOT_CHOSEN) else device)), use_safetensors=True,
            **settings)
        from transformers import GenerationConfig

        # Ours alone: a repetition penalty of the model's own, say, would change greedy answers.
        self.model.generation_config = GenerationConfig(eos_token_id=sorted(self.chat.eos_ids),
                                                        pad_token_id=self.chat.pad_id)
        if self.add_bos_token is None and not self._reads_prompts_as_trained():
            self.add_bos_token = False
        self.facts = {**facts, "sha256": weights_digest(config), "dtype": config.dtype, "device": str(self.device),
                      "system_prompt": config.system_prompt, "eos_ids": sorted(self.chat.eos_ids),
                      "add_bos_token": self.add_bos_token, "bridgelm": __version__}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Applies the chat template with the run's system prompt, which stands before the task's own if it has one."""
        system, turns = self.chat.system_prompt, list(chat_history)
        if system is not None:
            if turns and turns[0]["role"] == "system":
                system = f"{system}\n\n{turns.pop(0)['content']}"
            turns.insert(0, {"role": "system", "content": system})
        return super().apply_chat_template(turns, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The key under which --cache_requests keeps prompts: they depend on template and system prompt too."""
        prompt = f"{self.tokenizer.chat_template}\0{self.chat.system_prompt}"
        return f"{super().tokenizer_name}-{hashlib.sha256(prompt.encode()).hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        return {**super().get_model_info(), "bridgelm": self.facts}

    def _reads_prompts_as_trained(self) -> bool:
        """A tokenizer may add a BOS that the template does not write. Training never does."""
        prompt = self.apply_chat_template([{"role": "user", "content": "x"}])
        return self.tok_encode(prompt) == self.chat.encode(prompt).tolist()


def _changed(config: ModelConfig, own: dict[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.model_validate(config.model_dump() | own)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"model_args: {first['loc'][0]}={first['input']}: {first['msg']}") from None


def main() -> int:
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
