"""RL and on-policy distillation: expected gradients by enumeration on a real model, and a whole update against loops
over rows and tokens with a teacher that is read here by hand."""

from __future__ import annotations

import atexit
import itertools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import run_config
from mutation import Mutant, mutants
from torch import Tensor
from transformer import PROBLEM, VOCABULARY, build, build_policy, make_batch, merged, wide_norm

from bridgelm.config.run_config import make_config
from bridgelm.methods import kdrl
from bridgelm.model import grads
from bridgelm.objective import losses
from bridgelm.rollout import teacher, teacher_ids
from bridgelm.types import Grade, Row, Verdict
from tiny import open_session, raw_config, save_model

CLAMP = 50.0  # wider than any ratio here, unless said otherwise


def method_of(**options: Any) -> Any:
    config = run_config({"name": "kdrl", "clamp": CLAMP, **options}, 10)
    return kdrl.Kdrl(config.method, config)


# -- the three estimators, by enumeration ------------------------------------------------------------------------------


class Enumerated:
    """All answers of two tokens to one prompt, from a real policy and another real model as its teacher."""

    def __init__(self) -> None:
        self.policy = build_policy()
        del self.policy.groups["w"], self.policy.groups["shadow"]
        self.teacher = build()
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for p in self.teacher.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        weights = merged(self.policy, "live", with_w=False)
        self.params = {n: t.detach().clone().requires_grad_() for n, t in weights.items()}
        answers = list(itertools.product(range(VOCABULARY), repeat=2))
        self.ids = torch.tensor([[3, 5, a, b] for a, b in answers])
        logits = torch.func.functional_call(self.policy.model, self.params, (self.ids,)).logits
        self.student_BTV = logits.log_softmax(-1)
        self.teacher_BTV = self.teacher(self.ids).logits.log_softmax(-1).detach()

    def of_drawn(self, logp_BTV: Tensor) -> Tensor:
        return logp_BTV[:, 1:3].gather(2, self.ids[:, 2:, None])[..., 0]

    def rows(self) -> list[Row]:
        """Each answer weighs its probability, so that the sum over rows is the mean over answers."""
        student, teacher = self.of_drawn(self.student_BTV).detach(), self.of_drawn(self.teacher_BTV)
        out = []
        for ids, logp, other in zip(self.ids.numpy(), student, teacher.numpy()):
            row = Row(ids, np.arange(4) >= 2, "rollout", PROBLEM, verdict=Verdict.WRONG, reward=0.0,
                      teacher_logps=np.concatenate([[np.nan, np.nan], other]))
            out.append(row.with_stream("kd", float(logp.sum().exp()), "constant", 1 / len(self.ids)))
        return out

    def exact(self, divergence: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """Gradient of the divergence of each token's distribution, over the policy's own prefixes, held fixed."""
        weight = self.of_drawn(self.student_BTV).detach().sum(1).exp()
        of_token = divergence(self.student_BTV[:, 1:3], self.teacher_BTV[:, 1:3]).sum(-1)
        found = torch.autograd.grad((weight[:, None] * of_token).sum(), list(self.params.values()), retain_graph=True)
        return dict(zip(self.params, found))


enumerated = cache(Enumerated)


def reverse(p: Tensor, q: Tensor) -> Tensor:
    return p.exp() * (p - q)


def forward(p: Tensor, q: Tensor) -> Tensor:
    return q.exp() * (q - p)


WANTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": lambda p, q: 0 * p, "k2": reverse, "k3": forward}


@pytest.mark.parametrize("estimator", WANTED)
def test_what_each_estimator_teaches_on_average(estimator: str) -> None:
    """k2: the gradient of KL(pi || pi_T). k3: that of KL(pi_T || pi). k1: none at all."""
    wanted = enumerated().exact(WANTED[estimator])
    terms = method_of(estimator=estimator).terms
    found = enumerated().policy.grad(terms, make_batch(enumerated().rows()), {"kd": 1.0}).theta
    assert grads.norm(enumerated().exact(reverse)) > 0.1, "two models that agree could not tell the estimators apart"
    assert grads.norm(grads.mix((1.0, found), (-1.0, wanted))) < 1e-9


def test_values_of_the_estimators() -> None:
    """k1 and k3 have the mean of the KL; that of k2 is another."""
    batch = make_batch(enumerated().rows())
    weight = enumerated().of_drawn(enumerated().student_BTV).detach().sum(1).exp()
    student, teacher = enumerated().student_BTV[:, 1:3].detach(), enumerated().teacher_BTV[:, 1:3]
    kl = float((weight[:, None] * reverse(student, teacher).sum(-1)).sum())
    value = {name: enumerated().policy.grad(method_of(estimator=name).terms, batch, {"kd": 1.0}).losses["kd"]
             for name in WANTED}
    assert value["k1"] == pytest.approx(kl, rel=1e-9)
    assert value["k3"] == pytest.approx(kl, rel=1e-9)
    r = (enumerated().of_drawn(enumerated().teacher_BTV) - enumerated().of_drawn(enumerated().student_BTV)).detach()
    assert value["k2"] == pytest.approx(float((weight[:, None] * r**2 / 2).sum()), rel=1e-9)
    assert abs(value["k2"] - kl) > 0.05 * kl


@pytest.mark.parametrize("estimator", WANTED)
def test_beyond_the_clamp_the_gradient_is_that_at_the_clamp(estimator: str) -> None:
    at = {"k1": lambda r: -1.0, "k2": lambda r: r, "k3": lambda r: math.expm1(r)}[estimator]
    for r in (-9.0, -2.0, -0.3, 0.0, 1.7, 2.0, 6.0):
        logp = torch.tensor([[0.0, -1.0 - r]], dtype=torch.float64, requires_grad=True)
        other = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
        value = losses.kl(logp, other, estimator, 2.0)[0, 1]
        slope = torch.autograd.grad(value, logp)[0][0, 1]
        assert float(slope) == pytest.approx(-at(min(max(r, -2.0), 2.0)), abs=1e-12)
        step = 1e-6
        up, down = (losses.kl(logp.detach() + e, other, estimator, 2.0)[0, 1] for e in (step, -step))
        if abs(abs(r) - 2.0) > 0.01:
            assert float((up - down) / (2 * step)) == pytest.approx(float(slope), abs=1e-6), "and the value's own slope"


# -- a whole update ----------------------------------------------------------------------------------------------------


class Ruled:
    """Rewards are shaped: a wrong answer may score above a right one, so that only the verdict says which is which."""

    last_error = ""

    def __init__(self, right: Callable[[int], bool]) -> None:
        self.right = right

    def grade(self, problems: Any, texts: Any) -> list[Grade]:
        return [Grade(0.3 + 0.1 * (i % 3), Verdict.CORRECT if self.right(i) else Verdict.WRONG)
                for i in range(len(texts))]

    def close(self) -> None:
        pass


# Two groups of four: the first has right answers, the second has none.
MIXED = Ruled(lambda i: i < 4 and i % 2 == 0)
TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'user' %}<user> sum ; {{ m['content'] }} {% else %}"
            "<bot> {{ m['content'] }} <user> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}")


@cache
def world() -> dict[str, Any]:
    """A tiny one whose teacher has other weights, another template, and another end token."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "teacher").mkdir(parents=True)
    made = save_model(folder / "teacher", "llama", seed=4, scale=0.4)
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    settings = made / "generation_config.json"
    settings.write_text(settings.read_text().replace('"eos_token_id": 1', '"eos_token_id": [1, 3]'))
    return raw_config(folder, {}, rollout={"prompts": 2, "group": 4, "max_new_tokens": 5, "temperature": 0.8},
                      teacher={"name_or_path": str(made), "chat_template": str(template)})


def opened(grader: Any = MIXED, **options: Any) -> Any:
    settings = {"name": "kdrl", "clamp": 1.5, "beta": 0.4, "delta": 0.1, "beta_min": 0.25, **options}
    out = tempfile.mkdtemp(dir=Path(world()["teacher"]["name_or_path"]).parent)
    session = open_session(make_config({**world(), "method": settings, "out": out}))
    session.roll.grader.close()
    session.roll.grader = grader
    OPEN.append(session)
    session.roll.begin(0)
    return session


OPEN: list[Any] = []


@pytest.fixture(autouse=True)
def _sessions() -> Iterator[None]:
    with wide_norm():
        yield
    while OPEN:
        OPEN.pop().folder.close()


class ByHand:
    """(1) and (2) as loops over rows and tokens, with the teacher read here."""

    def __init__(self, session: Any, rows: list[Row], mask: str) -> None:
        self.o, self.rows = session.config.method, rows
        tokenizer = session.chat.tokenizer
        end, model = 1, session.roll.teacher.model
        self.r: list[dict[int, float]] = []  # place -> R, of the tokens that the teacher judges
        for row in rows:
            prompt = tokenizer.encode(f"<user> sum ; {row.problem.prompt} <bot>", add_special_tokens=False)
            answer = row.ids[row.own].tolist()
            start = len(row.ids) - len(answer)
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0] / 0.8
            logp = logits.log_softmax(-1)
            self.r.append({start + t: float(logp[len(prompt) + t - 1, token]) - float(row.old_logps[start + t])
                           for t, token in enumerate(answer) if token != end})
        solved = {row.group for row in rows if row.verdict is Verdict.CORRECT}
        asked = {"none": lambda row: True, "response": lambda row: row.verdict is Verdict.WRONG,
                 "group": lambda row: row.group not in solved}[mask]
        self.kept = [asked(row) for row in rows]
        self.tokens = sum(int(row.own.sum()) for row in rows)

    def near(self, r: float) -> float:
        return min(max(r, -self.o.clamp), self.o.clamp)

    def advantage(self, row: Row) -> float:
        group = [other.reward for other in self.rows if other.group == row.group]
        return row.reward - sum(group) / len(group)

    def kd(self) -> float:
        """Mean of k2 over all drawn tokens, straight beyond the clamp."""
        total = 0.0
        for r_of, kept in zip(self.r, self.kept):
            for r in r_of.values() if kept else ():
                c = self.near(r)
                total += c * c / 2 + c * (r - c)
        return total / self.tokens

    def metrics(self, beta: float) -> dict[str, float]:
        every = [r for r_of in self.r for r in r_of.values()]
        mine = [(self.o.rl_weight * self.advantage(row), self.near(r))
                for row, r_of, kept in zip(self.rows, self.r, self.kept) if kept for r in r_of.values()]
        near = [self.near(r) for r in every]
        return {"kdrl/gap": np.mean(every), "kdrl/k2": np.mean([r * r / 2 for r in near]),
                "kdrl/kl": np.mean([math.exp(r) - r - 1 for r in near]),
                "kdrl/clamped": np.mean([abs(r) > self.o.clamp for r in every]), "kdrl/kept": len(mine) / self.tokens,
                "kdrl/flipped": np.mean([a * (a + beta * r) < 0 for a, r in mine]), "kdrl/beta": beta}


def check_update(mask: str = "none", step: int = 1, **options: Any) -> None:
    session = opened(mask=mask, **options)
    policy, method = session.policy, session.method
    rows = method.gather(session.data, session.roll, 0)
    assert any(row.ids[-1] == 1 for row in rows), "no answer ended: the mask of the end token would not be seen"
    hand = ByHand(session, rows, mask)
    beta = {0: 0.4, 1: 0.3, 2: 0.25, 7: 0.25}[step]
    batch = make_batch(rows)
    parts = {name: policy.grad(method.terms, batch, {name: 1.0}) for name in ("pg", "kd")}
    assert parts["kd"].losses["kd"] == pytest.approx(hand.kd(), rel=1e-9)
    seen: list[Any] = []
    policy.apply = lambda name, g, **_: seen.append(g) or 0.0
    metrics = method.update(policy, batch, step)
    wanted = grads.mix((options.get("rl_weight", 1.0), parts["pg"].theta), (beta, parts["kd"].theta))
    assert grads.norm(grads.mix((1.0, seen[0]), (-1.0, wanted))) < 1e-12
    found = {key: value for key, value in metrics.items() if key.startswith("kdrl/")}
    assert found == pytest.approx(hand.metrics(beta), rel=1e-9)
    assert 0 < found["kdrl/clamped"] < 1
    assert mask == "none" or 0 < found["kdrl/kept"] < 1
    # On the policy's own tokens, a token's advantage has become A + beta R: the gradient is that of these weights.
    place = {id(row): i for i, row in enumerate(rows)}
    credited = [row.with_stream("pg", np.array([options.get("rl_weight", 1.0) * hand.advantage(row) + beta * (
        hand.near(hand.r[place[id(row)]].get(t, 0.0)) if hand.kept[place[id(row)]] else 0.0)
        for t in range(len(row.ids))])) for row in rows]
    same = policy.grad(method.terms, make_batch(credited), {"pg": 1.0}).theta
    assert grads.norm(grads.mix((1.0, seen[0]), (-1.0, same))) < 1e-7 * grads.norm(same)


@pytest.mark.parametrize(("mask", "step", "options"), [
    ("none", 1, {}), ("response", 2, {"rl_weight": 0.5}), ("group", 7, {}), ("none", 0, {"rl_weight": 0.0})], ids=str)
def test_an_update_is_the_two_equations(mask: str, step: int, options: dict[str, Any]) -> None:
    check_update(mask=mask, step=step, **options)


# -- schedule and limits -----------------------------------------------------------------------------------------------


def test_beta_reaches_its_end_at_the_papers_step() -> None:
    beta = [method_of().beta(step) for step in range(280)]
    assert beta[0] == 5e-3
    assert beta[40] == pytest.approx(3e-3)
    assert beta[79] == pytest.approx(1.05e-3)
    assert beta[80:] == pytest.approx([1e-3] * 200)
    assert all(a > b for a, b in itertools.pairwise(beta[:81]))
    constant = method_of(beta=2e-3, delta=0.0)
    assert {constant.beta(step) for step in range(280)} == {2e-3}


@pytest.mark.parametrize("mask", ["none", "response", "group"])
@pytest.mark.parametrize("right", [True, False])
def test_flat_groups_leave_the_teacher_alone(mask: str, right: bool) -> None:
    """All right: nothing is left with a mask, and the teacher without. All wrong: the teacher, whatever the mask."""
    class Flat(Ruled):
        def grade(self, problems: Any, texts: Any) -> list[Grade]:
            return [Grade(float(right), Verdict.CORRECT if right else Verdict.WRONG)] * len(texts)

    session = opened(grader=Flat(bool), mask=mask)
    rows = session.method.gather(session.data, session.roll, 0)
    hand = ByHand(session, rows, mask)
    seen: list[Any] = []
    session.policy.apply = lambda name, g, **_: seen.append(g) or 0.0
    metrics = session.method.update(session.policy, make_batch(rows), 0)
    assert metrics["loss/pg"] == 0.0
    assert metrics["loss/kd"] == pytest.approx(0.4 * hand.kd(), rel=1e-9)
    assert (grads.norm(seen[0]) == 0) == (right and mask != "none")


def test_a_teacher_that_is_the_policy_teaches_nothing(tmp_path: Path) -> None:
    """At another temperature than 1 as well: both are read at that of the rollouts."""
    raw = raw_config(tmp_path, {"name": "kdrl", "beta": 1.0, "delta": 0.0, "rl_weight": 0.0},
                     rollout={"prompts": 2, "group": 4, "max_new_tokens": 5, "temperature": 0.7})
    raw["teacher"] = {"name_or_path": raw["model"]["name_or_path"]}
    session = open_session(make_config(raw))
    OPEN.append(session)
    session.roll.begin(0)
    rows = session.method.gather(session.data, session.roll, 0)
    assert not any(np.isnan(row.teacher_logps[row.own]).any() for row in rows), "the same end token is judged too"
    found = session.policy.grad(session.method.terms, make_batch(rows), {"kd": 1.0})
    assert abs(found.losses["kd"]) < 1e-20
    assert grads.norm(found.theta) < 1e-10


def test_failed_grades_leave_their_group_and_are_not_distilled() -> None:
    class Failing(Ruled):
        def grade(self, problems: Any, texts: Any) -> list[Grade]:
            found = super().grade(problems, texts)
            return [Grade(0.0, Verdict.ERROR) if i == 1 else grade for i, grade in enumerate(found)]

    session = opened(grader=Failing(lambda i: i % 2 == 0))
    rows = session.method.gather(session.data, session.roll, 0)
    assert ["kd" in row.streams for row in rows] == [i != 1 for i in range(8)]
    assert make_batch(rows).counts["kd"] == make_batch(rows).counts["pg"]


def test_k1_and_a_far_teacher_are_warned_of() -> None:
    assert "no gradient" in method_of(estimator="k1").warnings({})[0]
    assert "kdrl/clamped" in method_of().warnings({"kdrl/clamped": 0.2})[0]
    assert method_of().warnings({"kdrl/clamped": 0.01}) == []


MUTANTS = mutants(
    kdrl,
    Mutant("sign", "Kdrl.beta", by=test_beta_reaches_its_end_at_the_papers_step),
    Mutant("clip", "Kdrl.beta", "max 1", by=test_beta_reaches_its_end_at_the_papers_step),  # without its end
    Mutant("instead", "masked", "verdict 1", to="finished", by=lambda: check_update("response")),
    Mutant("compare", "masked", "group 0", by=lambda: check_update("group")),
    Mutant("mask", "with_distillation", "isnan 2", by=check_update),
    Mutant("term", "Kdrl.terms", 1, by=check_update),  # the weight, and so the mask, is left out
    Mutant("denominator", "kl", by=test_values_of_the_estimators, of=losses),  # k2 without its half
    Mutant("swap", "kl", 0, by=lambda: test_what_each_estimator_teaches_on_average("k3"), of=losses),  # its inverse
    Mutant("mask", "Reader.shown", "isin 0", by=check_update, of=teacher_ids),  # ends that are not its own
    Mutant("constant", "Teacher.score", "temperature 0", to=1.0, by=check_update, of=teacher),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
