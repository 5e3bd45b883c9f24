"""The configuration tree: typed, loaded from YAML, overridden by ``a.b=value``, stored with runs.

``load_config("configs/demo.yaml", ["train.steps=10"])`` reads the file, applies the overrides in
order and validates the whole tree.  An unknown key is an error that names the nearest known one.
A recipe says only what differs from these defaults.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from neurojepa.errors import ConfigError
from neurojepa.methods import METHODS
from neurojepa.recipes import read_override, read_recipe


class Config(BaseModel):
    """A branch of the tree: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Free:
    """Marks a key; see ``Free``."""


T = TypeVar("T")
# A key that may differ when a run continues (train/resume.py): it changes neither which samples a
# step sees nor its maths.  On a section it stands for all keys in it.
Free = Annotated[T, _Free()]
Share = Annotated[float, Field(ge=0, le=1)]

# Keys that older versions had, with the value under which they did nothing: what is stored with it
# still opens.
RETIRED = {"model.registers": 0, "model.layer_scale": 0, "objective.sparse.active": 16}


class DataConfig(Config):
    """Which samples, and how they reach the rank."""

    feed: Free[str] = Field(description="URI of a packed feed (directory or s3://...)")
    split: Literal["train", "val", "test"] = Field("train", description="whose scans are drawn")
    modalities: list[str] | None = Field(None, description="keep only these; null keeps all")
    weights: dict[str, float] = Field(
        default_factory=dict,
        description="share of positions by 'cohort/modality'; others are left out; empty = by "
        "balance",
    )
    balance: float = Field(0.5, ge=0, le=1, description="share of positions of a cohort's modality "
                           "~ (number of its scans) ** balance: 1 by counts, 0 all alike")
    cross_modal: Share = Field(0.0, description="share of positions, of those whose session has "
                               "other modalities, that predict one of these from their own scan")
    prefetch_batches: Free[int] = Field(2, ge=1, description="micro-batches read ahead")
    read_threads: Free[int] = Field(8, ge=1, description="range reads in flight per rank")
    # ranks that wait for one another give up after ten minutes (train/world.py)
    retry_s: Free[float] = Field(60, ge=0, le=480, description="how long a store that fails is "
                                 "asked again, for reading and writing, before training stops")
    replace_damaged: Free[bool] = Field(False, description="a damaged sample is replaced by the "
                                        "next of its group instead of stopping the run")
    max_damaged_share: Free[float] = Field(0.001, ge=0, le=1, description="of the samples read; "
                                           "three are always borne")


class ModelConfig(Config):
    """The network.  ``size`` fixes depth, widths and experts (see model/sizes.py)."""

    size: Literal["tiny", "small", "base", "large", "huge"] = Field(
        "base", description="depth, widths, heads and experts (model/sizes.py)")
    patch_voxels: int = Field(12, ge=1, description="edge of a cubic patch, in voxels of the feed")
    token_budget: int | None = Field(320, ge=8, description="tokens per scan, foreground first; "
                                     "null keeps every token of the grid")
    moe: bool = Field(True, description="every other block has a mixture of experts; false: all "
                      "are dense, at the same cost a token")
    head_gate: bool = Field(False, description="sigmoid gate per attention head")
    official: bool = Field(False, description="the encoder of the official code, in weights that "
                           "were converted from it (model/official.py); it is not trained here")
    activation_checkpointing: Free[Annotated[int, Field(ge=0)] | Literal["selective"]] = Field(
        0, description="what the backward computes anew to save memory: 0 nothing, k every k-th "
        "block of the encoder, selective all but matrix products, in all blocks")


class MaskConfig(Config):
    """Context and target masks drawn for every scan.

    ``scales`` are (number of blocks, smallest, largest share of the brain); a block's volume is
    such a share times a second random share, its depth.
    """

    scales: list[tuple[Annotated[int, Field(ge=1)], Share, Share]] = Field(
        [(32, 0.0, 0.2), (16, 0.2, 0.5), (4, 0.5, 0.7)], min_length=1,
        description="one mask each: number of blocks, smallest and largest share of the brain")
    aspect: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.75, 1.5), description="range of the draws that stretch a block along each axis, its "
        "volume unchanged")
    target_share: float = Field(0.75, gt=0, lt=1, description="share of the budget to predict")
    region_share: Share = Field(0.0, description="share of the masks that hide whole regions of "
                                "objective.regions, in random order, instead of blocks")


class SparseConfig(Config):
    """L = ||z - Decoder(h)||^2 + l1 * ||h||_1 on the predictor's output (model/sparse.py)."""

    code: Literal["relu", "gated", "identity"] = Field(
        "relu", description="gated: which atoms are active is decided apart from how strongly; "
        "identity: plain dense JEPA")
    visible: float = Field(0.0, ge=0, description="weight of the same loss on the visible tokens; "
                           "above 0 one code acts on visible and predicted tokens alike, so that "
                           "it shapes the encoder and atoms can be read from any scan")
    atoms: int = Field(0, ge=0, description="0 = four times the encoder's width")
    l1: float = Field(1e-3, ge=0, description="lambda: weight of the code's absolute values")
    l1_warmup_steps: int = Field(100, ge=0, description="l1 grows linearly from 0")
    revive: bool = Field(True, description="atoms silent for 230 steps get a gradient where they "
                         "would help")
    dense_loss: Literal["l1", "l2"] = Field("l1", description="the loss when code is identity")


class AugmentConfig(Config):
    """On-device augmentation, keyed by (seed, position); zero switches a part off."""

    gamma: float = Field(0.3, ge=0, description="log-range of the exponent")
    noise: float = Field(0.03, ge=0, description="largest standard deviation, intensity in [0,1]")
    bias_field: float = Field(0.2, ge=0, description="largest log-amplitude of a smooth field")


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"no such method; one of {', '.join(METHODS)}")
    return name


class ObjectiveConfig(Config):
    method: Annotated[str, AfterValidator(_known_method)] = Field(
        "jepa", description=f"{', '.join(METHODS)} (methods.py): the sparse JEPA or a baseline, a "
        "masked autoencoder and a supervised CNN")
    label: str = Field("age", description="what cnn learns: a number, or one of two names")
    masks: MaskConfig = MaskConfig()
    sparse: SparseConfig = SparseConfig()
    augment: AugmentConfig = AugmentConfig()
    spread: float = Field(0.03, ge=0, description="weight of what keeps the latents of a scan from "
                          "becoming alike (losses.crowding)")
    background_weight: float = Field(0.1, ge=0, le=1, description="loss weight of an all-air token")
    regions: str | None = Field(None, description="label volume in MNI space whose regions are "
                                "masked; null: parcels of the installed template")
    tissue_weight: float | None = Field(
        None, ge=0, description="weight of a linear head that tells from a token what share of its "
        "patch is air, fluid, grey and white matter; null: 1 for jepa, 0 for mae; cnn has none")

    @property
    def tissue(self) -> float:
        """The weight of the tissue head, 0 where there is none."""
        by_default = METHODS[self.method].tissue_weight
        if by_default is None or self.tissue_weight is None:
            return by_default or 0.0
        return self.tissue_weight


class OptimConfig(Config):
    lr: float = Field(5e-4, gt=0, description="highest learning rate, after the warm-up")
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="of lr after the warm-up; under constant a later end changes no "
        "earlier step")
    warmup_steps: int = Field(100, ge=0, description="lr grows linearly from 0")
    # free although it is of the maths: it is decided late (train/schedule.py)
    cooldown_steps: Free[int] = Field(0, ge=0, description="last steps of the run, in which lr "
                                      "falls linearly to min_lr")
    weight_decay: float = Field(0.04, ge=0, description="of AdamW; norms and biases have none")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW's two moments")
    grad_clip: float = Field(1.0, gt=0, description="longest gradient over all parameters")
    ema: float = Field(0.999, ge=0, le=1, description="momentum of the target encoder")
    router_bias_rate: float = Field(1e-3, ge=0, description="step of loss-free expert balancing")


class HealthConfig(Config):
    """When a step is dropped, and when the run goes back or stops (train/health.py)."""

    spike_deviations: float = Field(10.0, ge=0, description="a loss or gradient norm so many "
                                    "robust standard deviations above those of the last steps is "
                                    "dropped; 0: only what is not finite")
    max_skips: int = Field(5, ge=1, description="steps of 20 that may be dropped before the run "
                           "goes back to its checkpoint and steps over these samples")
    max_rollbacks: int = Field(3, ge=0, description="to one checkpoint, before the run stops")
    min_target_std: float = Field(0.05, ge=0, description="below it the targets have collapsed")
    min_effective_rank: float = Field(1.1, ge=0, description="of the targets, likewise")


class TrainConfig(Config):
    steps: int = Field(ge=1, description="optimizer steps of the whole run; may grow later")
    global_batch: int = Field(8, ge=1, description="scans per step, the same at any world size")
    micro_batch: Free[int] = Field(4, ge=1, description="scans per rank and micro-step")
    seed: int = Field(0, description="of weights, order of samples, masks and augmentation")
    zero: Free[Literal[1, 2, 3]] = Field(1, description="ZeRO stage: ranks share the optimizer's "
                                         "state (1), gradients too (2), weights too (3)")
    offload: Free[Literal["none", "optimizer", "all"]] = Field(
        "none", description="to host memory: masters, moments and target average; all, under zero "
        "3: the weights too")
    dtype: Literal["fp32", "bf16"] = Field("bf16", description="of weights and activations; "
                                           "masters and sums are fp32")
    compile: Free[Literal["auto", "off"]] = Field(
        "auto", description="auto: on a GPU blocks, losses and views are compiled, one graph each")
    checkpoint_every: Free[int] = Field(50, ge=1, description="steps between checkpoints")
    keep_last: Free[int] = Field(2, ge=1, description="committed checkpoints to keep")
    milestone_every: Free[int] = Field(0, ge=0, description="steps between checkpoints that are "
                                       "kept for good and exported to weights/step-N; 0 for none")
    log_every: Free[int] = Field(10, ge=1, description="steps between reads of device metrics")
    probe_every: Free[int] = Field(0, ge=0, description="steps between probes of age, sex and "
                                   "diagnosis on embeddings of people in train and val; 0 for none")
    health: Free[HealthConfig] = HealthConfig()

    @model_validator(mode="after")
    def _offload_fits(self) -> TrainConfig:
        if self.offload == "all" and self.zero != 3:
            raise ValueError(f"train.offload all needs train.zero 3 (now {self.zero}), which "
                             "shards the weights; set train.zero=3 or train.offload=optimizer")
        # below 3 DeepSpeed adds up what is offloaded in the weights' own type
        if self.offload != "none" and self.dtype == "bf16" and self.zero != 3:
            raise ValueError(f"train.offload {self.offload} under bf16 needs train.zero 3 (now "
                             f"{self.zero}): elsewhere gradients would be summed in bf16; set "
                             "train.zero=3 or train.dtype=fp32")
        return self


class RunConfig(Config):
    dir: str = Field(description="run directory: config, metrics, events, checkpoints")
    launcher: Literal["env", "local", "ray"] = Field(
        "env", description="env: as started (alone, or under deepspeed); local, ray: start ranks")
    ranks: int = Field(1, ge=1, description="ranks to start when launcher is local or ray")
    min_ranks: int = Field(0, ge=0, description="launcher ray: fewest ranks to train with while "
                           "there is no room for all; 0: wait for all")
    accept_changes: bool = Field(False, description="go on under another recipe than that of the "
                                 "checkpoint, as long as its parameters fit the model")
    deterministic: bool = Field(False, description="deterministic algorithms on a GPU, so that a "
                                "run that was killed ends bit-equal; a CPU needs no such thing")
    network: Literal["nvlink", "infiniband-400g", "efa"] = Field(
        "infiniband-400g", description="between hosts with GPUs (nvlink: one NVLink domain holds "
        "all): how gradients are summed follows from it")
    trackers: list[Literal["mlflow", "wandb"]] = Field(
        [], description="that get the metrics too, besides TensorBoard")
    time_limit_min: float = Field(0, ge=0, description="stop with a checkpoint before so many "
                                  "minutes are over; 0: no limit but that of the Slurm job")


class RootConfig(Config):
    data: DataConfig
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    run: Free[RunConfig]

    @model_validator(mode="after")
    def _method_has_use(self) -> RootConfig:
        objective, method = self.objective, METHODS[self.objective.method]
        for key, value, used in (
                ("data.cross_modal", self.data.cross_modal, method.latents),
                ("objective.masks.region_share", objective.masks.region_share,
                 method.masks == "blocks")):
            if value and not used:
                raise ValueError(f"{key} {value}: objective.method {objective.method} has no use "
                                 f"for it; set {key}=0")
        if objective.regions and not objective.masks.region_share:
            raise ValueError(f"objective.regions {objective.regions}: no mask uses them; set "
                             "objective.masks.region_share too")
        return self

    @model_validator(mode="after")
    def _code_fits(self) -> RootConfig:
        sparse = self.objective.sparse
        if sparse.code == "identity" and sparse.visible:
            raise ValueError(f"objective.sparse.visible {sparse.visible}: code identity has no "
                             "atoms to share; set objective.sparse.visible=0")
        return self

    @model_validator(mode="after")
    def _budget_splits(self) -> RootConfig:
        budget = self.model.token_budget
        if budget is not None and METHODS[self.objective.method].whole_volumes:
            raise ValueError(f"model.token_budget {budget}: objective.method "
                             f"{self.objective.method} sees whole volumes; set "
                             "model.token_budget=null")
        if budget is not None:
            target = round(budget * self.objective.masks.target_share)
            if not 0 < target < budget:
                raise ValueError(
                    f"model.token_budget {budget} x objective.masks.target_share "
                    f"{self.objective.masks.target_share} leaves {target} target tokens; "
                    "both context and target need at least one")
        return self


def load_config(path: str | Path, overrides: list[str] | None = None) -> RootConfig:
    """Read a recipe, apply ``a.b=value`` overrides (values are YAML) and validate the tree.

    Raises
    ------
    ConfigError
        There is no such recipe, or it is not YAML, a key is unknown, a value does not fit.
    """
    tree = read_recipe(path)
    for item in overrides or []:
        _override(tree, item)
    return validate(tree, where=str(path))


def validate(tree: dict[str, Any], where: str) -> RootConfig:
    """Build the typed tree from plain data; ``where`` names its source in errors.

    Raises
    ------
    ConfigError
        Names every key that is unknown, missing or retired, and every value that does not fit.
    """
    try:
        return RootConfig.model_validate(_without_retired(tree, where))
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(map(_explain, error.errors()))) from error


def dump_config(config: RootConfig) -> str:
    """The resolved tree as YAML, as stored in the run directory."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def free_keys(section: type[Config] | None = None, prefix: str = "",
              whole: bool = False) -> set[str]:
    """Dotted names of the keys marked ``Free``, those of a marked section one by one."""
    found: set[str] = set()
    for name, field in (section or RootConfig).model_fields.items():
        free = whole or any(isinstance(mark, _Free) for mark in field.metadata)
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Config):
            found |= free_keys(below, f"{prefix}{name}.", free)
        elif free:
            found.add(prefix + name)
    return found


def _without_retired(tree: dict[str, Any], where: str) -> dict[str, Any]:
    for dotted, idle in RETIRED.items():
        *sections, key = dotted.split(".")
        section: Any = tree
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if not isinstance(section, dict) or key not in section:
            continue
        if section[key] != idle:
            raise ConfigError(f"{where}: {dotted} = {section[key]!r}: this version has no such "
                              f"key and builds only what {idle} stood for; use the version "
                              "that it was made with")
        tree = _without(tree, dotted.split("."))
    return tree


def _without(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """A copy of the tree without the key that the path leads to."""
    name, *rest = path
    if rest:
        return {**tree, name: _without(tree[name], rest)}
    return {key: value for key, value in tree.items() if key != name}


def _override(tree: dict[str, Any], item: str) -> None:
    dotted, value = read_override(item)
    *parents, leaf = dotted.split(".")
    node = tree
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}: {name} is a value, not a section")
        node = child
    node[leaf] = value


def _explain(error: Any) -> str:
    location = [part for part in error["loc"] if isinstance(part, str)]
    dotted = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {dotted!r}; {hint}"
    if error["type"] == "missing":
        return f"{dotted} is required; set it in the file or as {dotted}=VALUE"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not dotted:
        return message
    return f"{dotted} = {error['input']!r}: {message}"


def _known_keys(location: list[str]) -> list[str]:
    model: Any = RootConfig
    for name in location:
        model = model.model_fields[name].annotation
    return list(model.model_fields)
