"""`guide` against exact expectations over every answer, plain loops, and finite differences; and mutants of each line.

Test C stands for the two policies: one token, the guide's logit of action 1 is 1.2, theta's is .4, and R = 1[a = 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import close
from exact import run_config, sigmoid
from mutation import Mutant, mutants
from ratios import ANSWERS, JOINT_2, PROBLEM, SHADOW_2, logp_2, row, slope
from torch import Tensor
from transformer import VOCABULARY, all_logps, build, merged, spread

from bridgelm.config.run_config import OptimConfig
from bridgelm.errors import UserError
from bridgelm.ledger import Ledger
from bridgelm.methods import guide as module
from bridgelm.methods.guide import Guide
from bridgelm.model import batching
from bridgelm.model.policy import Grads, Policy
from bridgelm.objective import credit, losses
from bridgelm.types import Live, Row, Verdict

pytestmark = pytest.mark.usefixtures("wide_norms")

GUIDE, THETA = 1.2, 0.4
LogP = Callable[[Tensor, Row], Tensor]


# -- a policy of a few logits, and rollouts that are handed out -------------------------------------------------------


def logp_1(z: Tensor, r: Row) -> Tensor:
    value = torch.nn.functional.logsigmoid(z[0] if r.ids[1] else -z[0])
    return torch.stack([torch.zeros_like(value), value])


class Table:
    """theta and w are tables of logits and the point `guide` is their sum. It takes no step: `applied` keeps what would
    be stepped with, and `asked` the order of calls."""

    def __init__(self, guide: Any, theta: Any, logp: LogP = logp_1) -> None:
        self.theta, both = (torch.tensor(np.atleast_1d(x), dtype=torch.float64) for x in (theta, guide))
        self.w, self.logp, self.points = both - self.theta, logp, ()
        self.rates: dict[str, float | None] = {}
        self.applied: dict[str, np.ndarray] = {}
        self.asked: list[tuple[str, str]] = []

    def add_w(self, rank: int, alpha: float, modules: str = "", points: tuple[str, ...] = ()) -> None:
        self.points = points

    def optimiser(self, name: str, lr: float | None = None) -> None:
        self.rates[name] = lr

    def logits(self, at: str, theta: Tensor, w: Tensor) -> Tensor:
        return theta if at == "live" and self.points else theta + w

    def score(self, rows: list[Row], at: str = "live") -> list[np.ndarray]:
        return [self.logp(self.logits(at, self.theta, self.w), r).numpy() for r in rows]

    def grad(self, terms: Any, batch: Any, coef: dict[str, float], at: str = "live") -> Grads:
        self.asked.append(("grad", at))
        theta, w = (x.clone().requires_grad_() for x in (self.theta, self.w))
        rows = list(batch.rows)
        micro = batching.collate(rows, torch.float64, torch.device("cpu"), {})
        values = terms(micro, Live(torch.stack([self.logp(self.logits(at, theta, w), r) for r in rows])))
        parts = {n: c * (values[n] * micro.scale[n]).sum() / batch.counts[n] for n, c in coef.items() if n in values}
        loss = sum(parts.values(), 0.0 * (theta.sum() + w.sum()))
        g, h = torch.autograd.grad(loss, (theta, w))
        return Grads({"x": g}, {"x": h}, {n: float(v.detach()) for n, v in parts.items()}, {})

    def apply(self, name: str, gradient: dict[str, Tensor]) -> float:
        self.asked.append(("apply", name))
        self.applied[name] = -gradient["x"].numpy()
        return float(gradient["x"].norm())


class Handed:
    """A roller that hands out given answers one after the other. `probability`: of drawing them all where asked to."""

    def __init__(self, policy: Any, answers: Any, reward: Callable[[tuple[int, ...]], float]) -> None:
        self.policy, self.answers, self.reward = policy, iter(answers), reward
        self.probability, self.made = 1.0, 0
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, problems: Any, group: int, at: str = "live") -> list[Row]:
        self.calls.append((at, len(problems), group))
        out = []
        for i, _ in enumerate(problems):
            for _ in range(group):
                answer = next(self.answers, None)
                assert answer is not None, "more rollouts than a step has"
                blank = row(answer, [0.0] * len(answer), self.reward(answer), self.made + i)
                logps = self.policy.score([blank], at)[0]
                self.probability *= math.exp(logps.sum())
                out.append(replace(blank, at=at, old_logps=logps))
        self.made += len(problems)
        return out

    def demo(self, problem: Any, demo: Any) -> Row:
        return replace(row(demo, [0.0] * len(demo)), kind="demo", reward=math.nan, verdict=None)


def data(demos: Any = ()) -> Any:
    return SimpleNamespace(problems=lambda n: [PROBLEM] * n, demos=lambda n: [(PROBLEM, d) for d in demos])


def method_of(prompts: int = 1, group: int = 4, rollout: Any = (), **options: Any) -> Any:
    config = run_config({"name": "guide", **options}, rollout={"prompts": prompts, "group": group, **dict(rollout)})
    return Guide(config.method, config)


def won(answer: tuple[int, ...]) -> float:
    return float(answer[0])


def one_update(method: Any, policy: Any, answers: Any, reward: Any = won, demos: Any = (), step: int = 0) -> Any:
    method.setup(policy)
    roll = Handed(policy, answers, reward)
    rows = method.gather(data(demos), roll, step)
    metrics = method.update(policy, batching.make_batch(rows), step)
    return SimpleNamespace(roll=roll, rows=rows, metrics=metrics, applied=policy.applied)


def expect(found: Callable[[Any], Any], guide: Any = GUIDE, theta: Any = THETA, logp: LogP = logp_1,
           answers: Any = ((0,), (1,)), group: int = 4, reward: Any = won, **options: Any) -> np.ndarray:
    """The exact mean over all outcomes of one group."""
    total, mass = 0.0, 0.0
    for outcome in itertools.product(answers, repeat=group):
        end = one_update(method_of(group=group, **options), Table(guide, theta, logp), outcome, reward)
        total, mass = total + end.roll.probability * np.asarray(found(end)), mass + end.roll.probability
    close(mass, 1.0, 1e-14, "all outcomes")
    return np.asarray(total)


# -- the checks --------------------------------------------------------------------------------------------------------


def test_gain_is_unbiased() -> None:
    names = ("guide/gain", "guide/theta_reward", "guide/guide_reward")
    for share, guided in ((0.5, 2), (0.25, 1), (0.75, 3)):
        found = expect(lambda end: [end.metrics[n] for n in names], share=share)
        close(found, [sigmoid(1.2) - sigmoid(0.4), sigmoid(0.4), sigmoid(1.2)], 1e-15, f"{guided} of 4 guided")
    close(found[0], 0.169837, 5e-7, "the printed gap of test C")


def test_lead_is_unbiased() -> None:
    """w's RL gradient is dJ(theta + w)/dw, whatever theta's half scores and however far it is from the guide."""
    for guide, theta in ((GUIDE, THETA), (-0.3, 2.0), (0.5, 0.5)):
        found = expect(lambda end: end.applied["w"], guide, theta, **{"lambda": 1.0, "kappa": 0.0})
        close(found, slope(guide), 1e-15, f"guide {guide}, theta {theta}")


def demo_steps(z: float, demos: Any) -> float:
    return float(np.mean([d[0] - sigmoid(z) for d in demos]))


def by_hand(outcome: Any, lam: float, kappa: float, shape: float, cap: float, std: bool, demos: Any) -> Any:
    """(1) and (2) on one group of two own and two guided answers of test C."""
    p_theta, p_guide = sigmoid(THETA), sigmoid(GUIDE)
    actions = [answer[0] for answer in outcome]
    mean = sum(actions) / 4
    spread_ = math.sqrt(mean * (1 - mean)) + 1e-6 if std else 1.0
    theta = w = 0.0
    for i, action in enumerate(actions):
        advantage = (action - mean) / spread_
        q_theta, q_guide = (p if action else 1 - p for p in (p_theta, p_guide))
        if i < 2:
            weight = 1.0
        else:
            weight = shape * q_theta / (q_theta + shape) ** 2 if advantage > 0 else min(q_theta / q_guide, cap)
            pull = math.log(q_guide) - math.log(q_theta)
            w += (lam * (action - (actions[0] + actions[1]) / 2) - kappa * pull) * (action - p_guide) / 2
        theta += advantage * weight * (action - p_theta) / 4
    return theta, w + (1 - lam) * demo_steps(GUIDE, demos)


SETTINGS = (
    {"lam": 0.5, "kappa": 0.01, "shape": 0.1, "cap": 2.0, "std": False},  # the defaults
    {"lam": 0.8, "kappa": 0.7, "shape": 0.6, "cap": 1.5, "std": True},  # the cap binds: action 0 has the ratio 1.7337
    {"lam": 0.0, "kappa": 0.3, "shape": 0.3, "cap": 0.5, "std": False},
)


def test_equations() -> None:
    demos = [(1,), (1,), (0,)]
    for settings in SETTINGS:
        names = {"lambda": "lam", "kappa": "kappa", "shape": "shape", "ratio_cap": "cap"}
        options = {key: settings[name] for key, name in names.items()} | {"rl": {"std": settings["std"]}}
        for outcome in itertools.product(((0,), (1,)), repeat=4):
            end = one_update(method_of(**options), Table(GUIDE, THETA), outcome, demos=demos)
            theta, w = by_hand(outcome, demos=demos, **settings)  # type: ignore[arg-type]
            close(end.applied["theta"], theta, 1e-14, f"theta on {outcome}, {settings}")
            close(end.applied["w"], w, 1e-14, f"w on {outcome}, {settings}")
        flat = one_update(method_of(), Table(GUIDE, THETA), [(1,)] * 4, lambda _: 0.1, demos=demos)
        assert not flat.applied["theta"].any(), "equal rewards teach theta nothing, to the bit"
        assert not any(np.any(r.streams["lead"].weight) for r in flat.rows if "lead" in r.streams)


def test_pull_is_the_gradient_of_the_kl() -> None:
    """Exact for one token; for two, the gradient of each token's KL with the prefixes held as the guide draws them."""
    options = {"lambda": 1.0, "kappa": 1.0, "reward": lambda _: 1.0}
    for guide, theta in ((GUIDE, THETA), (-0.5, 0.7)):
        found = expect(lambda end: end.applied["w"], guide, theta, **options)

        def kl(z: float, t: float = theta) -> float:
            p, q = sigmoid(z), sigmoid(t)
            return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

        close(found, -(guide - theta) * slope(guide), 1e-15, "one token, in closed form")
        close(found, -(kl(guide + 1e-5) - kl(guide - 1e-5)) / 2e-5, 1e-10, "one token, by finite differences")
    found = expect(lambda end: end.applied["w"], JOINT_2, SHADOW_2, logp_2, ANSWERS, 2, **options)
    reach = np.array([1.0, 1 - sigmoid(JOINT_2[0]), sigmoid(JOINT_2[0])])
    wanted = reach * (JOINT_2 - SHADOW_2) * np.array([slope(z) for z in JOINT_2])
    close(found, -wanted / 2, 1e-15, "two tokens: a mean over both")


def test_denominators() -> None:
    """Both of theta's terms are divided by the union's tokens, whatever the halves' sizes."""
    for share, guided in ((0.5, 2), (0.25, 1), (0.75, 3)):
        for aggregate, wanted in (("token", 4 * 3.0), ("row", 4.0), ("constant", 4 * 7.0)):
            method = method_of(share=share, rl={"aggregate": aggregate}, rollout={"max_new_tokens": 7})
            end = one_update(method, Table(GUIDE, THETA, logp_long), [(0, 1, 1), (1, 0, 0)] * 2)
            counts = batching.make_batch(end.rows).counts
            close([counts["pg"], counts["guided"]], wanted, 0.0, f"{guided} guided, {aggregate}")
            close([counts["lead"], counts["tie"]], wanted * guided / 4, 0.0, "w's terms are the guide's alone")
            assert all(np.any(r.streams["pg"].weight) == (r.at == "live") for r in end.rows)
            assert all(np.any(r.streams["guided"].weight) == (r.at == "guide") for r in end.rows)


def logp_long(z: Tensor, r: Row) -> Tensor:
    return torch.cat([logp_1(z, r), torch.zeros(len(r.ids) - 2, dtype=torch.float64)])


def test_halves_of_a_group() -> None:
    method = method_of(prompts=3, group=6, share=0.3)
    end = one_update(method, Table(GUIDE, THETA), [(i % 2,) for i in range(18)])
    assert end.roll.calls == [("live", 3, 4), ("guide", 3, 2)], "3 x 6 rollouts, as in every other method"
    assert [(r.at, r.group) for r in end.rows] == [("live", g) for g in (0, 1, 2) for _ in range(4)] + [
        ("guide", g) for g in (0, 1, 2) for _ in range(2)
    ]
    for r in end.rows:
        q_theta, q_guide = (sigmoid(z if r.ids[1] else -z) for z in (THETA, GUIDE))
        close(math.exp(r.old_logps[1]), q_guide if r.at == "guide" else q_theta, 1e-15, "who sampled it")
        if r.at == "guide":
            close(math.exp(r.ref_logps[1]), q_theta, 1e-15, "theta's own probability of it")
    for share, wanted in ((0.01, 1), (0.99, 5), (0.42, 3), (0.41, 2)):
        end = one_update(method_of(prompts=3, group=6, share=share), Table(GUIDE, THETA), [(1,)] * 18)
        assert end.roll.calls == [("live", 3, 6 - wanted), ("guide", 3, wanted)], "neither half is ever empty"


GAINS = (1.0, -0.5, 0.5, -2.0, 0.5, 2.0, 0.0, 1.0)
# At decay 1/2, from 0; the largest so far is .5, then .90625.
MEANS = (0.5, 0.0, 0.25, -0.875, -0.1875, 0.90625, 0.453125, 0.7265625)
SHARES = (0.5, 0.5, 0.5, 0.25, 0.0, 0.0, 0.5, 0.25)


def test_annealing() -> None:
    method, policy = method_of(prompts=2, group=4, warmup=3, decay=0.5), Table(GUIDE, THETA)
    for step, (gain, share, mean) in enumerate(zip(GAINS, SHARES, MEANS)):
        guided = max(1, round(4 * share))
        answers = [(0,)] * 2 * (4 - guided) + [(1,)] * 2 * guided
        again = method_of(prompts=2, group=4, warmup=3, decay=0.5)
        again.load(method.state())
        method = again  # a resumed run follows the same schedule
        end = one_update(method, policy, answers, lambda a, g=gain: g * a[0], step=step)
        assert end.roll.calls[1] == ("guide", 2, guided), f"step {step}"
        close(end.metrics["guide/share"], share, 1e-15, f"share at step {step}")
        close(end.metrics["guide/gain"], gain, 1e-15, f"gain at step {step}")
        close(end.metrics["guide/gain_mean"], mean, 1e-15, f"mean at step {step}")
        assert bool(method.warnings(end.metrics)) == (share == 0.0)


class Graded(Handed):
    """Rewards are given, too; a verdict in the place of one is a fault of the grader."""

    def __init__(self, policy: Any, answers: Any, given: list[Any]) -> None:
        super().__init__(policy, answers, won)
        self.given = iter(given)

    def __call__(self, problems: Any, group: int, at: str = "live") -> list[Row]:
        rows = super().__call__(problems, group, at)
        return [
            replace(r, verdict=x, reward=9.0) if isinstance(x, Verdict) else replace(r, reward=x)
            for r, x in zip(rows, self.given)
        ]


def test_gain_over_problems() -> None:
    """A mean over problems with its standard error; failed grades are left out, and so is a half that has no other."""
    E = Verdict.ERROR
    own = [[1.0, 0.0, 0.0], [0.5, E, 1.0], [E, E, E], [0.0, 0.0, 0.0]]
    led = [[1.0, 1.0, E], [0.0, 0.2, 0.4], [1.0, 1.0, 0.0], [E, E, E]]
    gains = [1.0 - 1 / 3, 0.2 - 0.75]
    method, policy = method_of(prompts=4, group=6, kappa=0.0), Table(GUIDE, THETA)
    method.setup(policy)
    given = [x for half in (own, led) for group in half for x in group]
    rows = method.gather(data(), Graded(policy, [(i % 2,) for i in range(24)], given), 0)
    found = method.update(policy, batching.make_batch(rows), 0)
    close(found["guide/gain"], sum(gains) / 2, 1e-15, "the gain")
    close(found["guide/gain_se"], abs(gains[0] - gains[1]) / 2, 1e-15, "its standard error over two problems")
    close(found["guide/theta_reward"], (1 / 3 + 0.75) / 2, 1e-15)
    close(found["guide/guide_reward"], (1.0 + 0.2) / 2, 1e-15)
    q = {
        a: 0.5 * (math.log(sigmoid(GUIDE if a else -GUIDE)) - math.log(sigmoid(THETA if a else -THETA))) ** 2
        for a in (0, 1)
    }
    close(found["guide/kl"], np.mean([q[i % 2] for i in range(12, 24)]), 1e-15, "mean k2 of the guided rows")
    led_rows = [r for r in rows if r.at == "guide"]
    leads = [None if "lead" not in r.streams else float(r.streams["lead"].weight[-1]) for r in led_rows]
    wanted = [2 / 3, 2 / 3, None, -0.75, -0.55, -0.35, None, None, None, None, None, None]
    assert [x is None for x in leads] == [x is None for x in wanted]
    close([x for x in leads if x is not None], [x for x in wanted if x is not None], 1e-15, "R - R_theta")
    third = [float(r.streams["guided"].weight[-1]) for r in led_rows if r.group == 2]
    close(third, [1 / 3, 1 / 3, -2 / 3], 1e-15, "a half without grades: theta learns from the other")
    assert not any({"pg", "guided", "lead"} & r.streams.keys() for r in rows if r.verdict is E)
    nobody = method_of(group=2)
    rows = nobody.gather(data(), Graded(policy, [(1,), (1,)], [E, E]), 0)
    assert nobody.measured.keys() == {"guide/share", "guide/kl", "guide/gain_mean"} and nobody.mean == 0.0
    assert nobody.update(policy, batching.make_batch(rows), 0)["guide/gain_mean"] == 0.0
    alone = one_update(method_of(), Table(GUIDE, THETA), [(0,), (1,), (1,), (0,)])
    assert "guide/gain_se" not in alone.metrics, "one problem has no standard error"


# -- a real transformer ------------------------------------------------------------------------------------------------


class Drawn:
    """Rows of unequal lengths with one tool word, one failed grade a half, one unfinished row a half."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.made, self.rng = policy, 0, np.random.default_rng(4)

    def __call__(self, problems: Any, group: int, at: str = "live") -> list[Row]:
        rows = []
        for i in range(len(problems) * group):
            prompt, answer = int(self.rng.integers(1, 4)), int(self.rng.integers(1, 7))
            ids = self.rng.integers(0, VOCABULARY, prompt + answer)
            own = np.arange(len(ids)) >= prompt
            if answer > 4:
                own[prompt + 2] = False
            verdict = Verdict.ERROR if i == 1 else Verdict.WRONG
            reward = float(self.rng.choice([0.0, 0.3, 1.0]))
            rows.append(Row(ids, own, "rollout", PROBLEM, self.made + i // group, at, 0.7, None, None, reward, verdict,
                            finished=i != 4))
        self.made += len(problems)
        return [replace(r, old_logps=np.where(r.own, x, 0.0)) for r, x in zip(rows, self.policy.score(rows, at))]

    def demo(self, problem: Any, demo: Any) -> Row:
        ids = np.random.default_rng(demo).integers(0, VOCABULARY, 4 + demo)
        return Row(ids, np.arange(len(ids)) >= 2, "demo", problem)


def real_policy(method: Any, lora: bool, w: float = 0.15) -> Policy:
    config = OptimConfig.model_validate({"kind": "sgd", "lr": 0.05, "clip": None})
    policy = Policy(build(), config, Ledger(1), micro_tokens=24, seed=5, lora=(2, 3.0, "") if lora else None)
    spread(policy, "theta", 0.05, 0)
    method.setup(policy)
    spread(policy, "w", w, 2)
    return policy


def weigh(method: Any, rows: list[Row]) -> dict[int, tuple[float, float | None]]:
    """Index -> advantage over the union, and reward over theta's own half for the guide (None: neither), in loops."""
    out: dict[int, tuple[float, float | None]] = {}
    mask = method.run.rollout.mask_overlong
    for group in {r.group for r in rows if r.kind == "rollout"}:
        graded = [
            i for i, r in enumerate(rows) if r.kind == "rollout" and r.group == group and r.verdict is not Verdict.ERROR
        ]
        rewards = [rows[i].reward for i in graded]
        theirs = [rows[i].reward for i in graded if rows[i].at == "live"]
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in rewards) / len(rewards)) + 1e-6
        for i in graded:
            if rows[i].finished or not mask:
                advantage = (rows[i].reward - mean) / (deviation if method.options.rl.std else 1.0)
                out[i] = advantage, rows[i].reward - sum(theirs) / len(theirs) if rows[i].at == "guide" else None
    return out


def transformer_steps(policy: Policy, method: Any, rows: list[Row]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Where (1) and (2) lead from here, weights merged by hand and every sum written out."""
    o, weights, by_row = method.options, weigh(method, rows), method.options.rl.aggregate == "row"
    live, guide = (all_logps(build(), merged(policy, "live", with_w), rows) for with_w in (False, True))
    theta = sft = lead = tie = torch.zeros((), dtype=torch.float64)
    below = {"theta": 0.0, "sft": 0.0, "lead": 0.0, "tie": 0.0}
    for i, r in enumerate(rows):
        own = torch.from_numpy(r.own)
        size = 1.0 if by_row else float(r.own.sum())
        if r.kind == "demo":
            sft = sft + guide[i][own].sum()
            below["sft"] += float(r.own.sum())
            continue
        each = (lambda x: x.mean()) if by_row else (lambda x: x.sum())
        at_theta, at_guide = live[i][own], guide[i][own]
        if r.at == "guide":
            tie = tie + each(0.5 * (at_guide - at_theta.detach()) ** 2)
            below["tie"] += size
        if i not in weights:
            continue
        advantage, over = weights[i]
        below["theta"] += size
        if r.at == "live":
            theta = theta + advantage * each(at_theta)
            continue
        p = at_theta.exp()
        ratio = (at_theta - at_guide).detach().exp().clamp(max=o.ratio_cap)
        theta = theta + advantage * each(p / (p + o.shape) if advantage > 0 else ratio * at_theta)
        lead = lead + over * each(at_guide)
        below["lead"] += size
    of_w = (1 - o.lam) * sft / below["sft"] + o.lam * lead / below["lead"] - o.kappa * tie / below["tie"]
    out = []
    for name, value, rate in (("theta", theta / below["theta"], 0.05), ("w", of_w, o.beta)):
        flat = policy.groups[name].flat()
        found = torch.autograd.grad(value, list(flat.values()), retain_graph=True)
        out.append({n: t.detach() + rate * g for (n, t), g in zip(flat.items(), found)})
    return out[0], out[1]


REAL = (
    (False, {}, {}),
    (True, {"rl": {"std": True, "aggregate": "row"}, "shape": 0.5, "ratio_cap": 0.8}, {"mask_overlong": True}),
)


def test_one_real_update() -> None:
    """Both groups of a real policy move by (1) and (2) from one snapshot; live weights never contain w."""
    for lora, options, rollout in REAL:
        method = method_of(3, 4, rollout, **{"beta": 0.02, "lambda": 0.7, "kappa": 0.4, **options})
        policy = real_policy(method, lora)
        rows = method.gather(data((3, 5, 2)), Drawn(policy), 0)
        theta, w = transformer_steps(policy, method, rows)
        before = {n: t.detach().clone() for n, t in policy.groups["theta"].flat().items()}
        found = method.update(policy, batching.make_batch(rows), 0)
        for group, wanted in (("theta", theta), ("w", w)):
            for n, t in policy.groups[group].flat().items():
                close(t.detach(), wanted[n], 1e-12, f"{group} {n}, lora {lora}")
        assert max(float((t - before[n]).abs().max()) for n, t in theta.items()) > 1e-4
        assert all(math.isfinite(x) for x in found.values())
        for with_w, at in ((False, "live"), (True, "guide")):
            for n, t in merged(policy, "live", with_w).items():
                close(policy.weights(at)[n], t.detach(), 1e-15, f"{n} at {at}")
        with policy.at("live") as model:
            deployed = {n: p.detach().clone() for n, p in model.named_parameters()}
        for n, t in merged(policy, "live", with_w=False).items():
            close(deployed[n], t.detach(), 1e-15, f"deployed {n}")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_reference_and_refills_are_refused() -> None:
    with pytest.raises(UserError, match=r"kl_coef must be 0.*kappa"):
        method_of(rl={"kl_coef": 0.1})
    with pytest.raises(UserError, match=r"rollout\.refill"):
        method_of(rollout={"refill": 1})
    assert Guide.needs == {"demos"}


def test_the_snapshot_is_taken_before_either_step() -> None:
    policy = Table(GUIDE, THETA)
    one_update(method_of(beta=0.3), policy, [(0,), (1,), (1,), (0,)])
    assert policy.asked == [("grad", "guide"), ("grad", "live"), ("apply", "theta"), ("apply", "w")]
    assert policy.points == ("guide",) and policy.rates == {"theta": None, "w": 0.3}


MUTANTS = mutants(
    module,
    Mutant("snapshot", "Guide.update", by=test_equations),  # the guide's gradient at theta
    Mutant("sign", "Guide.update", by=test_equations),  # 1 + lambda
    Mutant("term", "Guide.terms", "shaped 0", by=test_equations),  # failures left out
    Mutant("clip", "Guide.terms", "min 0", by=test_equations),  # they are shaped like successes, too
    Mutant("swap", "Guide.credited", "reward 1", by=test_lead_is_unbiased),
    Mutant("mask", "Guide.credited", "finished 1", by=test_one_real_update),  # overlong rows lead
    Mutant("swap", "one_denominator", 0, by=test_equations),
    Mutant("branch", "mean_rewards", 0, by=test_gain_over_problems, of=credit),  # failed grades count
    Mutant("compare", "Guide.share", "warmup 0", by=test_annealing),  # a step longer
    Mutant("clip", "pg_truncate", 0, by=test_equations, of=losses),  # no cap
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_seen(mutant: Mutant) -> None:
    mutant.check()
