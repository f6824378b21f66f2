"""Metrics of the run around the entropies: its pace, its updates, its choices, its held-out accuracy."""

from entroray.entropy.metric import ANY, ROLLOUTS, SAMPLING, rows

RUN = [
    *rows(
        "the run",
        ANY,
        "step | of this line, 1 is the first | steps | number",
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
        "verdicts/failed | of the last 1000 responses, no verdict | share | count",
    ),
    *rows(
        "the step",
        ANY,
        "groups/held | groups finished and held for the next step | groups | count",
        "tokens/per_second | response tokens of the trained groups over seconds/step | tokens / s | exact",
        "seconds/step | the whole step, its evaluation left out | s | wall clock",
        "seconds/sample | until enough groups are drawn and judged | s | wall clock",
        "seconds/score | log-probs and entropies under the learner | s | wall clock",
        "seconds/update | all updates | s | wall clock",
        "seconds/rescore | scoring once more, every observe.prediction.every steps | s | wall clock",
        "seconds/probe | reading fixed prompts, with a diagnosis | s | wall clock",
        "seconds/sync | bringing the new weights to the engines, and the probe | s | wall clock",
        "sync/probe_error | difference of ln p on driver.probe.text, engine to learner, at the first sync "
        "and every driver.probe.every | nats | maximum",
    ),
    *rows(
        ROLLOUTS,
        SAMPLING,
        "reward/trained_mean | correct, of the trained groups alone | share | mean",
        "reward/shaped_mean | the reward as the row's `rewards` make it | as reward | mean",
    ),
    *rows(
        "tokens of the step",
        SAMPLING,
        "objective/<rule>_tokens | the rule changed, chose or weighed it; of a surrogate or penalty, once "
        "for each update it pulled in | tokens | count",
    ),
]
"""What the driver and the machines add: the run itself. A running total only grows."""

UPDATE = [
    *rows(
        "updates of the step",
        ANY,
        "update/loss | the row's loss, skipped updates left out | as A | mean",
        "update/grad_norm | L2 norm of the gradient before it is clipped, skipped updates left out | - | "
        "mean",
        "update/skipped | left out, their gradient not being finite | updates | count",
        "update/lr | learning rate after the last one | - | exact",
    ),
    *rows(
        "tokens of all updates",
        SAMPLING,
        "update/ratio_max | present p / scored p | ratio | maximum",
        "update/entropy | H of the policy as it stood at each update | nats | exact, mean",
        "update/kl | KL(scored, present) when the update was taken | nats | k3",
        "update/kl_k1 | the same | nats | k1: mean of -ln r",
        "update/clip_high_positive | loss flat, r > 1, A > 0 | share | count",
        "update/clip_high_negative | loss flat, r > 1, A < 0 | share | count",
        "update/clip_low_positive | loss flat, r < 1, A > 0 | share | count",
        "update/clip_low_negative | loss flat, r < 1, A < 0 | share | count",
        "objective/silent_tokens | A != 0 and the loss flat in ln p | share | exact gradient",
    ),
]
"""What the learner adds, of the policy as it stood at each update."""

CHOICE = [
    *rows(
        "prompts judged so far",
        ANY,
        "prompts/seen | all of them | prompts | count",
        "prompts/mastered | passed over now for their pass rate | share | count",
        "prompts/inside | running pass rate in the band | share | count",
        "prompts/passed_over | turns at which no prompt was drawn, since the run began | turns | count",
        "prompts/forced | drawn all the same, for want of others, since the run began | prompts | count",
    ),
    *rows(
        "groups judged",
        ANY,
        "second/groups | drawn once more at once, hotter; reward/mean counts both draws | share | count",
        "second/right | right answers of the second draws | share | mean of groups",
        "second/mended | second draws with a right answer | share | count",
        "early/abandoned | rollouts given up when enough of their group had finished | share | count",
        "early/length_kept | those that finished | tokens | mean",
        "early/length_drawn | all drawn, abandoned ones as long as their longest | tokens | lower bound",
        "early/length_bias | length_kept / length_drawn - 1: shorter by at least this | share | upper bound",
        "repetition/looped | rollouts that end in such a loop, stopped or not | share | count",
    ),
    *rows(
        "groups trained on",
        ANY,
        "replay/kept | prompts with a success kept | prompts | count",
        "replay/groups | a replayed rollout in them | share | count",
        "replay/share | off-policy: tokens of replayed rollouts | share | count",
        "replay/age | committed steps since replayed rollouts were drawn; lag/* is without | steps | mean",
    ),
]
"""What the driver adds where `rollout=` chooses; a choice not made adds nothing."""

HELDOUT = [
    *rows(
        "held-out prompts",
        "0",
        "eval/greedy | the greedy answer is right | share | mean",
        "eval/greedy:<d> | the same of one part | share | mean",
    ),
    *rows(
        "held-out prompts",
        "configured, whatever `control` moved it to",
        "eval/pass@<n> | one of n samples is right | share | unbiased, 1 - C(m-c, n)/C(m, n)",
        "eval/pass@<n>:<d> | the same of one part | share | unbiased, 1 - C(m-c, n)/C(m, n)",
    ),
]
"""What the driver adds every `evaluate.every` steps, from responses as long as configured."""
