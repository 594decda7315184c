"""The tables of a recipe: one TOML file, one run. Validated once (`rlpost.recipe` reads them); trusted everywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from rlpost.data.adapters import defaults_of

Dtype = Literal["bfloat16", "float32"]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
RESERVED = ("start", "resume", "step")
"""What eval.jsonl calls evaluations that are not the one after a stage."""
MAX_SERVED_RANK = 512
"""vLLM's (`vllm.config.lora.MaxLoRARanks`)."""


COLDEST, HOTTEST = 0.01, 2.0
"""The samplers' (`rlpost.engines.sampling`)."""


class RecipeError(ValueError):
    """A recipe that cannot run: says which key, what is wrong with it, and what would do."""


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"the least is more than the greatest: use [{limits[1]:g}, {limits[0]:g}]")
    return limits


# -- the policy --------------------------------------------------------------------------------------------------------


class BuildConfig(Table):
    """A Llama model from scratch, with a byte-level tokenizer of its own."""

    hidden_size: Positive
    num_layers: Positive
    num_heads: Positive
    vocab_size: Positive = 448


class ModelConfig(Table):
    path: str | None = None
    """Hub name or directory of a Hugging Face model with its tokenizer."""
    build: BuildConfig | None = None
    """Instead of a path: build one from scratch into the run directory."""

    @model_validator(mode="after")
    def _one_of(self) -> ModelConfig:
        if (self.path is None) == (self.build is None):
            raise ValueError("give either path (a model to start from) or build (a small one from scratch)")
        return self


# -- prompts -----------------------------------------------------------------------------------------------------------


class GeneratedData(Table):
    """Problems made up on the fly, with demonstrations; train and held-out problems never overlap."""

    source: Literal["generated"]
    families: tuple[str, ...]
    """Mixed evenly: "arithmetic", "chains", "repeated_chains" (math), "functions" (code)."""
    split: Literal["train", "heldout"] = "train"
    num_prompts: Positive = 20_000
    """Distinct draws; ordinals beyond it start the next, reshuffled epoch."""


class FileData(Table):
    """A dataset by hub name, its files as hf://datasets/<name>/<file>, or a local file: .json, .jsonl, .jsonl.gz, .parquet."""

    adapter: str | None = None
    """Name of a well-known data set (docs/data.md): it gives every key that the recipe does not."""
    path: str
    prompt: str
    """Text for the policy; {column} stands for a column of the dataset."""
    config: str | None = None
    """Name of the hub dataset's configuration."""
    split: str = "train"
    chat: bool = False
    """Wrap the prompt in the model's chat template as the user's turn."""
    max_prompts: Positive | None = None
    max_prompt_tokens: Positive = 1024
    """Longer prompts are left out and counted."""

    @model_validator(mode="before")
    @classmethod
    def _adapted(cls, table: Any) -> Any:
        if not isinstance(table, dict) or table.get("adapter") is None:
            return table
        return {**defaults_of(str(table["adapter"]), table["source"]), **table}


class PairData(FileData):
    """Prompts with two responses, one preferred: for dpo, and, as demonstrations of the preferred one, for sft.

    Pairs that are empty on one side, the same on both, or longer than the stage's max_response_tokens are left out and
    counted (event `data_left_out`); nothing is cut.
    """

    source: Literal["pairs"]
    chosen: str
    """Column with the preferred response."""
    rejected: str
    """Column with the other one."""


class DatasetData(FileData):
    """Prompts whose responses a verifier can judge."""

    source: Literal["dataset"]
    task: Literal["math", "code"]
    answer: str | None = None
    """math: the column with the gold answer."""
    answer_after: str = ""
    """math: keep only what follows this marker in the answer column ("####" in GSM8K); empty keeps all."""
    tests: str | None = None
    """code: the column with the list of assert statements."""
    setup: str | None = None
    """code: the column with code to run before the tests."""
    solution: str | None = None
    """code: the column with a reference solution; checked against its own tests when the data is loaded."""
    entry_point: str | None = None
    """code: the column with the function's name, where the tests need it."""
    demonstration: str | None = None
    """Column with a worked response, for supervised stages."""
    max_rejected_golds: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of gold answers that their own verifier may reject. Those prompts are left out; more stops the run."""

    @model_validator(mode="after")
    def _columns(self) -> DatasetData:
        if self.task == "math" and self.answer is None:
            raise ValueError('task = "math" needs answer = "<column with the gold answer>"')
        if self.task == "code" and self.tests is None:
            raise ValueError('task = "code" needs tests = "<column with the assert statements>"')
        return self


DataConfig = Annotated[GeneratedData | DatasetData | PairData, Field(discriminator="source")]


# -- workers -----------------------------------------------------------------------------------------------------------


def _whole_or_shared(gpus: float) -> float:
    if gpus not in (0, 0.5, 1):
        raise ValueError("a process takes 0 (the CPU), 1, or 0.5: a GPU that it shares with one other")
    return gpus


GpuShare = Annotated[float, AfterValidator(_whole_or_shared)]


class SamplerConfig(Table):
    workers: Positive = 1
    eval_workers: Annotated[int, Field(ge=0)] = 0
    """Samplers more, for evaluations alone, so that training waits for none; 0: training's samplers evaluate too."""
    gpus: GpuShare = 0
    """GPUs per sampler; 0 runs vLLM on the CPU, 0.5 beside another worker on one GPU, with the kv_cache_mib that is asked for."""
    threads: Positive = 1
    """CPU threads per sampler."""
    dtype: Dtype = "bfloat16"
    """Of the served weights; what the learner publishes."""
    max_num_seqs: Positive = 256
    kv_cache_mib: Positive | None = None
    """Key-value cache; None: 64 on the CPU, what the device has left on a GPU."""

    @model_validator(mode="after")
    def _shares_by_agreement(self) -> SamplerConfig:
        if 0 < self.gpus < 1 and self.kv_cache_mib is None:
            raise ValueError(
                f"gpus = {self.gpus} without kv_cache_mib: what a shared GPU has left depends on who came first. Say how much"
                " the cache may take, as in kv_cache_mib = 4096"
            )
        return self


Share = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Table):
    """What every optimizer is asked; master weights are float32."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled: lr x weight_decay of a weight goes in each step, whatever its gradient."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class AdamW(Optimizer):
    name: Literal["adamw"]
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8


class Lion(Optimizer):
    """Moves every weight with a gradient by lr in every step: its lr is 3 to 10 times below AdamW's."""

    name: Literal["lion"]
    betas: tuple[Share, Share] = (0.9, 0.99)


class SGD(Optimizer):
    """Its update is proportional to the gradient, so its lr is far above AdamW's."""

    name: Literal["sgd"]
    momentum: Share = 0.9


def _adamw_unless_named(value: object) -> object:
    return {"name": "adamw", **value} if isinstance(value, dict) else value


OptimizerConfig = Annotated[AdamW | Lion | SGD, Field(discriminator="name"), BeforeValidator(_adamw_unless_named)]
"""A table without a name is AdamW's."""


class LoraConfig(Table):
    """Train an adapter s B A on linear layers instead of the weights; publish.policy says how it is served."""

    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    """s = alpha / rank."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Last parts of layer names, as in ["q_proj", "v_proj"], or all linear layers but the output layer."""
    rslora: bool = False
    """s = alpha / sqrt(rank)."""

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, table: Any) -> Any:
        for key in _NO_LORA.keys() & (table if isinstance(table, dict) else {}):
            raise ValueError(f"{key} is not offered: {_NO_LORA[key]}. Leave it out")
        return table


_NO_LORA = {
    "dropout": "the learner must score tokens as the sampler drew them, and a ratio of 1 would become noise",
    "dora": "nothing proves yet that its norms, once merged, give the policy that was trained",
    "init": "the adapter begins at B = 0. Others (PiSSA, OLoRA, ...) change the base, which is the reference",
    "bias": "only the adapters are trained",
    "modules_to_save": "only the adapters are trained",
}
"""Keys of peft's that are refused with a reason."""


class LearnerConfig(Table):
    ranks: Positive = 1
    gpus_per_rank: GpuShare = 0
    """0 learns on the CPU, 0.5 beside a sampler on one GPU."""
    threads: Positive = 1
    """CPU threads per rank while samplers run."""
    dtype: Dtype = "bfloat16"
    """Of the working weights; the masters are float32 either way."""
    zero_stage: Literal[1, 2, 3] = 1
    micro_batch_tokens: Positive = 8192
    """Tokens per forward pass of one rank: the memory dial. Results do not depend on it."""
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    """None: all weights are trained."""
    optimizer: OptimizerConfig = AdamW(name="adamw")

    @model_validator(mode="after")
    def _ranks_on_gpus_of_their_own(self) -> LearnerConfig:
        if 0 < self.gpus_per_rank < 1 and self.ranks > 1:
            raise ValueError(
                f"gpus_per_rank = {self.gpus_per_rank} with ranks = {self.ranks}: two ranks that share a GPU cannot exchange"
                " gradients (NCCL). Use ranks = 1, or gpus_per_rank = 1"
            )
        return self


class ArchiveConfig(Table):
    """Keep every published version in run_dir/versions, for `rlpost checkout`."""

    anchor_every: Positive = 50
    """Versions from one that is kept whole to the next; those between are kept as changes, and rebuilt from it."""


class ObserverConfig(Table):
    """Measure published versions while the run goes on (analysis.jsonl), and write a report of each stage."""

    spectra_every: Positive = 25
    """Versions from one whose update is decomposed to the next."""
    dtype: Literal["bfloat16"] | None = None
    """What versions are rounded to before they are compared; None: compared as served. In float32 every trained entry moves."""
    budget: Annotated[float, Field(gt=0, le=1)] = 0.02
    """Share of one core's time, without a stage's last version and report; what does not fit is left out, and it says so."""


class PublishConfig(Table):
    every: Positive = 1
    """Steps of a stage from one published version to the next; its last version always is one. With max_staleness = every - 1,
    so many steps learn from groups of one version. See docs/algorithms.md."""
    encoding: Literal["delta", "full"] = "delta"
    """delta: each version as what changed since the one before, never more bytes than the weights; a sampler that holds
    another version gets all of them. full: every version whole."""
    policy: Literal["merged", "adapter"] = "merged"
    """What samplers are sent under learner.lora. merged: plain weights, with the adapter in them. adapter: the base as it is and
    the adapter beside it, so that a version is the adapter's changes (docs/algorithms.md)."""
    archive: ArchiveConfig | None = None
    observer: ObserverConfig | None = None
    """In the driver, whose memory then holds three versions and more (--dry-run says how much)."""


class MathVerifierConfig(Table):
    workers: Positive = 1
    """Responses judged at a time, each in a child process of its own."""
    deadline_s: Annotated[float, Field(gt=0)] = 1.0
    """Wall-clock seconds of one response."""
    runs_per_server: Positive = 2000
    """Runs after which a fork server is replaced by a fresh one."""


class CodeVerifierConfig(MathVerifierConfig):
    deadline_s: Annotated[float, Field(gt=0)] = 10.0
    """Wall-clock seconds of one response, for all its tests together."""


class VerifierConfig(Table):
    math: MathVerifierConfig = MathVerifierConfig()
    code: CodeVerifierConfig = CodeVerifierConfig()
    min_tier: Literal["namespace", "landlock"] = "landlock"
    """The least isolation to run model-written code in; a machine that offers less stops the run. See docs/verifiers.md."""
    unsafe_allow_rlimits_only: bool = False
    """Run it even where it can read this machine's files."""
    regrade_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of responses that a second, independent path judges as well; verifier/<task>/disagreement reports the rest."""


class TrackingConfig(Table):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when an API key is set, offline otherwise."""
    project: str = "rlpost"
    entity: str | None = None
    log_groups: Annotated[int, Field(ge=0)] = 1
    """Groups per step whose rollouts are written to rollouts.jsonl."""
    table_every: Annotated[int, Field(ge=0)] = 20
    """Steps whose rollouts, of those in rollouts.jsonl, make one table in wandb; 0: none."""


class DeadlineConfig(Table):
    """Longest waits, in seconds; past them the worker counts as lost."""

    start_s: float = 600.0
    sample_s: float = 3600.0
    judge_s: float = 600.0
    update_s: float = 600.0
    learn_s: float = 3600.0


# -- stages ------------------------------------------------------------------------------------------------------------


Temperature = Annotated[float, Field(ge=COLDEST, le=HOTTEST)]


class EntropyTargetConfig(Table):
    """A temperature that is moved after each step, so that the entropy of what is sampled stays where it is wanted."""

    entropy: Annotated[float, Field(gt=0)]
    """Nats per response token, at that temperature: sampling/entropy is brought to it."""
    start: Temperature = 1.0
    """Of the stage's first groups."""
    min: Temperature = 0.6
    max: Temperature = 1.4
    gain: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Relative change of the temperature per step and relative error of the entropy."""

    @model_validator(mode="after")
    def _starts_within(self) -> EntropyTargetConfig:
        if not self.min <= self.start <= self.max:
            raise ValueError(
                f"start = {self.start:g} is outside of min = {self.min:g} and max = {self.max:g}: use"
                " min <= start <= max"
            )
        return self


def _number_or_table(value: Any) -> str:
    return "table" if isinstance(value, Mapping | EntropyTargetConfig) else "number"


class Sampled(Table):
    """What every algorithm that learns from its own rollouts is asked."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Rollouts per prompt."""
    max_staleness: Annotated[int, Field(ge=0)] = 2
    """Versions between the weights updated and the oldest token trained on; 0 is synchronous."""
    temperature: Annotated[
        Annotated[Temperature, Tag("number")] | Annotated[EntropyTargetConfig, Tag("table")],
        Discriminator(_number_or_table),
    ] = 1.0
    """A number, or an entropy to hold: { entropy = 0.3 }. See docs/algorithms.md."""
    truncated: Literal["train", "mask", "bootstrap"] = "train"
    """Rollouts cut at the token limit: train on them as on others, or leave them out of the loss, or (ppo) let the value of
    their last state take the place of their reward."""
    refill: bool = False
    """Replace groups without signal by fresh ones (DAPO's dynamic sampling)."""
    patience_s: Annotated[float, Field(gt=0)] | None = None
    """Let finished groups overtake a straggler the learner has waited for this long."""

    @property
    def rollouts_per_prompt(self) -> int:
        return self.group_size

    @model_validator(mode="after")
    def _bootstrap_has_a_value(self) -> Sampled:
        if self.truncated == "bootstrap" and not isinstance(self, PPO):
            raise ValueError(
                'truncated = "bootstrap" needs the value of a state, which only name = "ppo" estimates: use "train" or "mask"'
            )
        return self


class PolicyGradientAlgo(Sampled):
    """What policy gradients share, wherever advantages come from; core/objective.py has the equations."""

    ratio_level: Literal["token", "sequence"] = "token"
    clip: Literal["ppo", "cispo"] = "ppo"
    clip_low: Annotated[float, Field(gt=0)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.28
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    proximal: Literal["sampler", "learner"] = "sampler"
    weight_level: Literal["token", "sequence"] = "token"
    weight_form: Literal["truncated", "masked"] = "truncated"
    weight_low: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_high: Annotated[float, Field(ge=1)] = 2.0
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """Of the KL to the policy at the start of the stage."""
    kl_place: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"

    @model_validator(mode="after")
    def _combination(self) -> PolicyGradientAlgo:
        if self.clip == "cispo" and self.dual_clip is not None:
            raise ValueError('dual_clip bounds what clip = "ppo" leaves open; clip = "cispo" leaves nothing: drop one')
        if self.kl_place == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                'kl_estimator = "k1" in the loss has the gradient of log pi alone: the reference has no say in it. Use'
                ' kl_place = "reward", or "k2" (the gradient of KL(policy || reference)) or "k3"'
            )
        if self.kl_place == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f'kl_estimator = "{self.kl_estimator}" in the reward does not have the gradient of a KL: use "k1", which'
                ' does, or kl_place = "loss"'
            )
        return self


class GRPO(PolicyGradientAlgo):
    """Group-relative policy gradient; docs/algorithms.md names the combinations."""

    name: Literal["grpo"]
    advantage: Literal["group_std", "group_mean", "leave_one_out", "batch_std"] = "group_std"

    @model_validator(mode="after")
    def _scale(self) -> GRPO:
        if self.advantage == "batch_std" and self.kl_coef and self.kl_place == "loss":
            raise ValueError(
                'advantage = "batch_std" divides the whole gradient when the step is complete, KL included: use'
                ' kl_place = "reward" with kl_estimator = "k1", where the KL is scaled as the reward is, or kl_coef = 0'
            )
        return self


class CriticConfig(Table):
    """AdamW with learner.optimizer's settings, as the policy's; as much memory as the policy."""

    lr: Annotated[float, Field(gt=0)]
    """Constant over the stage."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps of the stage in which the critic alone learns: the policy's lr is 0, its schedule begins after them."""


class PPO(PolicyGradientAlgo):
    """Policy gradient with the advantages of a critic, which begins as a copy of the stage's first policy."""

    name: Literal["ppo"]
    critic: CriticConfig
    group_size: Annotated[int, Field(ge=1)] = 1
    """Rollouts per prompt; the critic needs no others to compare with."""
    gae_gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Of the policy's advantages; the critic learns the return itself."""

    @model_validator(mode="before")
    @classmethod
    def _no_group_advantage(cls, table: Any) -> Any:
        if isinstance(table, Mapping) and "advantage" in table:
            raise ValueError(
                'a critic gives the advantages of name = "ppo": leave advantage out, or use name = "grpo" for those of a group'
            )
        return table

    @model_validator(mode="after")
    def _every_group_teaches(self) -> PPO:
        if self.refill:
            raise ValueError(
                "refill replaces groups whose rewards are all equal, and with a critic those teach as well: leave it out"
            )
        return self


class Pairs(Table):
    """Learning from pairs, or with kto from the two responses of a pair each on its own; docs/algorithms.md names the
    methods, core/preference.py and core/kto.py have the equations."""

    loss: Literal["dpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    gamma: Annotated[float, Field(ge=0)] = 0.0
    nll_coef: Annotated[float, Field(ge=0)] = 0.0
    """Of the negative log-likelihood of the chosen response, per token."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """kto: weight of a desirable response's loss."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """kto: of an undesirable one's."""

    @model_validator(mode="after")
    def _has_meaning(self) -> Pairs:
        for key, losses in _LOSSES_WITH.items():
            field = type(self).model_fields.get(key)
            if field is not None and getattr(self, key) != field.default and self.loss not in losses:
                of = " or ".join(f'"{loss}"' for loss in losses)
                raise ValueError(
                    f'{key} is a setting of loss = {of} and has no meaning in loss = "{self.loss}": leave it out'
                )
        return self


_LOSSES_WITH = {
    "label_smoothing": ("dpo", "simpo"),
    "gamma": ("simpo",),
    "nll_coef": ("dpo", "ipo", "simpo", "orpo"),
    "min_gap": ("dpo", "ipo", "simpo", "orpo"),
    "min_chosen": ("dpo", "ipo", "simpo", "orpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "min_desirable": ("kto",),
}
"""Settings that only some losses read."""


class DPO(Pairs):
    """From the pairs of a data set."""

    name: Literal["dpo"]
    use_idle_cores: bool = True
    """Let the learner's threads use all cores: samplers have nothing to do."""

    @property
    def rollouts_per_prompt(self) -> int:
        return 2


class OnlineDPO(Pairs, Sampled):
    """From pairs of its own rollouts: of each group the best against the worst by verified reward; with kto from all."""

    name: Literal["online_dpo"]
    min_gap: Annotated[float, Field(ge=0)] = 0.0
    """Least difference of the two rewards; ties are never a pair."""
    min_chosen: float | None = None
    """Least reward of the chosen response."""
    min_desirable: float = 0.5
    """kto: least reward of a desirable response; those with less are undesirable."""

    @model_validator(mode="after")
    def _every_response_teaches(self) -> OnlineDPO:
        if self.loss == "kto" and self.refill:
            raise ValueError(
                'refill replaces groups whose rewards are all equal, and with loss = "kto" those teach as well: leave it out'
            )
        return self


class SFT(Table):
    name: Literal["sft"]
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    use_idle_cores: bool = True
    """Let the learner's threads use all cores: samplers have nothing to do."""

    @property
    def rollouts_per_prompt(self) -> int:
        return 1


Algo = Annotated[GRPO | PPO | OnlineDPO | DPO | SFT, Field(discriminator="name")]


class CosineLengthConfig(Table):
    """The part falls from the first value to the second as a response grows to max_response_tokens."""

    weight: float = 1.0
    correct: tuple[float, float] = (1.0, 0.5)
    wrong: tuple[float, float] = (0.0, -0.5)


class OverlongConfig(Table):
    """The part is 0, and falls to -1 over the last buffer_tokens before max_response_tokens."""

    weight: float = 1.0
    buffer_tokens: Positive


class RepetitionConfig(Table):
    """The part is minus the share of word n-grams that repeat an earlier one."""

    weight: float = 1.0
    ngram_words: Positive = 20


class RewardConfig(Table):
    """The reward as a weighted sum of parts (reward/shaping.py); each is reported as reward/<part>/mean, weighted or not."""

    accuracy: float = 1.0
    """Weight of 1 for a right response, 0 for a wrong one."""
    format: float = 0.0
    """Weight of 1 for an answer the verifier could read, 0 for none."""
    thinking_format: float = 0.0
    """Weight of 1 for exactly one closed thinking part."""
    cosine_length: CosineLengthConfig | None = None
    overlong: OverlongConfig | None = None
    repetition: RepetitionConfig | None = None


class UpdatedEntries(Table):
    """Entries that an earlier run had changed when it went from one model directory to the other."""

    select: Literal["update"]
    before: str
    after: str
    dtype: Dtype | None = None
    """In which the two are compared; None: the one that samplers serve."""
    control: Literal["random", "complement"] | None = None
    """Instead: as many entries of each weight, chosen at random of all, or of those left out."""
    seed: int = 0
    """Of the control."""


class PrincipalEntries(Table):
    """Of each linear layer but the output layer: the largest entries of its approximation of rank `rank` (LIFT)."""

    select: Literal["principal"]
    rank: Positive
    density: Annotated[float, Field(gt=0, le=1)]
    """Share of the layer's entries."""
    control: Literal["random", "complement"] | None = None
    """Instead: as many entries of each weight, chosen at random of all, or of those left out."""
    seed: int = 0
    """Of the control."""


class RandomEntries(Table):
    """The same share of every weight."""

    select: Literal["random"]
    density: Annotated[float, Field(gt=0, le=1)]
    seed: int = 0


class FileEntries(Table):
    """Entries that a file lists, as `rlpost mask` writes one."""

    select: Literal["file"]
    path: str
    control: Literal["random", "complement"] | None = None
    """Instead: as many entries of each weight, chosen at random of all, or of those left out."""
    seed: int = 0
    """Of the control."""


SubnetworkConfig = Annotated[
    UpdatedEntries | PrincipalEntries | RandomEntries | FileEntries, Field(discriminator="select")
]


class KeepConfig(Table):
    """Problems to train on, by samples of them that `rlpost eval` drew; both ends of a range are inside."""

    samples: str
    """The samples.jsonl."""
    model: str | None = None
    """Whose samples, as `rlpost eval` was given the model; None where the file has those of one."""
    solved: Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)] = (0.0, 1.0)
    """Least and greatest share of a problem's samples that are right."""
    majority: bool = False
    """math: the right answer must have more of the votes than any other."""
    tokens: Annotated[tuple[NotNegative, NotNegative], AfterValidator(_ascending)] = (0.0, inf)
    """Least and greatest mean length of a problem's responses."""


class PlateauConfig(Table):
    """A figure that has stopped rising: of its means, the last `without_gain` are not `min_gain` above the best before."""

    figure: Annotated[str, Field(pattern=r"^(reward/mean|eval/.+/accuracy)$")]
    """reward/mean (of each step), or eval/<name>/accuracy."""
    min_gain: Annotated[float, Field(gt=0)]
    without_gain: Positive = 3
    mean_over: Positive = 1
    """Values per mean; means do not overlap. For reward/mean, enough to average its noise out."""


class UntilConfig(Table):
    """What ends a stage before its `steps`: the first of these."""

    plateau: PlateauConfig | None = None
    tokens: Positive | None = None
    """Response tokens of the steps' rollouts."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Wall time of its steps."""


class StageConfig(Table):
    name: str
    data: str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """A key of [data], or several, each with its weight among the prompts: { math = 0.7, code = 0.3 }."""
    algo: Algo
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    """In place of steps: as many as take every prompt that often."""
    prompts_per_step: Positive
    max_response_tokens: Positive
    lr: Annotated[float, Field(gt=0)]
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; linear and cosine fall to zero at the end of the stage."""
    reward: RewardConfig | None = None
    """None: 1 for a right response, 0 for any other. Evaluation always counts right responses."""
    keep: KeepConfig | None = None
    """None: all problems of the data."""
    retire_above: Share | None = None
    """At the end of an epoch, prompts leave whose group judged last is right in a share above this. See docs/curriculum.md."""
    subnetwork: SubnetworkConfig | None = None
    """Train these entries of the weights alone; None: all. See docs/algorithms.md."""
    until: UntilConfig | None = None
    """May end it before its last step; lr_schedule is that of all `steps`. See docs/curriculum.md."""

    @property
    def shares(self) -> dict[str, float]:
        """Of the prompts, by key of [data]."""
        weights = {self.data: 1.0} if isinstance(self.data, str) else self.data
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @model_validator(mode="after")
    def _has_an_end(self) -> StageConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"stage {self.name!r}: give either steps or epochs")
        if self.epochs is not None and len(self.shares) > 1:
            raise ValueError(
                f"stage {self.name!r}: epochs of {', '.join(self.shares)} end at different steps: give steps instead"
            )
        return self

    @model_validator(mode="after")
    def _reward_fits(self) -> StageConfig:
        if self.reward is not None and not isinstance(self.algo, Sampled):
            raise ValueError(
                f"stage {self.name!r} learns from given responses and has no reward to shape: remove its reward table"
            )
        overlong = self.reward and self.reward.overlong
        if overlong and overlong.buffer_tokens > self.max_response_tokens:
            raise ValueError(
                f"stage {self.name!r}: reward.overlong.buffer_tokens = {overlong.buffer_tokens} is more than"
                f" max_response_tokens = {self.max_response_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _retires_what_it_samples(self) -> StageConfig:
        if self.retire_above is not None and not isinstance(self.algo, Sampled):
            raise ValueError(
                f"stage {self.name!r} learns from given responses, which do not say what the policy solves: leave"
                " retire_above out"
            )
        return self

    @model_validator(mode="after")
    def _critic_fits(self) -> StageConfig:
        if not isinstance(self.algo, PPO):
            return self
        if self.steps is not None:
            check_warmup(self, self.steps)
        if self.algo.truncated == "bootstrap" and self.reward and (self.reward.overlong or self.reward.cosine_length):
            raise ValueError(
                f'stage {self.name!r}: truncated = "bootstrap" puts a value in place of the reward of a cut response, and with'
                ' it of what reward.overlong and reward.cosine_length make of its length: use truncated = "train", or remove'
                " them"
            )
        return self


def check_warmup(stage: StageConfig, steps: int) -> None:
    """Raises ValueError when a critic's warm-up leaves the policy none of the stage's steps."""
    if isinstance(stage.algo, PPO) and stage.algo.critic.warmup_steps >= steps:
        raise ValueError(
            f"stage {stage.name!r}: critic.warmup_steps = {stage.algo.critic.warmup_steps} leaves the policy none of"
            f" {steps} steps, and the critic ends with the stage: use fewer warmup_steps or more steps"
        )


class EvalConfig(Table):
    """Judged before the first stage and after each; `every` so many steps too."""

    name: str
    data: str
    num_prompts: Positive = 256
    samples: Positive = 1
    """Rollouts per prompt; the score is their mean."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_response_tokens: Positive
    every: Positive | None = None
    """Steps of the run from one evaluation to the next within stages, beside training. See docs/evaluation.md."""


class Recipe(Table):
    name: str
    seed: int = 0
    run_dir: Path | None = None
    """Default: runs/<name>."""
    model: ModelConfig
    data: dict[str, DataConfig]
    stage: tuple[StageConfig, ...] = Field(min_length=1)
    eval: tuple[EvalConfig, ...] = ()
    sampler: SamplerConfig = SamplerConfig()
    learner: LearnerConfig = LearnerConfig()
    verifier: VerifierConfig = VerifierConfig()
    publish: PublishConfig = PublishConfig()
    tracking: TrackingConfig = TrackingConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints within a stage; one is written at each stage's end anyway."""
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Of all rollouts, those that may be lost, or that no verifier could judge, before the run stops."""
    ray_address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine."""

    @property
    def directory(self) -> Path:
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        used = [(stage.name, name) for stage in self.stage for name in stage.shares]
        for user, name in [*used, *((item.name, item.data) for item in self.eval)]:
            if name not in self.data:
                raise ValueError(f"{user!r} uses data = {name!r}, but [data] has {sorted(self.data)}")
        for items in (self.stage, self.eval):
            names = [item.name for item in items]
            if len(set(names)) < len(names):
                raise ValueError(f"names must differ, got {names}")
        if taken := [stage.name for stage in self.stage if stage.name in RESERVED]:
            raise ValueError(f"eval.jsonl has other rows under the name {taken[0]!r}: give the stage another")
        if self.sampler.eval_workers and not self.eval:
            raise ValueError(
                f"sampler.eval_workers = {self.sampler.eval_workers}, and there is nothing to evaluate: add an [[eval]], or"
                " leave eval_workers out"
            )
        for stage in self.stage:
            if stage.subnetwork is not None and self.learner.lora is not None:
                raise ValueError(
                    f"stage {stage.name!r}: a subnetwork is of the policy's own weights, and with learner.lora only an"
                    " adapter is trained: drop one of them"
                )
            _check_batch(stage, self.learner)
            for name in stage.shares:
                _check_data(stage.name, self.data[name], stage.algo)
                _check_keep(stage, self.data[name])
            _check_until(stage, self.eval)
            _check_age(stage, self.publish)
        for item in self.eval:
            _check_data(item.name, self.data[item.data], None)
        _check_served(self.sampler, self.learner, self.publish)
        return self


def _check_served(sampler: SamplerConfig, learner: LearnerConfig, publish: PublishConfig) -> None:
    if publish.policy != "adapter":
        return
    if learner.lora is None:
        raise ValueError(
            'publish.policy = "adapter", and there is none: add [learner.lora], or leave publish.policy at "merged"'
        )
    if learner.lora.rank > MAX_SERVED_RANK:
        raise ValueError(
            f"learner.lora.rank = {learner.lora.rank}, and vLLM serves adapters up to rank {MAX_SERVED_RANK}: use a lower"
            ' rank, or publish.policy = "merged"'
        )
    if sampler.gpus and sampler.dtype == "float32":
        raise ValueError(
            'publish.policy = "adapter" with sampler.dtype = "float32", and vLLM\'s GPU kernels take adapters in 16 bits: use'
            ' sampler.dtype = "bfloat16", or publish.policy = "merged"'
        )


def _check_age(stage: StageConfig, publish: PublishConfig) -> None:
    if not isinstance(stage.algo, Sampled) or stage.algo.max_staleness >= publish.every - 1:
        return
    raise ValueError(
        f"stage {stage.name!r}: publish.every = {publish.every}, and the last of so many steps learns from groups"
        f" {publish.every - 1} versions old, more than max_staleness = {stage.algo.max_staleness}. Use max_staleness >="
        f" {publish.every - 1}, or publish.every <= {stage.algo.max_staleness + 1}"
    )


def _check_until(stage: StageConfig, evals: Sequence[EvalConfig]) -> None:
    plateau = stage.until and stage.until.plateau
    if plateau is None:
        return
    if plateau.figure == "reward/mean":
        if not isinstance(stage.algo, Sampled):
            raise ValueError(
                f'stage {stage.name!r}: until.plateau.figure = "reward/mean", and it learns from given responses, which have'
                " no reward: use eval/<name>/accuracy"
            )
        return
    every = {f"eval/{item.name}/accuracy": item.every for item in evals}
    if plateau.figure not in every:
        raise ValueError(
            f"stage {stage.name!r}: no [[eval]] gives until.plateau.figure = {plateau.figure!r}; there are"
            f" {['reward/mean', *every]}"
        )
    if every[plateau.figure] is None:
        raise ValueError(
            f"stage {stage.name!r}: until.plateau.figure = {plateau.figure!r} has no value within the stage: give that [[eval]]"
            " an `every`"
        )


def _check_batch(stage: StageConfig, learner: LearnerConfig) -> None:
    """All batch arithmetic, in one place. Uneven splits over ranks are fine; these are what cannot work."""
    rollouts = stage.prompts_per_step * stage.algo.rollouts_per_prompt
    if rollouts < learner.ranks:
        need = -(-learner.ranks // (rollouts // stage.prompts_per_step))
        raise ValueError(
            f"stage {stage.name!r}: {rollouts} rollouts per step cannot occupy learner.ranks = {learner.ranks}."
            f" Use prompts_per_step >= {need}, or learner.ranks <= {rollouts}"
        )
    if stage.max_response_tokens >= learner.micro_batch_tokens:
        raise ValueError(
            f"stage {stage.name!r}: one response of max_response_tokens = {stage.max_response_tokens} and its prompt do"
            f" not fit learner.micro_batch_tokens = {learner.micro_batch_tokens}. Use micro_batch_tokens >="
            f" {2 * stage.max_response_tokens}, or max_response_tokens <= {learner.micro_batch_tokens // 2}"
        )


def _check_data(name: str, data: DataConfig, algo: Algo | None) -> None:
    """Pairs are for what learns from given responses; an evaluation has no algorithm."""
    if isinstance(algo, DPO) and not isinstance(data, PairData):
        raise ValueError(
            f'stage {name!r}: algo = "dpo" needs data with source = "pairs", not {data.source!r}. To learn from the'
            ' policy\'s own rollouts, use algo = "online_dpo"'
        )
    if isinstance(data, PairData) and not isinstance(algo, DPO | SFT):
        raise ValueError(f'{name!r} needs prompts that a verifier can judge; source = "pairs" has none')


def _check_keep(stage: StageConfig, data: DataConfig) -> None:
    if stage.keep is None:
        return
    if isinstance(data, PairData):
        raise ValueError(f"stage {stage.name!r} learns from pairs, which no verifier judges: leave keep out")
    code = "functions" in data.families if isinstance(data, GeneratedData) else data.task == "code"
    if stage.keep.majority and code:
        raise ValueError(f"stage {stage.name!r}: programs do not vote: leave keep.majority out")
