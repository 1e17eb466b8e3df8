"""Optimizers over plain tensors: AdamW, also in eight bits, SGD, and the shadow's bounded step in theta's second
moments; and what their last step did."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bridgelm.config.options.optim import NO_LIBRARY
from bridgelm.config.run_config import OptimConfig
from bridgelm.errors import UserError
from bridgelm.model import grads

BLOCK = 256  # values of an eight-bit moment that share a scale
WIDTH = 32  # neighbours that share a bound on the second moments that SharedMoments does not keep
SLACK = 4.0  # how much larger than the source's own root moments may be before that bound takes effect
QMAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}  # bitsandbytes' tables of the values that eight-bit codes stand for


class SharedMoments(torch.optim.Optimizer):
    """Adam's step with the second moments of `source`, whose parameters match these one by one, and a momentum of its
    own. Two copies of a model then live in one metric: equal gradients move them equally, and their difference means
    the same in every coordinate.

    Where the source's gradient h has been small or absent and this one's, g, has not, that metric alone would give
    steps without a bound. So the denominator is the root of

        max(v, u / SLACK^2),    v = EMA(h^2),    u = EMA(max over a piece of a row of [g^2 - h^2]+) >= EMA(g^2) - v

    with one number u for each piece of WIDTH neighbours. No element then moves further than sqrt(1 + SLACK^2) times
    what Adam would have moved it for the same gradients, and u is zero while both see the same gradients.

    `beside` holds h, the gradients of the step that the source has just taken, by this optimizer's own parameters.
    """

    def __init__(self, params: Iterable[Tensor], source: torch.optim.Optimizer, lr: float) -> None:
        group = source.param_groups[0]
        defaults = {"lr": lr, "betas": group["betas"], "eps": group["eps"], "weight_decay": group["weight_decay"]}
        super().__init__(list(params), defaults)
        self.source = source
        self.beside: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                excess = piecewise_max((p.grad.square() - self.beside[p].to(p.device).square()).clamp_(min=0))
                if not state:
                    state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(p)
                    state["excess"] = torch.zeros_like(excess)
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["excess"].lerp_(excess, 1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["exp_avg"], self.denominator(p),
                           value=-group["lr"] / (1 - beta1 ** float(state["step"])))

    def partner(self, p: Tensor) -> Tensor:
        """The parameter of the source that one of these matches."""
        index = next(i for i, x in enumerate(self.param_groups[0]["params"]) if x is p)
        return self.source.param_groups[0]["params"][index]

    def denominator(self, p: Tensor) -> Tensor:
        """What the momentum was divided by in the step just taken. Both running means start at zero, and each is
        corrected for that by its own number of steps."""
        group, state, other = self.param_groups[0], self.state[p], self.source.state[self.partner(p)]
        assert other, "the source of the second moments has not stepped yet"
        beta2 = group["betas"][1]
        mine = state["excess"].sqrt() / (SLACK * math.sqrt(1 - beta2 ** float(state["step"])))
        root = moment(other, 2).to(p.device).sqrt() / math.sqrt(1 - beta2 ** float(other["step"]))
        return torch.maximum(root, spread(mine, p.shape), out=root).add_(group["eps"])


def piecewise_max(t: Tensor) -> Tensor:
    """The largest element of each piece of WIDTH neighbours in a row; in a vector, each element is a piece."""
    if t.dim() < 2:
        return t
    return torch.nn.functional.max_pool1d(t.flatten(0, -2)[:, None], WIDTH, ceil_mode=True).view(*t.shape[:-1], -1)


def pieces(shape: torch.Size) -> int:
    """The number of pieces that `piecewise_max` cuts a tensor into."""
    return math.prod(shape) if len(shape) < 2 else math.prod(shape[:-1]) * -(-shape[-1] // WIDTH)


def spread(values: Tensor, shape: torch.Size) -> Tensor:
    """Gives each element the number that belongs to its piece."""
    return values if len(shape) < 2 else values.repeat_interleave(WIDTH, -1)[..., :shape[-1]]


def build(kind: str, params: list[Tensor], config: OptimConfig, lr: float,
          source: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(params, lr=lr, weight_decay=config.weight_decay)
    betas = (config.betas[0], config.betas[1])
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay,
                                 fused=params[0].is_cuda or None)  # the other implementations copy the weights
    if kind == "adamw8bit":
        return _eight_bit()(params, lr=lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay)
    assert kind == "shared_moments"
    assert source is not None
    assert "betas" in source.defaults, "shared moments need the Adam that they are shared with"
    return SharedMoments(params, source, lr)


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(NO_LIBRARY) from None

    class RowBlocks(AdamW8bit):
        """Decides by the length of a row, not by the size of a weight, whether moments take eight bits, so that a
        rank with a shard decides as a process with the whole weight does. Accepts an empty shard, which the kernels do
        not."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            return super().get_config(gindex, pindex, group) | {
                "min_8bit_size": 0 if in_blocks(group["params"][pindex]) else math.inf}

        def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
            if p.numel():
                super().update_step(group, p, gindex, pindex)
            else:
                self.state[p]["step"] += 1

    return RowBlocks


def in_blocks(t: Tensor) -> bool:
    """Whether the rows of a weight consist of whole blocks: only then its moments take eight bits."""
    return t.dim() > 1 and t.shape[-1] % BLOCK == 0


def state_bytes(optimiser: torch.optim.Optimizer, p: Tensor, eight_bit: bool) -> int:
    """The size of what an optimizer will keep of a weight, whose moments lie as the weight does. With `eight_bit`, an
    AdamW stands for one that keeps blocks of eight-bit codes where it can, each with its scale."""
    if isinstance(optimiser, SharedMoments):
        return (p.numel() + pieces(p.shape)) * p.element_size()
    if isinstance(optimiser, torch.optim.AdamW):
        return int(2 * p.numel() * (1 + 4 / BLOCK if eight_bit and in_blocks(p) else p.element_size()))
    return 0


def moment(state: dict[str, Any], which: int) -> Tensor:
    """The running mean of the gradient (1) or of its square (2), decoded where bitsandbytes keeps it in eight bits."""
    if (key := ("exp_avg", "exp_avg_sq")[which - 1]) in state:
        return state[key]
    codes = state[f"state{which}"]
    if codes.dtype != torch.uint8:  # rows that do not consist of whole blocks are kept in float32
        return codes
    largest = state[f"absmax{which}"].repeat_interleave(BLOCK).view_as(codes)
    return state[f"qmap{which}"][codes.int()] * largest


def root_moment(optimiser: torch.optim.Optimizer, p: Tensor, group: dict[str, Any],
                device: torch.device | None = None) -> Tensor | None:
    """Adam's denominator sqrt(v) + eps, bias corrected, on `device` or else on that of p; None if the optimizer has no
    second moments. It is infinite where there was no gradient yet (the embedding of a token that has not occurred):
    otherwise 1/eps would drown everything else there."""
    device = device or p.device
    source = optimiser
    if isinstance(optimiser, SharedMoments):
        source, p = optimiser.source, optimiser.partner(p)
    state = source.state.get(p, {})
    if "exp_avg_sq" not in state and "state2" not in state:
        return None
    beta2, square = source.param_groups[0]["betas"][1], moment(state, 2).to(device)
    root = square.sqrt() / math.sqrt(1 - beta2 ** float(state["step"])) + group["eps"]
    return root.masked_fill_(square == 0, math.inf)


def last_step_norm(optimiser: torch.optim.Optimizer, names: Iterable[str]) -> float:
    """The norm of the last step without its weight decay, computed from the optimizer's state, so that no copy of the
    weights is needed. SGD has no state; `policy.apply` computes the norm of its step."""
    params = optimiser.param_groups[0]["params"]
    found = {name: square_of_step(optimiser, p) for name, p in zip(names, params, strict=True)}
    return math.sqrt(grads.total(found))


def square_of_step(optimiser: torch.optim.Optimizer, p: Tensor) -> float:
    """The squared norm of one tensor's last step; 0 if it has not been stepped, or the optimizer has no state."""
    group, state = optimiser.param_groups[0], optimiser.state.get(p, {})
    if "exp_avg" not in state and "state1" not in state:
        return 0.0
    root = optimiser.denominator(p) if isinstance(optimiser, SharedMoments) else root_moment(optimiser, p, group)
    assert root is not None
    size = group["lr"] / (1 - group["betas"][0] ** float(state["step"]))
    first = moment(state, 1)
    return float((first / root).norm()) ** 2 * size**2


def tensors(optimiser: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The state of an optimizer with one group, as named tensors for a checkpoint that is never unpickled. All of them
    but the count of steps have as many rows as the weight."""
    params = optimiser.param_groups[0]["params"]
    return {f"{name}|{key}": _by_row(value, p) if key.startswith("absmax") else torch.as_tensor(value)
            for name, p in zip(names, params, strict=True) for key, value in optimiser.state.get(p, {}).items()
            if value is not None and key not in QMAPS}


def _by_row(absmax: Tensor, p: Tensor) -> Tensor:
    """The scales of a weight's blocks as a matrix, of which each row has the scales of one row of the weight."""
    return absmax.view(len(p), -1) if len(p) else absmax.view(0, math.prod(p.shape[1:]) // BLOCK)


def load_tensors(optimiser: torch.optim.Optimizer, names: list[str], saved: dict[str, Tensor],
                 device: torch.device) -> None:
    """Reads what `tensors` gave. The moments are put on `device`."""
    by_name = dict(zip(names, optimiser.param_groups[0]["params"], strict=True))
    for full_key, value in saved.items():
        name, _, key = full_key.rpartition("|")
        p = by_name[name]
        if key.startswith("absmax"):
            optimiser.state[p][key] = value.flatten().to(device)
            qmap = key.replace("absmax", "qmap")
            optimiser.state[p][qmap] = optimiser.name2qmap[QMAPS[qmap]].to(device)  # type: ignore[attr-defined]
        elif key != "step":
            wide = {value.dtype, p.dtype} <= {torch.float32, torch.float64}  # a run may be resumed in another precision
            optimiser.state[p][key] = value.to(device, p.dtype if wide else value.dtype)
        elif isinstance(optimiser, torch.optim.AdamW | SharedMoments):
            optimiser.state[p][key] = value.to(p.device) if optimiser.defaults.get("fused") else value
        else:
            optimiser.state[p][key] = int(value)
