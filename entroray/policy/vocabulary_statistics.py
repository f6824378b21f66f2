"""Further statistics of a token's distribution, by the name an objective asks for in `needs`.

Each takes log-probs [n, V] of a tile, in nats, and gives [n], differentiable; `name:number` passes the number
as its one argument. A logit of -inf is an outcome of probability 0. Where top-p or top-k cuts the vocabulary,
V are the tokens of the kept set, but for the last two (`kept_head`).
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from entroray.errors import ConfigError
from entroray.ops import FLOOR


def named(name: str) -> Callable[[Tensor], Tensor]:
    """The statistic `name`, or `name:number`; ConfigError when there is none such."""
    title, colon, number = name.partition(":")
    fn = STATISTICS.get(title)
    takes = list(inspect.signature(fn).parameters)[1:] if fn else []
    if fn is None or bool(takes) != bool(colon):
        raise ConfigError(
            f"the head computes no statistic `{name}`: choose from {', '.join(sorted(names()))}"
        )
    if not takes:
        return fn
    value = _argument(name, takes[0], number)
    return lambda logp: fn(logp, value)


def _argument(name: str, meaning: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    low, high = ARGUMENTS[meaning]
    if not low <= value <= high or (meaning == "k" and value != int(value)):
        whole = "a whole number" if meaning == "k" else "a number"
        raise ConfigError(f"the statistic `{name}`: {meaning} must be {whole} from {low:g} to {high:g}")
    return value


def names() -> Iterable[str]:
    """Every statistic there is, with the argument it takes."""
    for title, fn in STATISTICS.items():
        yield ":".join([title, *list(inspect.signature(fn).parameters)[1:]])


def mean_logprob(logp: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Mean over the V tokens of log p: minus log V and KL(uniform, p)."""
    return logp.clamp(min=FLOOR).mean(-1)


def max_logprob(logp: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Log-prob of the likeliest token."""
    return logp.amax(-1)


def mean_discriminator(logp: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """E_p[p (log p + H)], against which a sampled token's p (log p + H) is held (arXiv 2602.03392)."""
    p = logp.exp()
    finite = logp.masked_fill(p == 0, 0.0)
    entropy = -(p * finite).sum(-1, keepdim=True)
    return (p.square() * (finite + entropy)).sum(-1)


def nucleus_entropy(logp: Float[Tensor, "n V"], mass: float) -> Float[Tensor, " n"]:
    """Entropy of the fewest likeliest tokens that hold `mass`, renormalised; the one crossing it is in."""
    ordered = logp.sort(-1, descending=True).values
    p = ordered.detach().exp()
    return _entropy(ordered.masked_fill(p.cumsum(-1) - p >= mass, -math.inf))


def top_entropy(logp: Float[Tensor, "n V"], k: float) -> Float[Tensor, " n"]:
    """Entropy of the k likeliest tokens, renormalised."""
    return _entropy(logp.topk(min(int(k), logp.shape[-1]), -1).values)


def plausible_logmass(logp: Float[Tensor, "n V"], kappa: float) -> Float[Tensor, " n"]:
    """Log of the mass on tokens with p >= kappa max p: minus the KL of those, renormalised, to p."""
    least = logp.detach().amax(-1, keepdim=True) + math.log(kappa)
    return logp.masked_fill(logp.detach() < least, -math.inf).logsumexp(-1)


def vocabulary_entropy(logp: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Entropy over the whole vocabulary, whatever top-p and top-k cut; without them that of every token."""
    return _entropy(logp)


def kept_mass(logp: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Probability of the set that the token was drawn from, before it is renormalised; without one, 1."""
    return logp.logsumexp(-1).exp()


def _entropy(scores: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
    logp = scores.log_softmax(-1)
    p = logp.exp()
    return -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)


ARGUMENTS = {"mass": (1e-6, 1.0), "k": (1.0, 1e9), "kappa": (1e-6, 1.0)}
"""Least and largest of what follows the colon."""

STATISTICS: Mapping[str, Callable[..., Tensor]] = {
    "mean_logprob": mean_logprob,
    "max_logprob": max_logprob,
    "mean_discriminator": mean_discriminator,
    "nucleus_entropy": nucleus_entropy,
    "top_entropy": top_entropy,
    "plausible_logmass": plausible_logmass,
    "vocabulary_entropy": vocabulary_entropy,
    "kept_mass": kept_mass,
}
"""By the name that an objective asks for them by."""
