"""Every metric about entropy and what surrounds it, defined once; README.md beside is made from it.

`python -m entroray.metrics.catalogue > entroray/metrics/README.md`
"""

from collections.abc import Iterable

from entroray.metrics.metric import GROUPS, ROLLOUTS, SAMPLING, TOKENS, Metric, rows
from entroray.metrics.run_metrics import CHOICE, HELDOUT, JUDGE, RUN, UPDATE

DESCRIBED = [
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/mean | H of the learner's full distribution before the update | nats | exact, mean",
        "entropy/p<20,50,80,95> | quantile of H, at the percent named, over the tokens | nats | exact, "
        "linear interpolation",
        "entropy/positive | H over tokens with A > 0 | nats | exact, mean",
        "entropy/negative | H over tokens with A < 0 | nats | exact, mean",
        "varentropy/mean | variance of -ln p_v under p | nats^2 | exact, mean",
        "logprobs/mean | ln p_a of the sampled token, learner before the update | nats | mean; minus it "
        "estimates H",
        "advantages/mean_abs | size of A after credit | as A | mean",
        "mismatch/mean_abs | absolute difference of ln p_a, learner before the update to sampler | nats | "
        "mean",
        "mismatch/max | largest absolute difference of ln p_a, learner before the update to sampler | nats "
        "| maximum",
        "mismatch/kl | KL(sampler, learner before the update), with r = learner's p_a / sampler's p_a | "
        "nats | k3: mean of r - 1 - ln r",
        "lag/mean | committed steps from the weights that sampled a token to those that it trains | steps |"
        " mean",
        "lag/max | largest number of committed steps from the weights that sampled a token to those that it"
        " trains | steps | maximum",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "correct/mean | right answers: the verdict's `correct` (0 or 1) | share | mean",
        "reward/mean | the verifier's reward, unshaped | as reward | mean",
        "reward/std | spread of the verifier's reward, unshaped | as reward | population standard deviation",
        "length/mean | response tokens of a rollout | tokens | mean",
        "length/max | response tokens of the longest rollout | tokens | maximum",
        "length/truncated | rollouts stopped by the token limit, or in a loop (rollout.repetition) | share "
        "| count",
    ),
    *rows(
        GROUPS,
        SAMPLING,
        "groups/all_right | groups with every rollout correct | share | count",
        "groups/all_wrong | groups with no rollout correct | share | count",
    ),
]
"""What `describe` and `judged` give, in every step."""

DIAGNOSED = [
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/tenth_<1,2,3,4,5,6,7,8,9,10> | H of the tokens in that tenth of their response | nats | "
        "exact, mean",
        "varentropy/p<20,50,80,95> | quantile of the variance of -ln p_v under p, at the percent named | "
        "nats^2 | exact, linear interpolation",
        "varentropy/positive | variance of -ln p_v under p, over tokens with A > 0 | nats^2 | exact, mean",
        "varentropy/negative | variance of -ln p_v under p, over tokens with A < 0 | nats^2 | exact, mean",
        "varentropy/tenth_<1,2,3,4,5,6,7,8,9,10> | variance of -ln p_v under p, of the tokens in that tenth"
        " of their response | nats^2 | exact, mean",
        "covariance/mean | c = (ln p_a - mean)(A - mean), the means over the step's tokens | nats | mean",
        "covariance/p<2,50,80,98,99_8> | quantile of c = (ln p_a - mean)(A - mean), at the percent named; "
        "p99_8 is the top 0.2 % | nats | linear interpolation",
        "covariance/clippable | tokens with 1 < c < 5, c = (ln p_a - mean)(A - mean): the band of Clip-Cov "
        "| share | count",
        "quadrants/e<1,2,3,4> | tokens in that quadrant, of those with A != 0. 1: A > 0, -ln p_a <= H. 2: A"
        " > 0, -ln p_a > H. 3: A < 0, -ln p_a <= H. 4: A < 0, -ln p_a > H. 1 and 4 lower H | share | count",
        "quadrants/lowering | part of what an update does to H that lowers it, each token by its first-order "
        "effect, A scale correction (ln p_a + H) | share | sum of those above 0 / sum of sizes",
        "advantages/zero | tokens with A = 0, which have no gradient | share | count",
        "importance/mean | w = learner's p_a / sampler's p_a, uncorrected | ratio | mean",
        "importance/p<99> | 99 % quantile of w = learner's p_a / sampler's p_a, uncorrected | ratio | "
        "linear interpolation",
        "importance/max | largest w = learner's p_a / sampler's p_a, uncorrected | ratio | maximum",
        "importance/effective | (sum w)^2 / (N sum w^2), w = learner's p_a / sampler's p_a: part of the "
        "sample that counts | share | exact",
        "importance/zeroed | tokens whose `correction` is 0 | share | count",
        "mismatch/p<99> | 99 % quantile of the absolute difference of ln p_a, learner before the update to "
        "sampler | nats | linear interpolation",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "length/p<95> | 95 % quantile of the response tokens of a rollout | tokens | linear interpolation",
        "length/right | response tokens of a correct rollout | tokens | mean",
        "length/wrong | response tokens of a rollout that is not correct | tokens | mean",
        "repetition/share | a response's own 4-grams that stood in it before | share | mean of responses",
        "answers/missing | rollouts from which no answer was read | share | count",
        "calibration/ece_consistency | ECE of self-consistency, the share of its group with a rollout's "
        "answer; of rollouts that gave one, in groups of two or more | share | 15 bins",
        "calibration/brier_consistency | self-consistency, the share of its group with a rollout's answer, "
        "against correct; of rollouts that gave one, in groups of two or more | share^2 | mean square",
        "calibration/ece_logprob | ECE of exp(mean ln p of a rollout's own tokens, as drawn) | share | 15 "
        "bins",
        "calibration/brier_logprob | exp(mean ln p of a rollout's own tokens, as drawn) against correct | "
        "share^2 | mean square",
    ),
    *rows(
        GROUPS,
        SAMPLING,
        "distinct/<1,2,3> | distinct n-grams / n-grams of a group, n the number named, of tokens drawn "
        "there | share | mean",
        "answers/distinct | distinct answers of a group, of groups with any | answers | mean",
        "answers/entropy | entropy of the shares of a group's answers, of groups with any | nats | plug-in,"
        " mean",
        "pass/<n> | one of n independent draws from a prompt is right | share | unbiased, 1 - C(m-c, "
        "n)/C(m, n)",
    ),
]
"""What `diagnose` adds every `observe.diagnosis.every` steps."""

SAMPLER = rows(
    "shaped tokens",
    "sampler's",
    "sampler/temperature | temperature that a token was drawn at; 0 where the likeliest was taken | - | "
    "mean of those drawn",
    "sampler/likeliest | tokens where the likeliest was taken, not drawn | share of those drawn | count",
    "sampler/inserted | tokens put there by the sampler, not trained on | share | count",
    "sampler/gap | absolute difference of H, engine to learner, at the policy's temperature; with a lag "
    "also what was learnt since | nats | maximum",
)
"""What `describe` adds where a sampler shaped; mismatch and importance then include what it shaped."""

TOOLS = rows(
    ROLLOUTS,
    SAMPLING,
    "tool/calls | calls of the tool in a rollout that were answered | calls | mean",
    "tool/share | tokens that the tool said | share of response tokens | count",
    "tool/failed | calls of the tool that were answered with an error | share of calls | count",
)
"""What `describe` adds where a rollout called a tool."""
BRANCHES = [
    *rows(
        ROLLOUTS,
        SAMPLING,
        "branches/share | rollouts that began as another's first tokens | share | count",
        "branches/inherited | response tokens that are a parent's, not trained on | share | count",
        "branches/forced | response tokens chosen for the policy, not trained on | share | count",
        "branches/position | response tokens of a branch before its fork | tokens | mean of branches",
        "branches/entropy | H of the sampler's distribution at the fork of a branch | nats | exact, mean of"
        " branches",
        "branches/changed | branches with another answer than their parent's | share of branches with both "
        "| count",
    ),
    *rows(
        GROUPS,
        SAMPLING,
        "answers/distinct_roots | distinct answers of a group's draws from the prompt, of groups with any |"
        " answers | mean",
        "answers/distinct_branches | distinct answers of a group's branches, of groups with any | answers |"
        " mean",
    ),
]
"""What `describe` adds where a plan branches or forks; pass/<n> is of
roots alone, absent where all are forced, and n-grams are of own tokens."""

PREDICTION = [
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/realised_change | H of the same tokens after the update minus before | nats | exact, mean",
        "entropy/predicted_change_exact | -A (S_a - E S), for one policy-gradient step | nats per unit step"
        " | mean",
        "entropy/predicted_change_natural | -A (ln p_a + H), for one natural-gradient step | nats per unit "
        "step | mean",
        "entropy/predicted_change_proxy | -(ln p_a - mean)(A - mean), Clip-Cov's statistic | nats per unit "
        "step | mean",
        "entropy/prediction_tokens_exact | rank correlation of the realised change of H with -A (S_a - E S) "
        "| - | Spearman",
        "entropy/prediction_tokens_natural | rank correlation of the realised change of H with -A (ln p_a + "
        "H) | - | Spearman",
        "entropy/prediction_tokens_proxy | rank correlation of the realised change of H with -(ln p_a - mean)"
        "(A - mean) | - | Spearman",
    ),
    *rows(
        "steps of a window",
        SAMPLING,
        *(
            f"entropy/prediction_{name}_{form} | {said} entropy/predicted_change_{form} | {unit} | {how}"
            for form in ("exact", "natural", "proxy")
            for name, said, unit, how in (
                ("slope", "slope of entropy/realised_change on", "step size", "least squares through 0"),
                ("rank", "rank correlation of entropy/realised_change with", "-", "Spearman"),
            )
        ),
    ),
]
"""What the driver adds every `observe.prediction.every` steps; slope and rank over a window of them."""

LAW = rows(
    "steps of a window",
    SAMPLING,
    "law/a | coefficient a of the law R = -a e^H + b, early warning only | share | least squares",
    "law/b | constant b of the law R = -a e^H + b, early warning only | share | least squares",
    "law/ceiling | b - a, what the law R = -a e^H + b says at H = 0 | share | least squares",
    "law/low | lower end of the interval of law/ceiling | share | Student's t, 95 % were steps independent",
    "law/high | upper end of the interval of law/ceiling | share | Student's t, 95 % were steps independent",
    "law/r2 | variance of R that the law R = -a e^H + b explains | share | least squares",
)
"""What the driver adds over a window of steps where nothing is steered."""

PROBE = rows(
    "fixed prompts, without their first tokens",
    "1",
    "entropy/prompt_in | H over the first held-out prompts, read and not answered | nats | exact, mean",
    "entropy/prompt_out | H over sentences of no task in the template of the task, read and not answered | "
    "nats | exact, mean",
)
"""Under the weights after the update, with every diagnosis."""

DOMAIN = [
    *rows(
        GROUPS,
        SAMPLING,
        "groups/share:<d> | groups of this part, of all judged | share | count",
        "groups/all_right:<d> | groups of this part with every rollout correct | share | count",
        "groups/all_wrong:<d> | groups of this part with no rollout correct | share | count",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "correct/mean:<d> | right answers of this part: the verdict's `correct` (0 or 1) | share | mean",
        "length/mean:<d> | response tokens of a rollout of this part | tokens | mean",
        "length/truncated:<d> | rollouts of this part stopped by the token limit, or in a loop "
        "(rollout.repetition) | share | count",
    ),
    *rows(
        TOKENS,
        SAMPLING,
        "entropy/mean:<d> | H over the trained tokens of this part | nats | exact, mean",
        "entropy/p80:<d> | 80 % quantile of H over the trained tokens of this part | nats | exact, linear "
        "interpolation",
        "varentropy/mean:<d> | variance of -ln p_v under p, over the trained tokens of this part | nats^2 |"
        " exact, mean",
    ),
]
"""What the driver adds for each part of a mixture."""

EVALUATION = [
    *rows(
        "held-out prompts",
        SAMPLING,
        "pass@<n> | one of n samples of a prompt is right | share | unbiased, 1 - C(m-c, n)/C(m, n)",
        "pass^<n> | all of n samples of a prompt are right | share | unbiased, C(c, n)/C(m, n)",
        "maj@<n> | the most frequent answer of n samples of a prompt is right; a tie of j counts 1/j | "
        "share | exact up to 64 samples, then over 2000 fixed subsets",
        "avg@<n> | right ones of the n samples of a prompt | share | mean",
    ),
    *rows(
        "held-out prompts",
        "0",
        "greedy | the greedy answer is right | share | mean",
        "cot/surest | the path of CoT-decoding with the largest gap is right; wrong where none has a gap | "
        "share | mean",
        "cot/supported | the answer with the largest sum of gaps over CoT-decoding's paths is right; wrong "
        "where none has a gap | share | mean",
    ),
    *rows(
        "samples",
        SAMPLING,
        "calibration/auroc_consistency | a right sample is surer than a wrong one by self-consistency, the "
        "share of its prompt's samples with its answer | share | exact, ties count half",
        "calibration/auroc_logprob | a right sample is surer than a wrong one by the mean ln p of its own "
        "tokens, as drawn | share | exact, ties count half",
    ),
    *rows(
        "paths",
        "0",
        "calibration/ece_gap | ECE of the gap of a path of CoT-decoding: mean p(1) - p(2) over its answer's"
        " tokens | share | 15 bins",
        "calibration/brier_gap | gap of a path of CoT-decoding, mean p(1) - p(2) over its answer's tokens, "
        "against correct | share^2 | mean square",
        "calibration/auroc_gap | a right path of CoT-decoding has a larger gap, mean p(1) - p(2) over its "
        "answer's tokens, than a wrong one | share | exact, ties count half",
    ),
]
"""What `entroray eval` adds; of the rest it gives diversity, calibration, length and entropy, the latter of
the engine's own distribution."""

HEAD = """# Metrics

Made from `entroray/metrics/catalogue.py`; tests compare both this page and every key that a run writes. In a
name `<n>` stands for a number, `<1,2>` for one of these, `<d>` for a part of a mixture, `<rule>` for a rule
of the objective, `<part>` for a part of a verdict and `<name>` for a controller. A running total counts
from the run's first step on.

At the place of a token p is the policy's distribution over the vocabulary, H its entropy, v any token and a
the sampled one, A the advantage of a after credit, S_v = p_v (ln p_v + H) and E S = Σ p_v S_v over v. In
`entropy/predicted_change_*` and `entropy/prediction_tokens_*` A is what multiplies the gradient of ln p_a in
the first update: times scale, correction and the token's share of the loss, in units of the mean share;
penalties are no part of it. `entroray/metrics/prediction.py` derives them from dH = -Cov(ln p_v, dz_v), z
the logits (arXiv 2505.22617, lemma 1). The law is R = -a e^H + b with R of `correct/mean` and H of
`entropy/mean`, a and b numbers that `entroray/metrics/reward_entropy_law.py` fits over a window of steps; it
was found in runs (arXiv 2505.22617), not derived.

Every token metric is over the response tokens of trained groups whose `mask_reason` is null, each once,
before the update, in float64 after rounding to float32, the type of the token records. A metric over
nothing is left out. Entropies at different temperatures, or over different tokens, are not comparable.
In `metrics.jsonl`, those of rollouts and of groups are over every group judged in the step, kept or not,
first draws and hotter second ones alike; `reward/*`, `groups/*` and `length/{mean,max,truncated}` are
without what was replayed. Replayed rollouts are among the trained ones everywhere but in `lag/*`,
`pass/<n>`, `answers/*` and `calibration/*`. Those of `describe` come with every step, those of `diagnose`
every `observe.diagnosis.every` steps. The law is an early warning; it is off while anything in `control`
acts, and where the objective trains on a part of the groups, whose entropy is not that of all.
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
    "A judge whose verdicts have parts": JUDGE,
    "A mixture": DOMAIN,
    "Held-out accuracy in a run": HELDOUT,
    "`entroray eval`": EVALUATION,
}
"""The page's, by title; all but the last stand in metrics.jsonl."""


def text() -> str:
    """The whole page."""
    return HEAD + "".join(f"\n## {title}\n\n{_table(found)}" for title, found in PARTS.items())


def _table(metrics: Iterable[Metric]) -> str:
    head = "| metric | definition | unit | over | temperature | estimator |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"| `{m.name}` | {' | '.join(m[1:])} |\n" for m in metrics)


if __name__ == "__main__":
    print(text(), end="")
