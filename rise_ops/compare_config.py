"""The sections `compare` and `closed_loop`: what RISE is compared with, on whose rows, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, field_validator, model_validator

from rise_ops.config_base import Section, TargetConfig, no_url

Order = Literal["highest", "lowest"]
Arm = Literal["rise", "lowest", "random", "bm25", "length"]


class _Method(Section):
    name: str | None = Field(None, min_length=1, max_length=40, description="What tables call it.")
    seeds: int | None = Field(None, ge=1, le=100, description="Runs, if it draws; default: compare.seeds.")


class RiseMethod(_Method):
    """This package's own estimator; what is not given here is as in `sketch`."""

    method: Literal["rise"]
    temperature: float | Literal["auto"] | None = Field(None, description="Or auto: chosen on a sample, as in tuning.")
    dim_r: int | None = Field(None, gt=0, description="Width of the residual sketch.")
    dim_h: int | None = Field(None, gt=0, description="Width of the hidden-state sketch.")
    dim_g: int | None = Field(None, gt=0, description="Width of the back-projected residual sketch.")

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float) and value <= 0:
            raise ValueError("must be above 0")
        return value


class RapidInMethod(_Method):
    """RapidIn (arXiv 2405.11724): full-parameter gradients, shuffled, sign-flipped and folded."""

    method: Literal["rapidin"]
    width: int = Field(65_536, gt=0, description="Numbers of a row, each of 2 bytes.")
    shuffles: int = Field(20, gt=0, description="Rounds of shuffling, each of rows and of columns.")
    max_tokens: int = Field(512, gt=1, description="Tokens of a text that are looked at, as its authors do.")


class TrackStarMethod(_Method):
    """Projected gradients of each linear module, after TrackStar (arXiv 2410.17413)."""

    method: Literal["trackstar"]
    projection: int = Field(16, gt=0, description="Width of each side of a module's projected gradient.")
    precondition: bool = Field(True, description="Divide by the rows' second moments, for each module.")
    max_tokens: int = Field(1_024, gt=1, description="Tokens of a text that are looked at.")


class ZerothOrderMethod(_Method):
    """Z0-Inf (arXiv 2510.11832): how losses move together between checkpoints."""

    method: Literal["z0_inf"]
    checkpoints: tuple[Annotated[str, AfterValidator(no_url)], ...] = Field(
        (), description="Hub names or folders in the order of training; the configured model comes last."
    )
    max_tokens: int = Field(1_024, gt=1, description="Tokens of a text that are looked at.")


class LastLayerMethod(_Method):
    """The gradient of the LM head, whole: what RISE sketches."""

    method: Literal["last_layer"]
    max_tokens: int = Field(1_024, gt=1, description="Tokens of a text that are looked at.")


class Bm25Method(_Method):
    """Okapi BM25 over words."""

    method: Literal["bm25"]
    k1: float = Field(1.5, ge=0, description="Saturation of term counts.")
    b: float = Field(0.75, ge=0, le=1, description="Normalisation by length.")
    punctuation: bool = Field(True, description="Punctuation marks are terms, too.")


class HiddenStateMethod(_Method):
    """Cosine of mean-pooled last hidden states."""

    method: Literal["hidden_state"]
    max_tokens: int = Field(1_024, gt=1, description="Tokens of a text that are looked at.")


class LossMethod(_Method):
    """Mean loss of a row's tokens, the same for every query."""

    method: Literal["loss"]
    order: Order = Field("lowest", description="Which rows come first.")
    max_tokens: int = Field(1_024, gt=1, description="Tokens of a text that are looked at.")


class LengthMethod(_Method):
    """Tokens of a row, the same for every query."""

    method: Literal["length"]
    order: Order = Field("highest", description="Which rows come first.")


class RandomMethod(_Method):
    """Another order for every query, by chance."""

    method: Literal["random"]


MethodConfig = Annotated[
    RiseMethod
    | RapidInMethod
    | TrackStarMethod
    | ZerothOrderMethod
    | LastLayerMethod
    | Bm25Method
    | HiddenStateMethod
    | LossMethod
    | LengthMethod
    | RandomMethod,
    Field(discriminator="method"),
]

_METHOD: TypeAdapter[MethodConfig] = TypeAdapter(MethodConfig)


def parse_method(value: Any) -> MethodConfig:
    """A method's configuration from what `model_dump` made of it."""
    return _METHOD.validate_python(value)


_ALL = ("rise", "rapidin", "trackstar", "last_layer", "z0_inf", "bm25", "hidden_state", "loss", "length", "random")


class CompareConfig(Section):
    """What `curate compare` does."""

    methods: tuple[MethodConfig, ...] = Field(
        _ALL, validate_default=True, description="Names of methods, or mappings with their parameters."
    )
    targets: tuple[str, ...] = Field((), description="Targets whose queries are asked; none: all.")
    label: str = Field("label", min_length=1, description="FIELD, or FIELD=VALUE, that makes a row positive.")
    k: tuple[Annotated[int, Field(gt=0)], ...] = Field((5, 10, 50), min_length=1, description="Values of K.")
    seeds: int = Field(1, ge=1, le=100, description="Runs of each method that draws random numbers.")
    dilute: tuple[Annotated[float, Field(ge=1)], ...] = Field(
        (1.0,), min_length=1, description="Also with so many times fewer positive rows among the others."
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _a_name_is_enough(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, list | tuple):
            return value
        return tuple({"method": each} if isinstance(each, str) else each for each in value)

    @model_validator(mode="after")
    def _told_apart(self) -> CompareConfig:
        if not self.methods:
            raise ValueError("name at least one method")
        named = [each.name for each in self.methods if each.name is not None]
        for name in named:
            if named.count(name) > 1:
                raise ValueError(f"two methods are named '{name}'")
        return self


class ChoicesConfig(TargetConfig):
    """Multiple choice by likelihood: each text's own ending among those of other texts."""

    distractors: int = Field(3, ge=1, description="Endings of other texts that each is held against.")


class ClosedLoopConfig(Section):
    """Train the model on what several methods select at one budget, and see what it is worth."""

    tokens: int = Field(gt=0, description="Tokens that each arm selects.")
    held_out: dict[str, TargetConfig] = Field(
        min_length=1, description="Texts by name whose loss is measured before and after; no run selects by them."
    )
    choices: ChoicesConfig | None = Field(None, description="Texts with prompts for a multiple-choice task.")
    arms: tuple[Arm, ...] = Field(
        ("rise", "random", "lowest", "bm25", "length"), min_length=1, description="Who selects."
    )
    seeds: int = Field(3, ge=1, le=100, description="Trainings of each arm: order of rows, and the random selection.")
    epochs: int = Field(1, ge=1, description="Passes over the selected rows.")
    context: int = Field(256, gt=1, description="Tokens of a sequence; rows are packed into sequences.")
    batch: int = Field(16, gt=0, description="Sequences of a step.")
    learning_rate: float = Field(1e-3, gt=0, description="Highest learning rate of AdamW.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Part of the steps in which it rises; then it falls to 0.")
    weight_decay: float = Field(0.1, ge=0, description="Of matrices.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    checkpoint_steps: int = Field(100, gt=0, description="Steps after which the state of a training is kept.")
