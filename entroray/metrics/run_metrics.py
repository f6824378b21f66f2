"""Metrics of the run around the entropies: its pace, its updates, its choices, its held-out accuracy."""

from entroray.metrics.metric import ANY, ROLLOUTS, SAMPLING, rows

RUN = [
    *rows(
        "the run",
        ANY,
        "step | number of this line's step, 1 is the first | steps | number",
        "control/<name> | the value that a setting moved by `control` had in the step, before a whole number "
        "is rounded; of sampler.* and rollout.* what groups begun then are drawn with, trained on up to "
        "driver.max_lag steps later | as it | exact",
        "tokens/drawn | response tokens drawn, trained on or not, since the run began | tokens | running "
        "total",
        "groups/dropped | groups given up for want of signal or by failure, since the run began | groups | "
        "running total",
        "groups/refused | groups grown too old and re-issued, since the run began | groups | running total",
        "groups/surplus | groups finished beyond a step's and put aside, since the run began | groups | "
        "running total",
        "verdicts/failed | responses without a verdict, of the last 1000 | share | count",
    ),
    *rows(
        "the step",
        ANY,
        "groups/held | groups finished and held for the next step | groups | count",
        "tokens/per_second | response tokens of the trained groups over seconds/step | tokens / s | exact",
        "seconds/step | time of the whole step, its evaluation left out | s | wall clock",
        "seconds/sample | time until enough groups were drawn and judged | s | wall clock",
        "seconds/score | time of taking log-probs and entropies under the learner | s | wall clock",
        "seconds/update | time of all updates of the step | s | wall clock",
        "seconds/rescore | time of scoring once more, every observe.prediction.every steps | s | wall clock",
        "seconds/probe | time of reading fixed prompts, when a diagnosis is due | s | wall clock",
        "seconds/sync | time of bringing the new weights to the engines, and of comparing log-probs when "
        "due | s | wall clock",
        "sync/probe_error | absolute difference of ln p on driver.probe.text, engine to learner, at the "
        "first sync and every driver.probe.every | nats | maximum",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "correct/trained_mean | right answers of the trained groups alone, replayed ones too | share | mean",
        "reward/shaped_mean | reward of the trained groups as the objective's `rewards` make it | as reward"
        " | mean",
    ),
    *rows(
        "tokens of the step",
        SAMPLING,
        "objective/<rule>_tokens | tokens that the rule changed, chose or weighed; of a surrogate or "
        "penalty, once for each update it pulled in | tokens | count",
    ),
]
"""What the driver and the machines add: the run itself. A running total only grows."""

JUDGE = rows(
    ROLLOUTS,
    SAMPLING,
    "reward/part_<part> | that part of the verdict (Verdict.parts), over rollouts whose verdict has it as a "
    "finite number | as the judge's | mean",
)
"""What the driver adds where a judge fills the parts of its verdicts."""

UPDATE = [
    *rows(
        "updates of the step",
        ANY,
        "update/loss | the objective's loss, skipped updates left out | as A | mean",
        "update/grad_norm | L2 norm of the gradient before it is clipped, skipped updates left out | - | "
        "mean",
        "update/skipped | updates left out, their gradient not being finite | updates | count",
        "update/lr | learning rate after the last update of the step | - | exact",
    ),
    *rows(
        "tokens of all updates",
        SAMPLING,
        "update/ratio_max | largest r = p_a at an update / p_a when scored | ratio | maximum",
        "update/entropy | H of the policy as it stood at each update | nats | exact, mean",
        "update/kl | KL(policy when scored, policy at an update), with r = p_a at the update / p_a when "
        "scored | nats | k3: mean of r - 1 - ln r",
        "update/kl_k1 | KL(policy when scored, policy at an update), with r = p_a at the update / p_a when "
        "scored | nats | k1: mean of -ln r",
        "update/clip_high_positive | tokens where the loss is flat in ln p_a, A > 0 and p_a is above what "
        "it was when scored | share | count",
        "update/clip_high_negative | tokens where the loss is flat in ln p_a, A < 0 and p_a is above what "
        "it was when scored | share | count",
        "update/clip_low_positive | tokens where the loss is flat in ln p_a, A > 0 and p_a is below what it"
        " was when scored | share | count",
        "update/clip_low_negative | tokens where the loss is flat in ln p_a, A < 0 and p_a is below what it"
        " was when scored | share | count",
        "objective/silent_tokens | tokens with A != 0 where the loss is flat in ln p_a | share | exact "
        "gradient",
    ),
]
"""What the learner adds, of the policy as it stood at each update."""

CHOICE = [
    *rows(
        "prompts judged so far",
        ANY,
        "prompts/seen | prompts judged so far | prompts | count",
        "prompts/mastered | prompts passed over now for their pass rate, of those judged so far | share | "
        "count",
        "prompts/inside | prompts whose running pass rate is in rollout.prompts.band, of those judged so "
        "far | share | count",
        "prompts/passed_over | turns of a prompt at which it was passed over, since the run began | turns |"
        " count",
        "prompts/forced | prompts drawn all the same, for want of others, since the run began | prompts | "
        "count",
    ),
    *rows(
        "groups judged",
        ANY,
        "second/groups | groups drawn once more at once, hotter; correct/mean counts both draws | share | "
        "count",
        "second/right | right answers of the second, hotter draw of a group | share | mean of groups",
        "second/mended | second, hotter draws of a group with a right answer | share | count",
        "early/abandoned | rollouts given up when enough of their group had finished | share | count",
        "early/length_kept | response tokens of a rollout among the first of its group to finish | tokens |"
        " mean",
        "early/length_drawn | response tokens of a rollout, abandoned ones as long as the longest that "
        "finished of their group | tokens | lower bound",
        "early/length_bias | early/length_kept / early/length_drawn - 1: responses are shorter by at least "
        "this | share | upper bound",
        "repetition/looped | rollouts that end in a loop (rollout.repetition), stopped or not | share | "
        "count",
    ),
    *rows(
        "groups trained on",
        ANY,
        "replay/kept | prompts with a success kept for replay | prompts | count",
        "replay/groups | groups with a replayed rollout in them | share | count",
        "replay/share | response tokens that are a replayed rollout's, off-policy | share | count",
        "replay/age | committed steps since replayed rollouts were drawn; lag/* is without | steps | mean",
    ),
]
"""What the driver adds where `rollout=` chooses; a choice not made adds nothing."""

HELDOUT = [
    *rows(
        "held-out prompts",
        "0",
        "eval/greedy | the greedy answer is right | share | mean",
        "eval/greedy:<d> | the greedy answer to a prompt of this part is right | share | mean",
    ),
    *rows(
        "held-out prompts",
        "configured, whatever `control` moved it to",
        "eval/pass@<n> | one of n samples of a prompt is right | share | unbiased, 1 - C(m-c, n)/C(m, n)",
        "eval/pass@<n>:<d> | one of n samples of a prompt of this part is right | share | unbiased, 1 - "
        "C(m-c, n)/C(m, n)",
    ),
]
"""What the driver adds every `evaluate.every` steps, from responses as long as configured."""
