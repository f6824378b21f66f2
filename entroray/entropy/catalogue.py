"""Every metric about entropy and what surrounds it, defined once; README.md beside is made from it.

`python -m entroray.entropy.catalogue > entroray/entropy/README.md`
"""

from collections.abc import Iterable

from entroray.entropy.metric import GROUPS, ROLLOUTS, SAMPLING, TOKENS, Metric, rows
from entroray.entropy.run_metrics import CHOICE, HELDOUT, RUN, UPDATE

DESCRIBED = [
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/mean | H of the learner's full distribution before the update | nats | exact, mean",
        "entropy/p<20,50,80,95> | its quantile | nats | exact, linear interpolation",
        "entropy/positive | H where A > 0 | nats | exact, mean",
        "entropy/negative | H where A < 0 | nats | exact, mean",
        "varentropy/mean | variance of -ln p under p | nats^2 | exact, mean",
        "logprobs/mean | ln p of the sampled token, learner | nats | mean; minus it estimates H",
        "advantages/mean_abs | size of A after credit | as A | mean",
        "mismatch/mean_abs | difference of ln p, learner to sampler | nats | mean",
        "mismatch/max | the largest | nats | maximum",
        "mismatch/kl | KL(sampler, learner) | nats | k3: mean of r - 1 - ln r",
        "lag/mean | committed steps between the sampling weights and these | steps | mean",
        "lag/max | the largest | steps | maximum",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "reward/mean | correct (0 or 1) | share | mean",
        "reward/raw_mean | the verifier's reward, unshaped | as reward | mean",
        "reward/std | its spread | as reward | population standard deviation",
        "length/mean | response tokens | tokens | mean",
        "length/max | the longest | tokens | maximum",
        "length/truncated | stopped by the limit, or in a loop (rollout.repetition) | share | count",
    ),
    *rows(
        GROUPS,
        SAMPLING,
        "groups/all_right | every rollout correct | share | count",
        "groups/all_wrong | none correct | share | count",
    ),
]
"""What `describe` and `judged` give, in every step."""

DIAGNOSED = [
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/tenth_<1,2,3,4,5,6,7,8,9,10> | H in that tenth of the response | nats | exact, mean",
        "varentropy/p<20,50,80,95> | its quantile | nats^2 | exact, linear interpolation",
        "varentropy/positive | varentropy where A > 0 | nats^2 | exact, mean",
        "varentropy/negative | varentropy where A < 0 | nats^2 | exact, mean",
        "varentropy/tenth_<1,2,3,4,5,6,7,8,9,10> | varentropy in that tenth of the response | nats^2 | "
        "exact, mean",
        "covariance/mean | c = (ln p - mean)(A - mean), over the step's tokens | nats | mean",
        "covariance/p<2,50,80,98,99_8> | quantile of c; p99_8 is the top 0.2 % | nats | linear interpolation",
        "covariance/clippable | share with 1 < c < 5, the band of Clip-Cov | share | count",
        "quadrants/e<1,2,3,4> | of tokens with A != 0: 1: A > 0, -ln p <= H. 2: A > 0, -ln p > H. "
        "3: A < 0, -ln p <= H. 4: A < 0, -ln p > H. 1 and 4 lower H | share | count",
        "advantages/zero | A = 0: no gradient | share | count",
        "importance/mean | learner's p / sampler's p, uncorrected | ratio | mean",
        "importance/p<99> | its quantile | ratio | linear interpolation",
        "importance/max | the largest | ratio | maximum",
        "importance/effective | (sum w)^2 / (N sum w^2): part of the sample that counts | share | exact",
        "importance/zeroed | correction is 0 | share | count",
        "mismatch/p<99> | quantile of mismatch/mean_abs | nats | linear interpolation",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "length/p<95> | quantile | tokens | linear interpolation",
        "length/right | where correct | tokens | mean",
        "length/wrong | where not | tokens | mean",
        "repetition/share | own 4-grams written before in the same response | share | mean of responses",
        "answers/missing | no answer was read | share | count",
        "calibration/ece_consistency | ECE of the share of its group with the same answer | share | 15 bins",
        "calibration/brier_consistency | the same confidence against correct | share^2 | mean square",
        "calibration/ece_logprob | ECE of exp(mean ln p of its tokens, as drawn) | share | 15 bins",
        "calibration/brier_logprob | the same confidence against correct | share^2 | mean square",
    ),
    *rows(
        GROUPS,
        SAMPLING,
        "distinct/<1,2,3> | distinct n-grams / n-grams of a group, of tokens drawn there | share | mean",
        "answers/distinct | distinct answers, of groups with any | answers | mean",
        "answers/entropy | entropy of the shares of answers, of groups with any | nats | plug-in, mean",
        "pass/<n> | one of n independent draws is right | share | unbiased, 1 - C(m-c, n)/C(m, n)",
    ),
]
"""What `diagnose` adds every `observe.diagnosis.every` steps."""

STEP = [*DESCRIBED, *DIAGNOSED]
"""What `describe` and `diagnose` give together."""

SAMPLER = rows(
    "shaped tokens",
    "sampler's",
    "sampler/temperature | drawn at; 0 where the likeliest was taken | - | mean of those drawn",
    "sampler/likeliest | taken, not drawn | share of those drawn | count",
    "sampler/inserted | put by the sampler, not trained on | share | count",
    "sampler/gap | difference of H, engine to learner, at the policy's temperature; with a lag also what "
    "was learnt since | nats | maximum",
)
"""What `describe` adds where a sampler shaped; mismatch and importance then include what it shaped."""

TOOLS = rows(
    ROLLOUTS,
    SAMPLING,
    "tool/calls | calls answered | calls | mean",
    "tool/share | tokens that the tool said | share of response tokens | count",
    "tool/failed | answered with an error | share of calls | count",
)
"""What `describe` adds where a rollout called a tool."""
BRANCHES = [
    *rows(
        ROLLOUTS,
        SAMPLING,
        "branches/share | rollouts that began as another's first tokens | share | count",
        "branches/inherited | response tokens that are a parent's, not trained on | share | count",
        "branches/forced | response tokens chosen for the policy, not trained on | share | count",
        "branches/position | tokens before the fork | tokens | mean of branches",
        "branches/entropy | H of the sampler's distribution at the fork | nats | exact, mean of branches",
        "branches/changed | another answer than the parent's | share of branches with both | count",
    ),
    *rows(
        GROUPS,
        SAMPLING,
        "answers/distinct_roots | distinct answers from the prompt, of groups with any | answers | mean",
        "answers/distinct_branches | distinct answers of branches, of groups with any | answers | mean",
    ),
]
"""What `describe` adds where a plan branches or forks; pass/<n> is of
roots alone, absent where all are forced, and n-grams are of own tokens."""

PREDICTION = [
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/realised_change | H of the same tokens after the update minus before | nats | exact, mean",
        "entropy/predicted_change_exact | -A (S_a - E S), S = p (ln p + H) | nats per unit step | mean",
        "entropy/predicted_change_natural | -A (ln p + H) | nats per unit step | mean",
        "entropy/predicted_change_proxy | minus covariance/mean | nats per unit step | mean",
        "entropy/prediction_tokens_exact | realised with predicted, token by token | - | Spearman",
        "entropy/prediction_tokens_natural | realised with predicted, token by token | - | Spearman",
        "entropy/prediction_tokens_proxy | realised with predicted, token by token | - | Spearman",
    ),
    *rows(
        "steps of a window",
        SAMPLING,
        *(
            f"entropy/prediction_{name}_{form} | realised on predicted change | {unit} | {how}"
            for form in ("exact", "natural", "proxy")
            for name, unit, how in (
                ("slope", "step size", "least squares through 0"),
                ("rank", "-", "Spearman"),
            )
        ),
    ),
]
"""What the driver adds every `observe.prediction.every` steps; slope and rank over a window of them. A is
that of the first update: scale and correction in it."""

LAW = rows(
    "steps of a window",
    SAMPLING,
    "law/a | R = -a exp(H) + b, early warning only | share | least squares",
    "law/b | the same | share | least squares",
    "law/ceiling | R at H = 0: b - a | share | least squares",
    "law/low | its interval | share | 95 %, errors taken as independent",
    "law/high | its interval | share | 95 %, errors taken as independent",
    "law/r2 | variance of R explained | share | least squares",
)
"""What the driver adds over a window of steps where nothing is steered."""

PROBE = rows(
    "fixed prompts, without their first tokens",
    "1",
    "entropy/prompt_in | of the first held-out prompts, read and not answered | nats | exact, mean",
    "entropy/prompt_out | of sentences of no task, in the same template | nats | exact, mean",
)
"""Under the weights after the update, with every diagnosis."""

DOMAIN = [
    *rows(
        GROUPS,
        SAMPLING,
        "groups/share:<d> | groups of this part, of all judged | share | count",
        "groups/all_right:<d> | every rollout correct | share | count",
        "groups/all_wrong:<d> | none correct | share | count",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "reward/mean:<d> | correct (0 or 1) | share | mean",
        "length/mean:<d> | response tokens | tokens | mean",
        "length/truncated:<d> | stopped by the limit | share | count",
    ),
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/mean:<d> | H, as in entropy/mean | nats | exact, mean",
        "entropy/p80:<d> | its quantile | nats | exact, linear interpolation",
        "varentropy/mean:<d> | variance of -ln p under p | nats^2 | exact, mean",
    ),
]
"""What the driver adds for each part of a mixture."""

EVALUATION = [
    *rows(
        "held-out prompts",
        SAMPLING,
        "pass@<n> | one of n samples is right | share | unbiased, 1 - C(m-c, n)/C(m, n)",
        "pass^<n> | all of n samples are right | share | unbiased, C(c, n)/C(m, n)",
        "maj@<n> | the most frequent answer of n samples is right; a tie of j counts 1/j | share | exact up "
        "to 64 samples, then over 2000 fixed subsets",
        "avg@<n> | right ones of n samples | share | mean",
    ),
    *rows(
        "held-out prompts",
        "0",
        "greedy | the greedy answer is right | share | mean",
        "cot/surest | CoT-decoding's path with the largest gap is right; wrong where none has a gap | share "
        "| mean",
        "cot/supported | the answer with the largest summed gap is right | share | mean",
    ),
    *rows(
        "samples",
        SAMPLING,
        "calibration/auroc_consistency | a right one is surer than a wrong one, by self-consistency | share "
        "| exact, ties count half",
        "calibration/auroc_logprob | the same by mean ln p of its tokens | share | exact, ties count half",
    ),
    *rows(
        "paths",
        "0",
        "calibration/ece_gap | ECE of the gap: mean p(1) - p(2) over the answer's tokens | share | 15 bins",
        "calibration/brier_gap | the same confidence against correct | share^2 | mean square",
        "calibration/auroc_gap | the same confidence | share | exact, ties count half",
    ),
]
"""What `entroray eval` adds; of the rest it gives diversity, calibration, length and entropy, the latter of
the engine's own distribution."""

HEAD = """# Metrics

Made from `entroray/entropy/catalogue.py`; tests compare both this page and every key that a run writes. In a
name `<n>` stands for a number, `<1,2>` for one of these, `<d>` for a part of a mixture, `<rule>` for a rule
of the objective and `<name>` for a controller. A running total counts from the run's first step on.

Every token metric is over the response tokens of trained groups whose `mask_reason` is null, each once,
before the update, in float64 after rounding to float32, the type of the token records. A metric over
nothing is left out. Entropies at different temperatures, or over different tokens, are not comparable.
In `metrics.jsonl`, those of rollouts and of groups are over every group judged in the step, kept or not,
first draws and hotter second ones alike; `reward/*`, `groups/*` and `length/{mean,max,truncated}` are
without what was replayed. Replayed rollouts are among the trained ones everywhere but in `lag/*`,
`pass/<n>`, `answers/*` and `calibration/*`. Those of `describe` come with every step, those of `diagnose`
every `observe.diagnosis.every` steps. The law is an early warning; it is off while anything in `control`
acts, and where the row trains on a part of the groups, whose entropy is not that of all.
"""


PARTS = {
    "A step": DESCRIBED,
    "A step, every `observe.diagnosis.every`": DIAGNOSED,
    "The run": RUN,
    "An update": UPDATE,
    "Prediction": PREDICTION,
    "The law": LAW,
    "Prompts": PROBE,
    "A sampler that shapes": SAMPLER,
    "A tool": TOOLS,
    "A plan that branches": BRANCHES,
    "How prompts and groups are chosen": CHOICE,
    "A mixture": DOMAIN,
    "Held-out accuracy in a run": HELDOUT,
    "`entroray eval`": EVALUATION,
}
"""The page's, by title; all but the last stand in metrics.jsonl."""
IN_A_RUN = [metric for found in list(PARTS.values())[:-1] for metric in found]


def text() -> str:
    """The whole page."""
    return HEAD + "".join(f"\n## {title}\n\n{_table(found)}" for title, found in PARTS.items())


def _table(metrics: Iterable[Metric]) -> str:
    head = "| metric | definition | unit | over | temperature | estimator |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"| `{m.name}` | {' | '.join(m[1:])} |\n" for m in metrics)


if __name__ == "__main__":
    print(text(), end="")
