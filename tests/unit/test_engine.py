"""The native engine against the model's own forward, Hugging Face's `generate` and the exact distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridgelm.config.run_config import ModelConfig
from bridgelm.data.chat import load_chat
from bridgelm.engine import NativeEngine, Origin, Request, Sampling, decoders, native
from bridgelm.engine.base import stopped
from bridgelm.ledger import Ledger
from bridgelm.model import batching, forward
from bridgelm.model.loading import load_model
from bridgelm.types import Completion, Problem, Row
from tiny import exact_norms

FAST, OTHER = ("qwen2", "qwen3", "llama"), ("gemma2", "mistral")
PROMPTS = [[3, 8, 9, 4], [3, 28, 7, 25, 9, 26, 4], [3, 4],
           [3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 4], [3, 8, 9, 4], [3, 8, 9, 4]]
Load = Callable[..., Any]


@pytest.fixture
def load(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Load:
    softmax = torch.nn.functional.softmax

    def wide(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return softmax(x, dim, dtype=None if x.dtype == torch.float64 else dtype)
    # Eager attention (Gemma 2 knows no other) takes its softmax in float32, whatever the model's dtype.
    monkeypatch.setattr(torch.nn.functional, "softmax", wide)

    def model(kind: str, dtype: str = "float64") -> Any:
        attention = "eager" if kind == "gemma2" else "sdpa"
        loaded = load_model(ModelConfig(name_or_path=str(tiny_folder(kind)), dtype=dtype, device="cpu",
                                        attention=attention))
        return exact_norms(loaded) if dtype == "float64" else loaded
    return model


def engine(eos: set[int] = {1}, max_rows: int = 64) -> NativeEngine:  # noqa: B006
    return NativeEngine(frozenset(eos), 0, lambda ids: " ".join(map(str, ids)), max_rows)


def requests(prompts: list[list[int]] = PROMPTS, seed: int = 5) -> list[Request]:
    return [Request(np.array(p, dtype=np.int64), (seed, i)) for i, p in enumerate(prompts)]


def policy_logps(model: Any, prompt: np.ndarray, completion: Completion, temperature: float = 1.0) -> np.ndarray:
    """By the training forward pass, alone in its batch."""
    ids = np.concatenate([prompt, completion.ids])
    row = Row(ids, np.arange(len(ids)) >= len(prompt), "rollout", Problem("p", ({"role": "user", "content": ""},)),
              temperature=temperature)
    with torch.no_grad():
        micro = batching.collate([row], model.dtype, torch.device("cpu"), {})
        return forward.forward(model, micro).logp_BT[0, len(prompt):].double().numpy()


def exact_logp(model: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature, -1)


def test_which_models_take_the_fast_path(load: Load) -> None:
    for kind in (*FAST, *OTHER):
        made = decoders.make_decoder(load(kind), 4)
        assert isinstance(made, decoders.FastDecoder if kind in FAST else decoders.ModelDecoder), kind


@pytest.mark.parametrize("kind", [*FAST, *OTHER])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-10)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_policys(load: Load, kind: str, dtype: str, tolerance: float, temperature: float) -> None:
    model = load(kind, dtype)
    asked = requests()
    found = engine().generate(Origin(model), asked, Sampling(12, temperature))
    assert {len(c.ids) for c in found} != {12}, "some rows must end early, so that rows are dropped"
    for request, completion in zip(asked, found, strict=True):
        raw = policy_logps(model, request.prompt, completion)
        at_temperature = policy_logps(model, request.prompt, completion, temperature)
        np.testing.assert_allclose(completion.raw_logps, raw, atol=tolerance, rtol=0)
        np.testing.assert_allclose(completion.logps, at_temperature, atol=tolerance, rtol=0)
    if temperature != 1.0:
        assert any(np.abs(c.logps - c.raw_logps).max() > 0.01 for c in found)


@pytest.mark.parametrize("kind", [*FAST, *OTHER])
def test_greedy_tokens_are_those_of_generate(load: Load, kind: str) -> None:
    model = load(kind)
    asked = requests()
    found = engine().generate(Origin(model), asked, Sampling(20, 0.0))
    for request, completion in zip(asked, found, strict=True):
        prompt = torch.tensor(request.prompt)[None]
        with torch.no_grad():
            theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False,
                                    eos_token_id=1, pad_token_id=0)[0, len(request.prompt):]
        assert completion.ids.tolist() == theirs.tolist()


@pytest.mark.parametrize("kind", [*FAST, *OTHER])
def test_a_request_is_independent_of_its_batch(load: Load, kind: str) -> None:
    model, asked = load(kind), requests()
    together = engine().generate(Origin(model), asked, Sampling(16))
    lengths = [len(c.ids) for c in together]
    assert len(set(lengths)) > 2, lengths
    others = {"alone": [engine().generate(Origin(model), [r], Sampling(16))[0] for r in asked],
              "reversed": engine().generate(Origin(model), asked[::-1], Sampling(16))[::-1],
              "in batches of two": engine(max_rows=2).generate(Origin(model), asked, Sampling(16)),
              "among many": engine().generate(Origin(model), [*requests(seed=9), *asked], Sampling(16))[len(asked):]}
    for name, found in others.items():
        for mine, theirs in zip(together, found, strict=True):
            assert mine.ids.tolist() == theirs.ids.tolist(), name
            assert mine.finished == theirs.finished
            np.testing.assert_allclose(mine.logps, theirs.logps, atol=1e-10)


def test_rows_are_dropped_when_they_finish(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = load("qwen2"), requests(PROMPTS * 4)
    widths: list[int] = []
    step = decoders.FastDecoder.step
    monkeypatch.setattr(decoders.FastDecoder, "step", lambda self, t: (widths.append(len(t)), step(self, t))[1])
    dropped = engine().generate(Origin(model), asked, Sampling(30))
    assert widths[-1] < widths[0]
    monkeypatch.setattr(native, "KEEP", 0.0)  # never drop any
    kept = engine().generate(Origin(model), asked, Sampling(30))
    assert [c.ids.tolist() for c in dropped] == [c.ids.tolist() for c in kept]
    assert [c.finished for c in dropped] == [c.ids[-1] == 1 for c in dropped]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 3], [3, 1, 2], [1, 0], [2, 1, 1], [1, 1, 2, 3, 0, 0]])
@torch.inference_mode()
def test_any_rows_can_be_chosen(load: Load, rows: list[int]) -> None:
    whole, chosen = (decoders.FastDecoder(load("qwen2"), room=2) for _ in range(2))
    pad = torch.tensor([[True] * 4, [False, True, True, True], [True] * 4, [False, False, True, True]])
    for decoder in (whole, chosen):
        decoder.prefill(torch.arange(5, 21).view(4, 4), pad)
    chosen.select(np.array(rows))
    token = torch.tensor([5, 6, 7, 8])
    torch.testing.assert_close(chosen.step(token[rows]), whole.step(token)[rows])


def test_a_shared_prompt_is_read_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ledger, sizes = load("qwen2"), Ledger(1), []
    prefill = decoders.FastDecoder.prefill
    monkeypatch.setattr(decoders.FastDecoder, "prefill",
                        lambda self, ids, pad: (sizes.append(tuple(ids.shape)), prefill(self, ids, pad))[1])
    found = engine().generate(Origin(model), requests([PROMPTS[0]] * 5 + [PROMPTS[1]] * 5), Sampling(3), ledger)
    assert sizes == [(2, 7)]
    assert ledger.generate == 4 + 7 + sum(len(c.ids) for c in found)


def test_seeds(load: Load) -> None:
    model = load("qwen2")

    def draw(*seeds: tuple[int, ...]) -> list[list[int]]:
        asked = [Request(np.array(PROMPTS[0]), seed) for seed in seeds]
        return [c.ids.tolist() for c in engine().generate(Origin(model), asked, Sampling(8))]
    one, other, again = draw((1, 2), (1, 3), (1, 2))
    assert one == again != other
    assert draw((1, 2)) == [one]
    assert draw((2, 1)) != [one]


def test_limits_and_ends(load: Load) -> None:
    model, asked = load("qwen2"), requests()
    free = engine(set()).generate(Origin(model), asked, Sampling(9))
    assert all(len(c.ids) == 9 and not c.finished for c in free)
    tokens = {int(c.ids[3]) for c in free}
    found = engine(tokens).generate(Origin(model), asked, Sampling(9))
    for whole, cut in zip(free, found, strict=True):
        first = next(i for i, token in enumerate(whole.ids) if int(token) in tokens)
        assert cut.ids.tolist() == whole.ids[:first + 1].tolist()  # the end token is part of the answer
        assert cut.finished
    one = engine().generate(Origin(model), asked, Sampling(1))
    assert [c.ids.tolist() for c in one] == [c.ids[:1].tolist() for c in free]
    assert engine().generate(Origin(model), [], Sampling(4)) == []


def test_an_end_at_the_limit_counts_as_finished(load: Load) -> None:
    model, asked = load("qwen2"), requests()
    free = engine(set()).generate(Origin(model), asked, Sampling(4))
    last = {int(c.ids[3]) for c in free}
    assert all(c.finished for c in engine(last).generate(Origin(model), asked, Sampling(4)))


def test_stop_strings(load: Load) -> None:
    model, asked = load("qwen2"), requests()
    free = engine(set()).generate(Origin(model), asked, Sampling(12))
    ids = free[1].ids.tolist()
    stop = f"{ids[4]} {ids[5]}"  # over two tokens
    found = engine(set()).generate(Origin(model), asked, Sampling(12, stop=(stop, "never")))
    text = " ".join(map(str, ids))
    assert " ".join(map(str, found[1].ids)) == text[:text.index(stop) + len(stop)]
    assert found[1].finished
    for whole, cut in zip(free, found, strict=True):
        assert whole.ids[:len(cut.ids)].tolist() == cut.ids.tolist()


def test_a_stop_string_of_many_small_tokens() -> None:
    """A character may take four tokens (bytes), so the tail that is searched counts bytes."""
    def text(ids: Any) -> str:
        return bytes(int(i) for i in ids).decode(errors="ignore")
    stop = "🙂" * 12
    assert stopped([*stop.encode()], (stop,), text)
    assert not stopped([*stop.encode()], (stop + "x",), text)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_have_the_exact_distribution(load: Load, temperature: float) -> None:
    from scipy.stats import chisquare

    model, n = load("qwen2"), 4000
    found = engine(set()).generate(Origin(model), [Request(np.array(PROMPTS[0]), (7, i)) for i in range(n)],
                                   Sampling(2, temperature))
    exact = exact_logp(model, PROMPTS[0], temperature).exp().numpy()
    def pvalue(tokens: list[int], probability: np.ndarray) -> float:
        wanted, seen = probability * len(tokens), np.bincount(tokens, minlength=len(probability))
        common = wanted >= 5  # the rest is one class
        rest = [[x[~common].sum()] if wanted[~common].sum() > 0 else [] for x in (seen, wanted)]
        assert common.sum() > 5
        return float(chisquare([*seen[common], *rest[0]], [*wanted[common], *rest[1]]).pvalue)

    assert pvalue([int(c.ids[0]) for c in found], exact) > 0.01
    token = int(exact.argmax())  # and the second token given the likeliest first one
    given = exact_logp(model, [*PROMPTS[0], token], temperature).exp().numpy()
    assert pvalue([int(c.ids[1]) for c in found if c.ids[0] == token], given) > 0.01
    shifted = exact_logp(model, PROMPTS[0], temperature * 1.2).exp().numpy()
    assert pvalue([int(c.ids[0]) for c in found], shifted) < 0.01  # the test has the power to notice


def test_draws_at_the_edges() -> None:
    """Impossible tokens are never drawn, and rare ones at the end of a large vocabulary are."""
    logits = torch.full((3, 5), -float("inf"))
    logits[:, 1] = logits[:, 3] = 0.0
    token, raw, logp = native._draw(logits, 1.0, torch.tensor([0.0, 0.5, 1 - 2**-40], dtype=torch.float64))
    assert token.tolist() == [1, 3, 3]
    assert raw.tolist() == logp.tolist() == pytest.approx([np.log(0.5)] * 3)
    peaked = torch.full((1, 1001), np.log(1e-8))  # behind one likely token a thousand rare ones
    peaked[0, 0] = 0.0
    uniform = torch.linspace(1 - 1e-5, 1 - 1e-9, 1000, dtype=torch.float64)
    token, _, _ = native._draw(peaked.expand(1000, -1), 1.0, uniform)
    assert len(set(token.tolist())) > 950


@pytest.mark.parametrize("vocabulary", [5, 255, 256, 257, 1000, 5000])
def test_draws_through_blocks_are_those_of_one_running_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    p = torch.softmax(8 * torch.randn(400, vocabulary, generator=generator, dtype=torch.float64), -1)
    p[:, torch.randperm(vocabulary, generator=generator)[:vocabulary // 3]] = 0.0  # whole blocks of some rows, too
    p[:200, :vocabulary // 2] = 0.0
    p[torch.arange(400), vocabulary - 1 - torch.arange(400) % 3] += 1e-3
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    upto = p.cumsum(-1)
    plain = torch.searchsorted(upto, uniform[:, None] * upto[:, -1:], right=True)[:, 0]
    found = native._inverse(p, uniform)
    assert (p.gather(1, found[:, None]) > 0).all()
    assert found[2:].tolist() == plain[2:].tolist()


COMMON = {"vocab_size": 29, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 1, "initializer_range": 0.3}
USUAL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": USUAL, "phi3": {**USUAL, "sliding_window": 5}, "olmo2": USUAL,
    "opt": {**USUAL, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "mixtral": {**USUAL, "num_local_experts": 2},
    "gemma3_text": {**USUAL, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 5},
    "qwen2": {**USUAL, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},  # a mixed one
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_families_through_their_own_forward(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **FAMILIES[kind])).eval()
    assert isinstance(decoders.make_decoder(model, 4), decoders.ModelDecoder)
    asked = requests()
    found = engine().generate(Origin(model), asked, Sampling(10))
    for request, completion in zip(asked, found, strict=True):
        np.testing.assert_allclose(completion.raw_logps, policy_logps(model, request.prompt, completion), atol=1e-4)


def test_logits_that_are_not_finite_stop_the_engine(load: Load) -> None:
    model = load("qwen2")
    with torch.no_grad():
        model.base_model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        engine().generate(Origin(model), requests(), Sampling(3))


def test_the_chats_end_tokens_reach_the_engine(tiny_folder: Callable[[], Path]) -> None:
    chat = load_chat(ModelConfig(name_or_path=str(tiny_folder())))
    assert chat.eos_ids == {1}
    assert chat.pad_id == 0


def test_finished_answers_are_told_while_others_are_written(load: Callable[..., Any],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, with its whole text, and no later than the step that ends it."""
    steps: list[int] = []
    step = decoders.FastDecoder.step
    monkeypatch.setattr(decoders.FastDecoder, "step", lambda self, token: steps.append(1) or step(self, token))
    told: dict[int, tuple[list[int], int]] = {}

    def done(number: int, ids: np.ndarray) -> None:
        assert number not in told
        told[number] = (ids.tolist(), len(steps))

    asked = requests([[5, 6, 7]] * 24)
    found = engine(eos={1, 2, 3, 4, 5, 6}).generate(Origin(load("qwen2")), asked, Sampling(12, 1.0), done=done)
    assert told == {i: (c.ids.tolist(), len(c.ids) - 1) for i, c in enumerate(found) if c.finished}
    assert len({length for _, length in told.values()}) > 2


def test_the_roller_judges_whole_answers_early(session: Callable[..., Any]) -> None:
    one = session("grpo")
    judged: list[tuple[str, str]] = []
    one.roll.early = lambda problems, texts: judged.extend(zip((p.id for p in problems), texts, strict=True))
    problems = one.data.problems(4)
    prefixes = [np.array([5], dtype=np.int64)] * 16
    rows = one.roll(problems, prefixes=prefixes)
    finished = sorted((row.problem.id, row.text) for row in rows if row.finished)
    assert judged, "no answer was judged early"
    assert all(pair in finished for pair in judged)
    assert all(text.startswith(one.chat.text([5])) for _, text in judged)
