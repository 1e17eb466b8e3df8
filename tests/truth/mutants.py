"""Wrong versions of the shipped code, each of which a truth test must see.

A mutant is the module's own source text with a few replacements, compiled under another name. Each replaced text must
be found exactly once: a refactoring that moves it fails the mutant's test loudly, and the mutant is to be rewritten.

    python tests/truth/mutants.py     runs every check on every mutant and prints which of them see it
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from checks import CHECKS, Code
from exact import Quadratic, bridge_walk
from ratios import RATIO_CHECKS

Swaps = tuple[tuple[str, str], ...]


def mutate(module: ModuleType, swaps: Swaps, name: str = "mutant") -> ModuleType:
    assert module.__file__
    source = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in swaps:
        assert source.count(old) == 1, f"found {source.count(old)} times in {module.__file__}: {old!r}"
        source = source.replace(old, new)
    copy = types.ModuleType(f"{module.__name__}__{name}")
    copy.__file__ = module.__file__
    sys.modules[copy.__name__] = copy  # dataclasses and annotations look their module up
    try:
        exec(compile(source, f"{module.__name__}:{name}", "exec"), copy.__dict__)
    finally:
        del sys.modules[copy.__name__]
    return copy


@dataclass(frozen=True)
class Mutant:
    swaps: Swaps
    caught_by: str
    of: str = "bridge"
    # Where test A ends at lambda 1/2 (theta, shadow, w); None for a component that is not looked at.
    ends: tuple[float | None, float | None, float | None] | None = None

    def code(self, name: str) -> Code:
        changed = mutate(getattr(Code(), self.of), self.swaps, name)
        code = replace(Code(), **{self.of: changed})
        if self.of in ("losses", "cooperation"):  # what the method calls must be the mutant
            code = replace(code, bridge=mutate(code.bridge, (), name))
            setattr(code.bridge, self.of, changed)
        return code


APPLY_W = '        policy.apply("w", grads.mix((1 - lam, sft.w), (lam, bracket)))                 # (3)\n'
STEP_W = 'policy.apply("w", grads.mix((1 - lam, sft.w), (lam, bracket)))'
PARK = "        policy.park(joint)  # the shadow's step is bounded by it\n"
STEP_SHADOW = 'policy.apply("shadow", shadow.theta, beside=joint)  '
GAIN = "gain = grads.mix((1.0, rl.w), (-1.0, shadow.w))"
LAST_OR_NEW = "(gradient_or_last(policy, self.options, step, lambda: self.at_shadow(policy, batch))"
JOINT = "joint = grads.blend((1 - lam, sft.theta), (lam, rl.theta))"
KEEP = ((JOINT, JOINT.replace("blend", "mix")),)  # for mutants that misuse what is used up
AGAIN = 'policy.grad(self.terms, batch, {"nll": 1.0}), policy.grad(self.terms, batch, rl_coef(self.options.rl))'

AS_IF = '1.0 if self.options.third == "sft" else 0.0'
PLACEBO = '        placebo = self.placebo(policy, batch, "live")\n'
PLACEBO_SHADOW = '        placebo_shadow = self.placebo(policy, batch, "shadow")\n'
DIFFERENCE = "(1.0, placebo), (-1.0, placebo_shadow)"
DRAWN = "draws.standard_normal((counts[name], *g.shape[1:]))"
NOISE = "grads.norm(gradient) / grads.norm(noise)"

MUTANTS: dict[str, Mutant] = {
    # the list of the third term and of the shadow
    "no_third_term": Mutant(((GAIN, "gain = rl.w"),), "fixed_points", ends=(None, None, 0.875)),
    "third_term_added": Mutant(
        ((GAIN, "gain = grads.mix((1.0, rl.w), (1.0, shadow.w))"),), "fixed_points", ends=(None, None, 0.8)
    ),
    "gain_reversed": Mutant(((GAIN, "gain = grads.mix((-1.0, rl.w), (1.0, shadow.w))"),), "trace"),
    "gain_without_rl": Mutant(((GAIN, "gain = grads.mix((-1.0, shadow.w))"),), "fixed_points"),
    "shadow_descends": Mutant(
        ((STEP_SHADOW, 'policy.apply("shadow", grads.mix((-1.0, shadow.theta)), beside=joint)'),), "fixed_points"
    ),
    "shadow_frozen": Mutant(((STEP_SHADOW, "pass  "),), "fixed_points"),
    "shadow_scaled_by_lambda": Mutant(
        ((STEP_SHADOW, 'policy.apply("shadow", grads.mix((lam, shadow.theta)), beside=joint)'),), "trace"
    ),
    "shadow_takes_the_joint_step": Mutant(
        ((STEP_SHADOW, 'policy.apply("shadow", joint, beside=joint)'),), "fixed_points"
    ),
    "shadow_gradient_at_live": Mutant((('self.shadow_coef(), at="shadow")', "self.shadow_coef())"),), "fixed_points"),
    "shadow_always_resynced": Mutant(
        (("return self.options.resync_every > 0 and", "return"), ("step % self.options.resync_every == 0", "True")),
        "fixed_points",
        ends=(1.75, None, 0.25),
    ),
    # w
    "w_frozen": Mutant(((STEP_W, "pass"),), "fixed_points", ends=(1.5, 0.0, 0.0)),
    "w_from_theta_gradients": Mutant(
        ((STEP_W, 'policy.apply("w", grads.mix((1 - lam, sft.theta), (lam, rl.theta), (-lam, shadow.theta)))'), *KEEP),
        "fixed_points",
    ),
    "w_sft_from_theta": Mutant(
        ((STEP_W, 'policy.apply("w", grads.mix((1 - lam, sft.theta), (lam, bracket)))'), *KEEP), "fixed_points"
    ),
    "w_third_from_theta": Mutant(((GAIN, "gain = grads.mix((1.0, rl.w), (-1.0, shadow.theta))"),), "fixed_points"),
    "w_lambda_swapped": Mutant(
        ((STEP_W, 'policy.apply("w", grads.mix((lam, sft.w), (1 - lam, bracket)))'),), "fixed_points"
    ),
    "w_gain_without_lambda": Mutant(
        ((STEP_W, 'policy.apply("w", grads.mix((1 - lam, sft.w), (1.0, bracket)))'),), "fixed_points"
    ),
    "w_ascends_the_loss": Mutant(
        ((STEP_W, 'policy.apply("w", grads.mix((lam - 1, sft.w), (-lam, bracket)))'),), "trace"
    ),
    "beta_ignored": Mutant(
        (('policy.optimiser("w", lr=o.beta)', 'policy.optimiser("w")'),), "every_option_of_the_step"
    ),
    # theta and lambda
    "theta_lambda_swapped": Mutant(
        ((JOINT, "joint = grads.mix((lam, sft.theta), (1 - lam, rl.theta))"),), "fixed_points"
    ),
    "theta_unweighted": Mutant(((JOINT, "joint = grads.mix((1.0, sft.theta), (1.0, rl.theta))"),), "trace"),
    "theta_sign_of_rl": Mutant(((JOINT, "joint = grads.mix((1 - lam, sft.theta), (-lam, rl.theta))"),), "trace"),
    "lambda_schedule_reversed": Mutant(
        (("o.lambda_start, o.lam, step", "o.lam, o.lambda_start, step"),), "every_option_of_the_step"
    ),
    "lambda_schedule_too_short": Mutant(
        (("step / max(1, self.run.steps - 1)", "step / self.run.steps"),), "every_option_of_the_step"
    ),
    # order: the rest points are the same, the path is not
    "w_after_theta": Mutant(((GAIN, f"sft, rl = {AGAIN}\n        {GAIN}"),), "trace"),
    "w_after_shadow": Mutant(
        ((GAIN, f'shadow = policy.grad(self.shadow_terms, batch, self.shadow_coef(), at="shadow")\n        {GAIN}'),),
        "trace",
    ),
    "theta_after_w": Mutant(  # also: theta's gradient is not taken at the step's w
        (
            (
                APPLY_W,
                APPLY_W + '        late = policy.grad(self.terms, batch, {"nll": 1.0, "pg": 1.0})\n'
                '        policy.apply("theta", grads.mix((lam, late.theta)))\n',
            ),
            ('norm = policy.apply("theta", joint) ', "norm = 0.0 "),
        ),
        "trace",
    ),
    # re-sync
    "shadow_never_rests": Mutant(((LAST_OR_NEW, "(self.at_shadow(policy, batch)"),), "resting_shadow"),
    "rest_begins_at_once": Mutant(
        ((LAST_OR_NEW, LAST_OR_NEW.replace(" step,", " step + 1,")),), "resting_shadow"
    ),
    "resting_shadow_is_forgotten": Mutant(
        ((GAIN, "gain = grads.mix((1.0, rl.w), (-1.0 if shadow.theta else 0.0, shadow.w))"),), "resting_shadow"
    ),
    "resync_without_a_step": Mutant(
        (('            policy.apply("shadow", again, beside=joint)\n', "            pass\n"),), "resync"
    ),
    "resync_to_the_new_theta": Mutant(
        (
            ('            policy.copy("theta", "shadow")\n', "            pass\n"),
            (
                '            policy.apply("shadow", again, beside=joint)\n',
                '            policy.copy("theta", "shadow")\n            policy.apply("shadow", again, beside=joint)\n',
            ),
        ),
        "every_option_of_the_step",
    ),
    "resync_twice_stepped": Mutant((("if not resync and", "if"),), "every_option_of_the_step"),
    "resync_phase": Mutant(
        (("step % self.options.resync_every == 0", "step % self.options.resync_every == 1"),),
        "every_option_of_the_step",
    ),
    # warnings
    "warns_only_of_the_bracket": Mutant(
        (('min(sizes["norm_shadow"], sizes["norm_third"])', 'sizes["norm_third"]'),), "vanished_warning"
    ),
    "warns_only_of_the_shadow": Mutant(
        (('min(sizes["norm_shadow"], sizes["norm_third"])', 'sizes["norm_shadow"]'),), "vanished_warning"
    ),
    "vanished_never_reset": Mutant(
        (("self.vanished + 1 if nothing else 0", "self.vanished + bool(nothing)"),), "vanished_warning"
    ),
    "still_shadow_never_said": Mutant((("shadow < 1e-3 * theta", "shadow < 0 * theta"),), "still_shadow_warning"),
    "still_shadow_always_said": Mutant(((' and metrics["bridge/norm_shadow"] > 0:', ":"),), "still_shadow_warning"),
    # ratios and the gain
    "no_ratio": Mutant(((".exp().clamp(max=cap)", ".exp().clamp(1, 1)"),), "one_token", of="losses"),
    "ratio_upside_down": Mutant(
        (("(logp_BT.detach() - old_BT).exp().clamp", "(old_BT - logp_BT.detach()).exp().clamp"),),
        "one_token",
        of="losses",
    ),
    "ratio_with_a_gradient": Mutant(
        (("(logp_BT.detach() - old_BT).exp().clamp", "(logp_BT - old_BT).exp().clamp"),), "one_token", of="losses"
    ),
    "taper_by_the_ratio": Mutant(((".where(weight_BT < 0, 1.0) * logp_BT", " * logp_BT"),), "one_token", of="losses"),
    "taper_pushes_on": Mutant((("ratio.where(weight_BT < 0, 1.0) * logp_BT", "logp_BT"),), "one_token", of="losses"),
    "taper_over_one": Mutant((("- old_BT).clamp(max=0.0).exp()", "- old_BT).exp()"),), "one_token", of="losses"),
    "cap_from_below": Mutant(((".clamp(max=cap)", ".clamp(min=cap)"),), "one_token", of="losses"),
    "cap_ignored": Mutant(((".clamp(max=cap)", ""),), "one_token", of="losses"),
    "shadow_clipped": Mutant((('if self.options.ratio == "clip"', 'if self.options.ratio != "clip"'),), "one_token"),
    "shadow_weights_not_signed": Mutant(
        (("return -weight_BT * ratio * logp_BT", "return weight_BT * ratio * logp_BT"),), "one_token", of="losses"
    ),
    "gain_ratio_upside_down": Mutant((("1 - np.exp(log)", "1 - np.exp(-log)"),), "gap", of="cooperation"),
    "gain_sign": Mutant((("1 - np.exp(log)", "np.exp(log) - 1"),), "gap", of="cooperation"),
    "gain_own_mean_as_baseline": Mutant((("credit.leave_one_out(r)", "credit.centre(r)"),), "gap", of="cooperation"),
    "gain_by_token_ratio": Mutant(
        (("np.array([logs[i].sum() if", "np.array([logs[i].mean() if"),), "two_tokens", of="cooperation"
    ),
    "ess_by_token_ratio": Mutant(
        (("np.array([log.sum() for log", "np.array([log.mean() for log"),), "two_tokens", of="cooperation"
    ),
    "kl_other_direction": Mutant(
        (("np.mean(token_ratio - 1 - tokens)", "np.mean(1 / token_ratio - 1 + tokens)"),),
        "two_tokens",
        of="cooperation",
    ),
    "ess_warning_late": Mutant((("RELIABLE = 0.3", "RELIABLE = 0.03"),), "ess_warning", of="cooperation"),
    # controls of the bracket of (3)
    "controls_swapped": Mutant(((AS_IF, '0.0 if self.options.third == "sft" else 1.0'),), "controls_rest"),
    "sft_control_keeps_half": Mutant(((AS_IF, AS_IF.replace("1.0 if", "0.5 if")),), "controls_path"),
    "sft_control_has_a_shadow": Mutant(
        (('options.third not in ("rl", "sft")', 'options.third != "rl"'),), "controls_path"
    ),
    "frozen_shadow_moves": Mutant(
        (('if self.shadowed and o.third != "frozen":', "if self.shadowed:"),), "controls_rest"
    ),
    "frozen_shadow_follows_theta": Mutant(
        (
            (
                "return self.options.resync_every > 0 and step % self.options.resync_every == 0",
                'return self.options.third == "frozen"',
            ),
            ('            policy.apply("shadow", again, beside=joint)\n', "            pass\n"),
        ),
        "controls_path",
    ),
    "control_pays_for_a_shadow": Mutant(
        (
            (
                '        if self.shadowed:\n            policy.fork("shadow")',
                '        if True:\n            policy.fork("shadow")',
            ),
        ),
        "controls_cost",
    ),
    "control_passes_a_shadow": Mutant(
        (
            (
                '        if self.shadowed:\n            policy.fork("shadow")',
                '        if True:\n            policy.fork("shadow")',
            ),
            ("                  if self.shadowed else self.instead(rl))", "        )"),
        ),
        "controls_rest",
    ),
    "placebo_for_all": Mutant((('if self.options.third != "permuted":', "if False:"),), "controls_cost"),
    "placebo_after_theta": Mutant(
        ((PLACEBO, ""), (PARK, PARK + PLACEBO)), "controls_cost"
    ),
    "placebo_after_the_shadow": Mutant(
        ((PLACEBO_SHADOW, ""), (f"        {GAIN}\n", f"{PLACEBO_SHADOW}        {GAIN}\n")), "controls_cost"
    ),
    "placebo_added": Mutant(((DIFFERENCE, "(1.0, placebo), (1.0, placebo_shadow)"),), "noise"),
    "placebo_without_the_shadow": Mutant(((DIFFERENCE, "(1.0, placebo)"),), "noise"),
    "frozen_shadow_warned_of": Mutant(
        (('"bridge/shadow_move", math.inf', '"bridge/shadow_move", 0.0'),), "controls_quiet"
    ),
    "noise_of_unit_norm": Mutant(((NOISE, "1 / grads.norm(noise)"),), "noise"),
    "noise_unscaled": Mutant(((NOISE, "grads.norm(gradient) / math.sqrt(144)"),), "noise"),
    "noise_scaled_tensor_by_tensor": Mutant(
        (
            (
                "    return grads.mix((grads.norm(gradient) / grads.norm(noise), noise))",
                "    return {n: g * (gradient[n].norm() / g.norm()) for n, g in noise.items()}",
            ),
        ),
        "noise",
    ),
    "noise_positive": Mutant(((DRAWN, f"abs({DRAWN})"),), "noise"),
    "noise_uniform": Mutant(((DRAWN, DRAWN.replace("standard_normal(", "uniform(-1, 1, ")),), "noise"),
    "noise_around_the_bracket": Mutant(
        (
            (
                'return noise_like(gain, self.draws("noise", step))',
                'return grads.mix((0.6, gain), (0.8, noise_like(gain, self.draws("noise", step))))',
            ),
        ),
        "noise",
    ),
    "noise_without_the_step": Mutant((("(self.run.seed, step, zlib", "(self.run.seed, zlib"),), "noise"),
    "noise_without_the_seed": Mutant((("(self.run.seed, step, zlib", "(step, zlib"),), "noise"),
    "noise_not_reproducible": Mutant(
        (("default_rng((self.run.seed, step, zlib.crc32(what.encode())))", "default_rng()"),), "noise"
    ),
    "noise_in_theta": Mutant(
        (
            (
                JOINT,
                f"{JOINT}\n        if self.options.third == 'noise':\n"
                "            joint = noise_like(joint, self.draws('noise', step))",
            ),
        ),
        "noise",
    ),
    "shadow_reward_of_the_joint": Mutant(
        (
            (
                'self.sampled["shadow_reward"] = float(np.mean(alone))',
                'self.sampled["shadow_reward"] = float(np.mean(joint))',
            ),
        ),
        "shadow_reward",
    ),
    "shadow_reward_with_ungraded": Mutant((("if r.verdict is not Verdict.ERROR]", "]"),), "shadow_reward"),
    "shadow_reward_stays": Mutant((("        self.sampled = {}\n", ""),), "shadow_reward"),
    "ess_warning_never": Mutant((('metrics.get("bridge/ess", 1.0)', "1.0"),), "ess_warning"),
}
ALL_CHECKS: dict[str, Callable[[Code], None]] = CHECKS | RATIO_CHECKS


def failure(name: str, code: Code) -> str | None:
    """What the check says against the code; None if it finds nothing. Numbers that blow up count as found."""
    try:
        with np.errstate(all="ignore"):
            ALL_CHECKS[name](code)
    except (AssertionError, OverflowError, ValueError) as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return None


def where_it_ends(code: Code, steps: int = 600) -> np.ndarray:
    return bridge_walk(code.bridge, Quadratic(), 0.5, steps, limit=1e12).end


def main() -> None:
    columns = list(ALL_CHECKS)
    for name, code in {"shipped code": Code(), **{n: m.code(n) for n, m in MUTANTS.items()}}.items():
        seen = [c for c in columns if failure(c, code)]
        print(f"{name:30}", ", ".join(seen) or ("passes every check" if name == "shipped code" else "NOT SEEN"))


if __name__ == "__main__":
    main()
