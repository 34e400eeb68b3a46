"""The schema of report.json, version 1. Programs may rely on it; a change of meaning gets a new number.

Fractions are 0 to 1, sizes are bytes, times are seconds unless the name says milliseconds, divergences and losses
are nats per token. Every ratio reads "above 1 is better than the baseline". None is "not measured", and a
`…_reason` beside it says why. docs/method.md says how each figure is taken.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1

Verdict = Literal["pass", "fail", "inconclusive"]
Task = Literal["causal-lm", "sequence-classification", "token-classification"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Interval(_Strict):
    """Ends of a 95 % interval; None where there was one observation."""

    low: float | None
    high: float | None
    value: float | None = None


class Ratio(Interval):
    """A figure with its 95 % interval."""

    value: float


class Percentiles(_Strict):
    """Of `n` values; None where there are none."""

    p50: float | None
    p95: float | None
    p99: float | None
    n: int


# ---------------------------------------------------------------- inputs


class BaseInput(_Strict):
    name: str
    architecture: str
    parameters: int
    dtype: str
    size_bytes: int


class AdapterInput(_Strict):
    name: str
    kind: str
    """LoRA, rsLoRA, …"""
    rank: int | list[int]
    """All of them where it differs from tensor to tensor."""
    tensors: int
    """Tensors in the adapter's file, all of which found their place."""
    adapted: int
    """Weights of the base that they change."""
    weight: float = 1.0
    """What its change is multiplied by, where it is one of several."""


class DataInput(_Strict):
    calibration: dict[str, Any]
    """`items`, `tokens`, and how they were chosen."""
    test: dict[str, Any]
    """`items`, `positions`, and how they were chosen."""
    notes: dict[str, Any] = Field(default_factory=dict)


class Inputs(_Strict):
    base: BaseInput
    adapters: list[AdapterInput]
    """In their order."""
    combine: dict[str, Any] | None = None
    """How several became one: `method`, and the settings that it has."""
    data: DataInput | None


# ---------------------------------------------------------------- merge and baseline


class MergeCandidate(_Strict):
    """One base, with the adapters merged into it and the weights rounded as they are written; float32."""

    kl_mean: Ratio
    """KL(live ‖ merged), live being the adapter on the base that it was trained on."""
    nll: Ratio
    """Of the reference responses."""


class MergeBaseMeasured(_Strict):
    """Both bases on the same probe prompts, those of the calibration set."""

    chosen: str
    decided: bool
    """Whether the 95 % interval of the difference of the two KLs leaves out 0."""
    candidates: dict[str, MergeCandidate]
    nll: Ratio
    """The live model's."""
    items: int
    positions: int
    reused: bool = False
    measured_at: str = ""


class MergeBase(_Strict):
    """Which base an adapter that was trained on a quantized one was merged into."""

    chosen: Literal["original", "dequantized"]
    method: Literal["original", "dequantized", "measure"]
    trained_on: dict[str, Any]
    """`settings` of bitsandbytes, or the `folder`'s name."""
    measured: MergeBaseMeasured | None
    """None where nothing was measured: one base was asked for, or there was one only."""


class MergeProof(_Strict):
    """Mean KL over the scored positions; live = base + live adapter."""

    math_kl: float
    """KL(live ‖ merged), both in float32, weights unrounded: what the arithmetic of the merge costs."""
    rounding_kl: float
    """KL(live ‖ merged), computed in float32, weights rounded as they are written: what storing them costs."""
    kl_mean: float
    """KL(live ‖ merged), both computed in the checkpoint's dtype: what a user of either sees."""
    floor_kl: float
    """KL(live in float32 ‖ live in the checkpoint's dtype): what that dtype costs without any merge."""
    adapter_kl: float | None = None
    """KL(live ‖ base): what the adapter does here. Near 0 the proof says little."""
    top1_agreement: float
    top1_agreement_float32: float | None = None
    positions: int
    bounds: dict[str, float] = Field(default_factory=dict)
    """What the first three, and `logit_error`, had to stay under."""
    logit_error: float | None = None
    """Of a classifier: largest error of a merged logit (float32, unrounded), of the largest logit."""
    reference: str = ""
    """Not empty where nothing computes the adapters' combination live: then each was proved alone, and no more."""
    steps: list[dict[str, Any]] = Field(default_factory=list)
    """Where one proof is not enough: the figures of each, in the adapters' order; those above are the worst's."""
    verdict: Verdict = "pass"
    """A merge that misses a bound ends the build, so a report without a verdict passed."""
    reused: bool = False
    measured_at: str = ""


class BaseAlone(_Strict):
    ppl: float
    nll: float
    accuracy: float | None = None


class Baseline(_Strict):
    """Base + live adapter."""

    facts: dict[str, Any]
    ppl: float
    nll: float
    accuracy: float | None = None
    accuracy_by: dict[str, dict[str, float]] = Field(default_factory=dict)
    accuracy_reason: str = ""
    gain: Ratio | None
    """NLL(base) − NLL(baseline), nats per token."""
    base: BaseAlone
    reused: bool = False
    measured_at: str = ""


class ClassFigures(_Strict):
    """One class. None where there is nothing to divide by."""

    support: int
    """How often it is right in the test text."""
    precision: float | None
    recall: float | None
    f1: float | None


class ClassifierBase(_Strict):
    """The base without the adapter; `chance`, every class equally likely, where the head came with the adapter."""

    kind: Literal["base", "chance"]
    nll: float
    accuracy: float | None
    macro_f1: float | None


class ClassifierBaseline(_Strict):
    """Base + live adapter."""

    facts: dict[str, Any]
    unit: Literal["text", "word"]
    """What is scored."""
    labels: list[str]
    nll: float
    """Of the right class, nats per text or word."""
    accuracy: float
    macro_f1: float
    """Over the classes that the test text has."""
    by_class: dict[str, ClassFigures]
    intervals: dict[str, Interval]
    gain: Ratio
    """NLL(base) − NLL(baseline)."""
    base: ClassifierBase
    reused: bool = False
    measured_at: str = ""


# ---------------------------------------------------------------- targets


class GateResult(_Strict):
    metric: str
    bound: str
    """As people read it, in the figure's own unit: "≥ 0.95"."""
    action: Literal["fail", "warn"]
    value: float | None
    low: float | None
    high: float | None
    verdict: Literal["pass", "fail", "inconclusive", "not applicable"]
    reason: str = ""


class Quality(_Strict):
    ppl: float
    nll: float
    kl_mean: float
    kl_p99: float
    flips: float
    top1_agreement: float
    accuracy: float | None = None
    accuracy_by: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Label → value → accuracy."""
    gain_kept: Ratio | None
    gain_kept_reason: str = ""
    accuracy_reason: str = ""
    intervals: dict[str, Interval] = Field(default_factory=dict)
    positions: int
    items: int


class ClassifierQuality(_Strict):
    nll: float
    kl_mean: float
    kl_p99: float
    flips: float
    flips_bound: float | None
    """Where there are none: the share of other items that could differ (exact binomial bound, 97.5 %)."""
    agreement: float
    accuracy: float
    macro_f1: float
    macro_f1_loss: float
    """Baseline − artifact."""
    by_class: dict[str, ClassFigures]
    gain_kept: Ratio | None
    gain_kept_reason: str = ""
    intervals: dict[str, Interval] = Field(default_factory=dict)
    positions: int
    """Texts or words that were scored."""
    items: int
    unit: Literal["text", "word"]


class _Side(_Strict):
    """Of one side's process, whatever was sent to it."""

    qps: dict[str, float]
    """Of language models by concurrency, of classifiers texts per second by batch size."""
    load_s: float
    peak_rss_bytes: int | None
    start_rss_bytes: int | None
    loaded_rss_bytes: int | None
    threads: int
    facts: dict[str, Any]
    failures: int
    failure_reasons: list[str]
    samples: dict[str, list[float]]


class _Ratios(_Strict):
    """Of a whole measurement, both sides together."""

    scenario: str
    qps_ratio: dict[str, Ratio | None]
    memory_ratio: Ratio | None
    load_ratio: Ratio
    rounds: int
    order: list[str]
    warmup: int
    artifact_failures: int
    seconds: float
    load_average: dict[str, float]
    notes: list[str]


class SpeedSide(_Side):
    ttft_ms: Percentiles
    itl_ms: Percentiles
    decode_tps: float
    prefill_tps: float
    output_tps: dict[str, float]


class Speed(SpeedSide, _Ratios):
    """The artifact's figures, the baseline's under `baseline`, and the ratios."""

    baseline: SpeedSide
    decode_ratio: Ratio
    ttft_ratio: Ratio
    itl_ratio: Ratio
    requests: dict[str, int]
    prompt_tokens: list[int]
    """Shortest, median, longest."""
    new_tokens: int


class BatchTimes(_Strict):
    """Of `n` batches."""

    p50: float
    p90: float
    p99: float
    n: int


class ClassifierSpeedSide(_Side):
    latency_ms: dict[str, BatchTimes]
    """By batch size."""


class ClassifierSpeed(ClassifierSpeedSide, _Ratios):
    """The artifact's figures, the baseline's under `baseline`, and the ratios."""

    baseline: ClassifierSpeedSide
    latency_ratio: dict[str, Ratio | None]
    """Of medians."""
    texts: dict[str, int]
    tokens: list[int]
    """Shortest, median, longest text."""


class Lowering(_Strict):
    seconds: float
    cpu_seconds: float | None = None
    peak_rss_bytes: int | None = None
    notes: dict[str, Any] = Field(default_factory=dict)


class TokenizerDifference(_Strict):
    """One class of awkward texts that the artifact's bare runtime tokenizes in another way."""

    kind: str
    texts: list[str]
    """Names of the texts."""
    mended: bool
    """Whether lora2edge's own sessions are free of it."""
    consequence: str


class TokenizerResult(_Strict):
    """A difference on one of the user's own texts is an error, so all of those were equal."""

    own_texts: int
    probes: int
    """Awkward texts that were tried."""
    differences: list[TokenizerDifference]


class Damage(_Strict):
    """contracts.TensorDamage."""

    name: str
    type: str
    layer: int | None
    relative_error: float
    delta_kept: float | None
    delta_noise: float | None


class ErrorResult(_Strict):
    code: str
    what: str
    why: str = ""
    hint: str = ""
    exit_code: int = 1


class TargetResult(_Strict):
    verdict: Verdict
    gates: list[GateResult] = Field(default_factory=list)
    quality: Quality | ClassifierQuality | None = None
    quality_reason: str = ""
    speed: Speed | ClassifierSpeed | None = None
    """Of the target's first scenario."""
    scenarios: dict[str, Speed | ClassifierSpeed] = Field(default_factory=dict)
    """Name → speed, of all its scenarios."""
    speed_reason: str = ""
    size_bytes: int | None = None
    size_ratio: float | None = None
    """Base checkpoint's bytes / artifact's."""
    peak_rss_bytes: int | None = None
    """Of the artifact's process in the speed measurement."""
    lowering: Lowering | None = None
    tokenizer: TokenizerResult | None = None
    damage: list[Damage] = Field(default_factory=list)
    artifact: str | None = None
    """Folder, relative to the report."""
    facts: dict[str, Any] = Field(default_factory=dict)
    error: ErrorResult | None = None
    reused: dict[str, bool] = Field(default_factory=dict)
    measured_at: dict[str, str | None] = Field(default_factory=dict)


class Phase(_Strict):
    """A part of a stage that ran in a process of its own."""

    what: str
    seconds: float
    cpu_seconds: float


class Stage(_Strict):
    name: str
    seconds: float
    reused: bool = False
    measured_at: str = ""
    phases: list[Phase] = Field(default_factory=list)


class Report(_Strict):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    version_of_schema: Literal[1] = Field(alias="schema")
    task: Task = "causal-lm"
    """Of a classifier, nats are per text, or per word where tokens are classified."""
    lora2edge: str
    verdict: Verdict
    exit_code: int
    command: str
    started_at: str
    """ISO 8601, with its zone."""
    seconds: float
    machine: dict[str, Any]
    inputs: Inputs
    merge_base: MergeBase | None = None
    """None where the adapter was not trained on a quantized base."""
    merge: MergeProof | None
    baseline: Baseline | ClassifierBaseline | None
    targets: dict[str, TargetResult]
    stages: list[Stage]
    not_finite: list[str] = Field(default_factory=list)
    """Figures that were infinite or no number, which JSON cannot hold: they are null in this file."""


def check_report(report: dict[str, Any]) -> None:
    """Raises pydantic.ValidationError where `report` is not of this schema."""
    Report.model_validate(report)
