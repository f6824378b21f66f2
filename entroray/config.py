"""Every setting once: type, default, meaning. YAML only chooses among them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

TINY = "tiny"
"""`model.path` of the tiny model: built and warm-started here, cached by content."""
USER_FILES = ("reward.path", "rollout.tool.path", "model.template")
"""Settings that name a file of the user's (`my_file.py:my_function`); `user_files` adds those of judges."""
PATHS = ("run.dir", "model.path", "model.warm_start.cache", *USER_FILES, "data.task")
"""Settings that may be a file or a folder."""


@dataclass
class Run:
    dir: str | None = None  # null: `runs/<experiment>/<time>`
    name: str = "train"  # folder under runs/ when dir is null
    steps: int = 100  # each trains on rollout.groups_per_step groups in learner.updates_per_rollout updates
    tokens: int = 0  # response tokens drawn that end a run before run.steps, for fair comparisons; 0: none
    resume: str = "never"  # never | auto: go on with run.dir, else with the newest unfinished run like this
    grace: float = 25.0  # seconds that who sends SIGTERM waits before a kill; a save that took longer is said
    trace: bool = False  # write trace.json.gz, which ui.perfetto.dev shows: what each role did when
    dry: bool = False  # print resources and memory by role, start nothing


@dataclass
class WarmStartConfig:
    """The tiny model: its size, and a supervised warm start until sampled accuracy reaches a band."""

    size: dict[str, int] = field(
        default_factory=lambda: {
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 384,
            "max_position_embeddings": 1024,
        }
    )  # of the tiny model, to transformers' Qwen3Config, untouched: about 0.8 M parameters
    band: list[float] = field(
        default_factory=lambda: [0.15, 0.35]
    )  # accuracy at sampler.temperature: the first look at or above the lower ends the warm start
    max_steps: int = 1000  # supervised steps after which the warm start gives up
    rows_per_step: int = 64  # right answers a supervised step; twice as many prompts are sampled at each look
    check_every: int = 20  # steps between samples of its accuracy
    cache: str | None = None  # null: $ENTRORAY_CACHE or ~/.cache/entroray


@dataclass
class Model:
    path: str = TINY  # Hugging Face folder or hub id; "tiny" is a small one, built and warm-started here
    dtype: str = "float32"  # float32 | bfloat16, of learner and generators
    attention: str = "sdpa"  # of the learner: any implementation transformers knows
    system: str | None = None  # system message before every question
    template: str | None = None  # file of a chat template, my.jinja; null: the tokenizer's own
    template_args: dict[str, Any] = field(default_factory=dict)  # its variables, {enable_thinking: false}
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


@dataclass
class Part:
    """One task of a mixture; what is not here is shared, as `data` has it."""

    weight: float = 1.0  # share of the prompts, beside the weights of the others
    source: str = "reasoning_gym"  # as in data
    task: str = "chain_sum"  # as in data
    settings: dict[str, Any] = field(default_factory=dict)  # as in data
    template: str | None = None  # as in data
    system: str | None = None  # system message; null: model.system
    demonstration: str | None = None  # as in data
    judge: dict[str, Any] = field(default_factory=dict)  # {fn: ..., settings}; empty: reward.judge


@dataclass
class Data:
    source: str = "reasoning_gym"  # reasoning_gym | table | my_lab.data.questions, from your packages
    task: str = "chain_sum"  # reasoning-gym task, a file, a glob of files, a folder, or hub name
    settings: dict[str, Any] = field(
        default_factory=dict
    )  # of the source: size and seed of a generated task, columns and split of a table
    template: str | None = None  # text with {fields} of the row, {{ for a brace; null: the row's question
    demonstration: str | None = None  # how right answers are written: chain_sum | countdown | gsm8k
    heldout: float = 0.05  # fraction for evaluation, by hash of the prompt
    demonstrations: float = 0.3  # fraction for the warm start of the tiny model, by hash
    max_prompt: int = 512  # tokens; longer prompts are dropped and counted
    parts: dict[str, Part] = field(default_factory=dict)  # a mixture: {name: {weight, ...}}, not one task


@dataclass
class Reward:
    path: str | None = None  # my_file.py:my_function instead of the judge below
    judge: dict[str, Any] | None = field(default_factory=dict)  # {fn: ..., settings}; null beside parts
    parts: dict[str, Any] = field(
        default_factory=dict
    )  # several judges at once: {name: {fn: ..., settings, weight: 1}}, or {path: ..., weight: 1}
    correct: str | None = None  # of reward.parts the one that says whether an answer is right
    deadline: float = 5.0  # seconds for each item, a tool call being one; judges on servers have their own
    max_failed: float = 0.2  # share of the last 1000 responses without a verdict, above which the run ends


@dataclass
class Sampler:
    temperature: float = 1.0  # of training samples, and of the entropies and log-probs of the learner
    top_p: float = 1.0  # probability of the likeliest tokens that are drawn from; in training log-probs and
    # entropies are over these, renormalised; on GPUs it needs top_k
    top_k: int = 0  # how many of the likeliest tokens are drawn from, as top_p; 0: all; on GPUs at most 1024
    stop: list[str] = field(default_factory=list)  # text or special tokens that end a response, too
    rule: dict[str, Any] = field(default_factory=dict)  # {fn: ..., settings}: how each draw is reshaped
    insert: str | None = None  # text of a token put in once a response where the rule is unsure


@dataclass
class PromptChoice:
    """Which prompts come up, by their running pass rate; one never judged always does."""

    retire: float = 0.0  # pass rate from which a prompt is passed over; 0: never
    band: list[float] = field(default_factory=lambda: [0.0, 1.0])  # pass rates always drawn, ends included
    outside: float = 0.2  # share of their turns at which prompts outside the band are drawn


@dataclass
class Second:
    """A prompt whose whole group was wrong is drawn hotter, and what is drawn hotter is weighed."""

    factor: float = 1.0  # on the temperature; 1: never
    when: str = "at_once"  # at_once: in place of the group | next_time: factors multiply, 1.5 at most


@dataclass
class Early:
    """More rollouts of each prompt than group_size; the first to finish are taken, the others given up."""

    extra: int = 0  # beyond group_size; favours short responses, and repeated runs may differ; 0: none


@dataclass
class Repetition:
    """A response that has begun to repeat itself is stopped, as truncated."""

    count: int = 0  # times in a row that its last tokens say the same; 0: never stopped


@dataclass
class ReplayConfig:
    """A right answer of a rarely answered prompt replaces one of a later group that is all wrong."""

    tokens: int = 0  # most tokens kept in all, those kept longest leave first; 0: no replay


@dataclass
class ToolConfig:
    fn: str | None = None  # calculator, which answers calls within a response; null: none
    settings: dict[str, Any] = field(default_factory=dict)  # of that function
    path: str | None = None  # my_file.py:my_function instead, called with (call, prompt)
    open: str = "<call>"  # what a call begins with
    close: str = "</call>"  # what ends it, and the turn
    answer: str = "{answer}"  # how the answer stands behind it; it is never trained on


@dataclass
class RolloutConfig:
    group_size: int = 8  # rollouts of one prompt, compared with each other
    groups_per_step: int = 32  # groups trained on in one step
    prompts: PromptChoice = field(default_factory=PromptChoice)
    second: Second = field(default_factory=Second)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    early: Early = field(default_factory=Early)
    repetition: Repetition = field(default_factory=Repetition)
    surplus: str = "by_lag"  # keep | drop groups beyond a step's; by_lag keeps them where max_lag >= 1
    max_tokens: int = 64  # longest response, tools' answers included; longer ones are cut, marked truncated
    deadline: float | None = None  # seconds from the first token of a response, or of a turn, to its last;
    # null: at 10 tokens/s, 300 at least
    turns: int = 4  # most tool calls in one response; it is truncated at one more
    tool: ToolConfig = field(default_factory=ToolConfig)
    plan: dict[str, Any] = field(default_factory=dict)  # {fn: ..., settings}: how a group's members are drawn


@dataclass
class ProbeConfig:
    every: int = 10  # syncs between comparisons; the first is always compared
    tolerance: float = 1e-3  # nats apart, at most in float32, on average in bfloat16, which needs 0.05


@dataclass
class DriverConfig:
    max_lag: int = 0  # steps a trained group's oldest token may be behind; 0 is synchronous
    stale: str = "wait"  # wait: the learner waits | drop: refuse and re-issue
    refill_limit: int = 10  # steps' worth of groups one step may drop for want of signal or by failure
    stall: float | None = None  # seconds without a finished step that end the run; null: by its lengths, 1800
    # at least
    call_deadline: float | None = None  # seconds for the start of an actor, and for a call to learner or
    # verifiers; null: by lengths and the size of the model, 1800 at least
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass
class Lora:
    """Adapters of low rank are trained, W + alpha / rank B A; the model itself stays, as the reference."""

    rank: int = 0  # rows of A and columns of B; 0: all weights are trained, without adapters
    alpha: float | None = None  # null: twice the rank
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # matrices, as [q_proj, v_proj]
    export: str = "adapter"  # adapter | merged: what a run writes as its model


@dataclass
class LearnerConfig:
    ranks: int = 1  # DeepSpeed processes, one GPU each where there are any
    restarts: int = 1  # times that all ranks start anew from the last checkpoint because one of them died
    zero_stage: int = 1  # 0 | 1 | 2 | 3: what of optimizer, gradients and weights is split over ranks
    updates_per_rollout: int = 1  # optimizer updates a step, each over whole groups
    score: str = "auto"  # auto | always: rows are scored before their update only if something reads it
    token_budget: int = 8192  # tokens of one micro-batch, any padding included
    pack: str = "auto"  # auto | always | never: rows end to end, not padded; auto: on GPUs if the model can
    lr: float | None = None  # of AdamW; null: 1e-3 for the tiny model; any other needs its own
    lr_high: bool = False  # allow full training of a model given by path above 1e-4, LoRA above 2e-3
    lora: Lora = field(default_factory=Lora)
    weight_decay: float = 0.0  # of AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW
    max_grad_norm: float = 1.0  # global norm that gradients are clipped to; 0: never
    schedule: str = "constant_with_warmup"  # linear | cosine | constant | ...: of transformers.get_scheduler
    warmup_updates: int = 0  # updates over which the learning rate rises from 0
    reference: bool = False  # a frozen copy of the first weights, even where no penalty needs one
    reset_after: int = 0  # stagnant evaluations after which reference and optimizer begin anew; 0: never
    gradient_checkpointing: bool = False  # less memory for a second forward pass
    gradient_checkpointing_every_n_layers: int = 1  # 2: of every second layer alone; more memory, less time
    gradient_checkpointing_offload: bool = False  # what is kept of them lies in the host's memory; GPUs only
    compile: bool = False  # layers compiled by torch, which takes minutes: GPUs, zero_stage 0 to 2
    liger: bool = False  # Liger's kernels for norms, rotary positions, gated layers: GPUs, extra `liger`
    threads: int | None = None  # null: all cores of the node, halved while engines work too (max_lag >= 1)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # to DeepSpeed, merged key by key


@dataclass
class GeneratorConfig:
    replicas: int = 1  # vLLM engines
    tensor_parallel: int = 1  # GPUs of one engine
    transfer: str = "plasma"  # plasma (any machine) | ipc (one GPU) | nccl (unproved) | adapter: LoRA's alone
    restarts: int = 2  # engines started in place of those that died or failed to start
    sleep: bool = False  # free the engines' GPU memory while ranks work on the same cards
    keep_kv: bool | None = None  # a sync keeps keys and values of samples under way; null: with a lag on GPUs
    overlap: bool = False  # a step is scheduled while the last one computes; GPUs, off until one has shown it
    threads: int | None = None  # of one engine on CPU; null: all cores, halved beside a learner at work
    engine: dict[str, Any] = field(default_factory=dict)  # to vLLM, untouched


@dataclass
class VerifierConfig:
    replicas: int | None = None  # actors that judge, replaced if they die; null: 1, on GPUs 1 for each engine
    slots: int = 2  # processes in each
    memory_mb: int | None = 2048  # what one process may allocate beyond its start
    isolation: str = "auto"  # auto or contained: run code where neither Landlock nor seccomp holds, too


@dataclass
class Cpus:
    """CPU share of one actor in Ray's bookkeeping; threads are set apart."""

    generator: float = 0.4  # one engine
    learner: float = 0.4  # one rank
    verifier: float = 0.1  # one actor


@dataclass
class Cluster:
    address: str | None = None  # of a Ray cluster, on the command line; null: start one here, on loopback
    cpus: Cpus = field(default_factory=Cpus)
    gpus_per_generator: float = 0.0  # of one tensor-parallel shard; below 1 for both: they share a card
    gpus_per_learner: float = 0.0  # of one rank


def share_cards(c: Cluster) -> bool:
    """Whether an engine and a rank are on each card."""
    return 0 < c.gpus_per_generator < 1 and 0 < c.gpus_per_learner < 1


@dataclass
class TokensConfig:
    every: int = 10  # steps between token records; 0: none
    half: list[str] = field(default_factory=list)  # their measured columns kept at 16 bits, as [entropy]


@dataclass
class DiagnosisConfig:
    every: int = 10  # steps between full diagnoses, see entroray/metrics/README.md; 0: none


@dataclass
class PredictionConfig:
    every: int = 10  # steps between predictions of entropy's change, which need scoring passes; 0: none


@dataclass
class Observe:
    tokens: TokensConfig = field(default_factory=TokensConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)
    trackers: list[dict[str, Any]] = field(
        default_factory=lambda: [{"fn": "tensorboard"}]
    )  # [{fn: ..., settings}, ...]: where metrics are copied to, beside metrics.jsonl
    report: bool = True  # write report.html at the end


@dataclass
class Checkpoint:
    every: int = 0  # steps between checkpoints, which Ctrl-C and SIGTERM save too; 0: by time alone
    every_minutes: float = 10.0  # minutes after a checkpoint in which no other is saved; 0: by steps alone
    keep: int = 2  # newest checkpoints kept; the best by held-out accuracy is kept besides


@dataclass
class EvaluationSet:
    """One set of prompts of one's own; what is null or empty is shared, as its comment says."""

    source: str = "table"  # as in data
    task: str = ""  # as in data; without one it is refused
    settings: dict[str, Any] = field(default_factory=dict)  # as in data
    template: str | None = None  # as in data; null: the row's question
    system: str | None = None  # system message; null: model.system
    judge: dict[str, Any] = field(default_factory=dict)  # {fn: ..., settings}; empty: as in training
    prompts: int | None = None  # most prompts, chosen by their hash; null: all
    samples: int | None = None  # answers to each, one at temperature 0; null: evaluate.samples
    temperature: float | None = None  # null: sampler.temperature
    top_p: float | None = None  # null: sampler.top_p
    max_tokens: int | None = None  # longest response; null: rollout.max_tokens
    k: list[int] = field(default_factory=list)  # of pass@k, maj@k, beside 1, 2, 4, ... and samples


@dataclass
class Evaluate:
    prompts: int = 256  # held-out prompts
    samples: int = 8  # answers to each, beside a greedy one
    k: list[int] = field(default_factory=list)  # of pass@k, pass^k, maj@k, beside 1, 2, 4, ... and samples
    cot: int = 0  # likeliest first tokens that entroray eval follows greedily (CoT-decoding); 0: none
    sets: dict[str, EvaluationSet] = field(
        default_factory=dict
    )  # {name: {task, ...}}, whole, before step 1, every `every` steps and at the end; see evaluate=
    every: int = 0  # steps between evaluations on the training engines, the first before step 1; 0: none,
    # of sets the first and the last
    final: bool = False  # before and after training, each in a process of its own


@dataclass
class Config:
    seed: int = 0  # of prompt order, sampling, and of tokens selected by chance
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    reward: Reward = field(default_factory=Reward)
    objective: dict[str, Any] = field(default_factory=dict)  # one function per slot; see objective=
    packages: list[str] = field(default_factory=list)  # your own; any `fn` may name a function of theirs
    control: dict[str, Any] = field(default_factory=dict)  # settings moved in the run; see control=
    sampler: Sampler = field(default_factory=Sampler)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    driver: DriverConfig = field(default_factory=DriverConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    cluster: Cluster = field(default_factory=Cluster)
    observe: Observe = field(default_factory=Observe)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)


def judge_specs(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every judge that is set, each part of a reward being one, and the setting that it is set at."""
    yield from ((f"data.parts.{name}.judge", part.judge) for name, part in config.data.parts.items())
    yield from ((f"evaluate.sets.{name}.judge", of.judge) for name, of in config.evaluate.sets.items())
    yield "reward.judge", config.reward.judge or {}
    yield from ((f"reward.parts.{name}", part) for name, part in config.reward.parts.items())


def user_files(config: Config) -> dict[str, str]:
    """Each setting that names a file of the user's, and what it says; `entroray submit` takes them along."""
    named = {setting: attrgetter(setting)(config) for setting in USER_FILES}
    judges = {f"{s}.path": spec["path"] for s, spec in judge_specs(config) if is_user_file(spec)}
    return {setting: str(path) for setting, path in (named | judges).items() if path}


def is_user_file(spec: Mapping[str, Any]) -> bool:
    """Whether a judge is a function of a file: `{path: my_file.py:my_function}`."""
    return isinstance(spec, Mapping) and "path" in spec and spec.get("fn", "custom") == "custom"
