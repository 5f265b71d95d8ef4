"""Methods of the comparison against naive references: loops over rows, whole gradients, index arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from rise_ops.baselines.base import Method, Query, Setting
from rise_ops.baselines.bm25 import Bm25
from rise_ops.baselines.hidden_state import HiddenState
from rise_ops.baselines.language import batches, mean_losses, tokenized
from rise_ops.baselines.last_layer import LastLayer
from rise_ops.baselines.plain import Length, Loss, Random
from rise_ops.baselines.rapidin import Folding, RapidIn
from rise_ops.baselines.registry import METHODS, open_method
from rise_ops.baselines.rise import Rise
from rise_ops.baselines.trackstar import TrackStar
from rise_ops.baselines.zeroth_order import ZerothOrder, step_length
from rise_ops.compare_config import (
    Bm25Method,
    CompareConfig,
    HiddenStateMethod,
    LastLayerMethod,
    LengthMethod,
    LossMethod,
    RandomMethod,
    RapidInMethod,
    RiseMethod,
    TrackStarMethod,
    ZerothOrderMethod,
)
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import ConfigError, ModelError
from rise_ops.exact import exact_scores
from rise_ops.model_shape import linear_modules, model_shape, shape_of_model
from rise_ops.scratch import Scratch
from rise_ops.trunk import Trunk, load_trunk, unload_trunk
from tests import tiny_models

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a small green field near the river and the fox",
    "dog",
    "x",
    "the river runs through a field; the dog runs, too! " * 3,
    "over and over and over again the quick fox jumps",
]
QUERIES = [Query("the lazy dog runs near the river"), Query("Q: who? A: the quick fox", "Q: who? A:")]
SKETCH = SketchConfig(dim_r=16, dim_h=8, dim_g=4, temperature=1.0)

Float64Array = npt.NDArray[np.float64]


class Listed:
    """Rows in memory, in batches of two."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = list(texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[list[str]]:
        for start in range(0, len(self._texts), 2):
            yield self._texts[start : start + 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX whose head is not tied to its embeddings."""
    return tiny_models.save("gpt_neox", tmp_path_factory.mktemp("neox"))


def _setting(folder: Path, tmp_path: Path, **changes: Any) -> Setting:
    model = ModelConfig(name=str(folder), device="cpu")
    values: dict[str, Any] = {
        "model": model,
        "sketch": SKETCH,
        "shape": model_shape(model),
        "scratch": Scratch(tmp_path, 2**30),
        "memory": 2**28,
        "rows": len(TEXTS),
        "text_bytes": sum(len(text) for text in TEXTS),
        "queries": len(QUERIES),
        "seed": 7,
    }
    return Setting(**values | changes)


def _scores(method: Method, texts: Sequence[str] = TEXTS, queries: Sequence[Query] = QUERIES) -> Float64Array:
    rows = Listed(texts)
    method.load()
    method.build(rows)
    return np.concatenate(list(method.scores(rows, queries))).astype(np.float64)


def _gradients(trunk: Trunk, query: Query, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Of the mean loss of one text, from the model's own loss; None where it predicts nothing."""
    (text,) = tokenized(trunk, [query], max_tokens=1_024)
    if not text.counted:
        return None
    labels = torch.from_numpy(text.ids.copy())[None]
    labels[:, : text.start] = -100
    for parameter in parameters:
        parameter.requires_grad_(True)
    loss = trunk.model(input_ids=torch.from_numpy(text.ids)[None], labels=labels).loss
    found = torch.autograd.grad(loss, list(parameters))
    for parameter in parameters:
        parameter.requires_grad_(False)
    return list(found)


def _near(expected: Float64Array, error: float) -> Any:
    """What is expected of TEXTS: the fourth has one token, which predicts nothing, and so no score."""
    expected[3] = np.nan
    return pytest.approx(expected, abs=error, nan_ok=True)


def _unit(vector: torch.Tensor) -> Float64Array:
    return np.asarray((vector / vector.norm()).double().numpy())


def test_losses_are_the_model_s_own(folder: Path) -> None:
    trunk = load_trunk(ModelConfig(name=str(folder), device="cpu"))
    queries = [*(Query(text) for text in TEXTS), *QUERIES]
    found = mean_losses(trunk, tokenized(trunk, queries, max_tokens=1_024))
    for query, loss in zip(queries, found, strict=True):
        (text,) = tokenized(trunk, [query], max_tokens=1_024)
        if not text.counted:
            assert np.isnan(loss)
            continue
        labels = torch.from_numpy(text.ids.copy())[None]
        labels[:, : text.start] = -100
        own = trunk.model(input_ids=torch.from_numpy(text.ids)[None], labels=labels).loss
        assert loss == pytest.approx(float(own), abs=1e-5)
    prompted = tokenized(trunk, QUERIES, max_tokens=1_024)[1]
    assert 1 < prompted.start == trunk.count_tokens("Q: who? A:")
    assert len(tokenized(trunk, [Query(TEXTS[4])], max_tokens=5)[0].ids) == 5


def test_batches_hold_every_text_once_and_padding_does_not_count(folder: Path) -> None:
    trunk = load_trunk(ModelConfig(name=str(folder), device="cpu"))
    texts = tokenized(trunk, [Query(text) for text in TEXTS], max_tokens=1_024)
    found = list(batches(trunk, texts, max_tokens=64))
    assert sorted(place for batch in found for place in batch.places) == [0, 1, 2, 4, 5]
    for batch in found:
        for slot, place in enumerate(batch.places):
            assert int(batch.counts[slot].sum()) == texts[place].counted


@pytest.mark.parametrize(("entries", "width"), [(4_096, 64), (5_000, 128), (97, 16)])
def test_folding_is_shuffles_signs_and_sums_of_runs(entries: int, width: int) -> None:
    folding = Folding(entries, width, shuffles=3, seed=5)
    step = -(-entries // width)
    assert folding.runs.bincount(minlength=width).max() <= step
    if entries % width == 0:
        assert (folding.runs.bincount(minlength=width) == step).all()
    assert set(folding.signs.tolist()) == {-1, 1}
    # the rounds themselves, on a vector
    vector = torch.arange(1, entries + 1, dtype=torch.float64)
    whole = torch.cat([vector, torch.zeros(step * width - entries, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(5)
    low, high = len(whole) ** (1 / 3), len(whole) ** (2 / 3)
    sides = [side for side in range(1, len(whole) + 1) if len(whole) % side == 0 and low <= side <= high] or [1]
    shuffled = whole.clone()
    for _ in range(3):
        for dim in (0, 1):
            side = sides[int(torch.randint(len(sides), (), generator=generator))]
            order = torch.randperm(side, generator=generator)
            table = shuffled.reshape((side, -1) if dim == 0 else (-1, side))
            shuffled = (table[order] if dim == 0 else table[:, order]).reshape(-1)
    runs = torch.zeros(width, dtype=torch.float64).index_add_(0, folding.runs, vector)
    assert torch.equal(runs, shuffled.reshape(width, step).sum(dim=1))


def test_folded_vectors_keep_inner_products_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 4_096, generator=generator)
    two += one
    products = []
    for seed in range(200):
        folding = Folding(4_096, 256, shuffles=4, seed=seed)
        left, right = (torch.zeros(256).index_add_(0, folding.runs, each * folding.signs) for each in (one, two))
        products.append(float(left @ right))
    error = np.std(products) / len(products) ** 0.5
    assert abs(np.mean(products) - float(one @ two)) < 4 * error


def test_rapidin_folds_normalised_gradients_of_all_parameters(folder: Path, tmp_path: Path) -> None:
    method = RapidIn(_setting(folder, tmp_path), RapidInMethod(method="rapidin", width=1_024, shuffles=2))
    found = _scores(method)
    trunk, folding = method.trunk, method._folding
    parameters = list(trunk.model.parameters())

    def fold(query: Query) -> Float64Array:
        gradients = _gradients(trunk, query, parameters)
        if gradients is None:
            return np.zeros(1_024)
        flat = torch.cat([(each / each.norm()).flatten() for each in gradients]) * folding.signs
        return _unit(torch.zeros(1_024).index_add_(0, folding.runs, flat))

    expected = np.stack([fold(Query(text)) for text in TEXTS]) @ np.stack([fold(query) for query in QUERIES]).T
    assert found == _near(expected, 2e-3)
    assert not any(each.requires_grad for each in parameters)


def test_rapidin_is_no_wider_than_the_model(folder: Path, tmp_path: Path) -> None:
    method = RapidIn(_setting(folder, tmp_path), RapidInMethod(method="rapidin", width=2**30))
    assert method.width <= method.setting.shape.parameters < 2 * method.width


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "olmo2"])
def test_trackstar_projects_gradients_of_linear_modules(
    family: str, precondition: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny_models.save(family, tmp_path_factory.mktemp(family))
    config = TrackStarMethod(method="trackstar", projection=4, precondition=precondition)
    method = TrackStar(_setting(folder, tmp_path), config)
    found = _scores(method)
    trunk, modules = method.trunk, method._modules
    weights = [module.weight for module, _, _ in modules]
    assert len(weights) == len(linear_modules(trunk.model)) and method.width == 16 * len(weights)

    def project(query: Query) -> Float64Array:
        gradients = _gradients(trunk, query, weights)
        if gradients is None:
            return np.zeros((len(weights), 16))
        parts = []
        for gradient, (module, left, right) in zip(gradients, modules, strict=True):
            whole = gradient.T if isinstance(module, Conv1D) else gradient
            parts.append((left.T @ whole @ right).flatten())
        return _unit(torch.stack(parts))

    rows = np.stack([project(Query(text)) for text in TEXTS])
    queries = np.stack([project(query) for query in QUERIES])
    if precondition:
        transformed = []
        for vectors in (rows, queries):
            parts = []
            for number in range(len(weights)):
                moment = rows[:, number].T @ rows[:, number] / len(rows)
                moment += 0.1 * np.trace(moment) / 16 * np.eye(16)
                values, basis = np.linalg.eigh(moment)
                parts.append(vectors[:, number] @ (basis / np.sqrt(values)) @ basis.T)
            whole = np.stack(parts, axis=1).reshape(len(vectors), -1)
            norms = np.linalg.norm(whole, axis=1, keepdims=True)
            transformed.append(np.divide(whole, norms, out=np.zeros_like(whole), where=norms > 0))
        rows, queries = transformed
    expected = rows.reshape(len(rows), -1) @ queries.reshape(len(queries), -1).T
    assert found == _near(expected, 5e-3)
    assert not any(each.requires_grad for each in trunk.model.parameters())


def test_last_layer_is_the_cosine_of_the_head_s_gradients(folder: Path, tmp_path: Path) -> None:
    method = LastLayer(_setting(folder, tmp_path), LastLayerMethod(method="last_layer"))
    found = _scores(method)
    head = [method.trunk.model.get_output_embeddings().weight]
    gradients = [
        None if (each := _gradients(method.trunk, query, head)) is None else _unit(each[0].flatten())
        for query in [*(Query(text) for text in TEXTS), *QUERIES]
    ]
    rows, queries = gradients[: len(TEXTS)], gradients[len(TEXTS) :]
    for row, vector in enumerate(rows):
        expected = [np.nan if vector is None else float(vector @ query) for query in queries if query is not None]
        assert found[row] == pytest.approx(expected, abs=1e-5, nan_ok=True)


def test_last_layer_is_what_signatures_would_estimate_without_limits(folder: Path, tmp_path: Path) -> None:
    method = LastLayer(_setting(folder, tmp_path), LastLayerMethod(method="last_layer"))
    texts = [text for number, text in enumerate(TEXTS) if number != 3]
    found = _scores(method, texts)
    whole = SketchConfig(temperature=1.0, top_k=tiny_models.VOCABULARY, adaptive_support=False)
    expected = exact_scores(
        method.trunk, whole, texts, [each.text for each in QUERIES], [each.prompt for each in QUERIES], kind="gradient"
    )
    assert found == pytest.approx(expected, abs=1e-4)


def test_last_layer_gives_the_same_in_several_passes(folder: Path, tmp_path: Path) -> None:
    queries = [*QUERIES, Query("again the quick fox"), Query("a field; a dog"), Query("near the river")]
    config = LastLayerMethod(method="last_layer")
    whole = _scores(LastLayer(_setting(folder, tmp_path), config), queries=queries)
    need = LastLayer(_setting(folder, tmp_path), config).need().bytes
    tight = _scores(LastLayer(_setting(folder, tmp_path, memory=need), config), queries=queries)
    assert tight == _near(whole, 1e-6)


def _trained(folder: Path, target: Path, *, seed: int) -> Path:
    """The model with all weights moved a little."""
    trunk = load_trunk(ModelConfig(name=str(folder), device="cpu"))
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(target)
    trunk.tokenizer.save_pretrained(target)
    return target


def test_z0_inf_multiplies_changes_of_losses(folder: Path, tmp_path: Path) -> None:
    middle = _trained(folder, tmp_path / "middle", seed=1)
    last = _trained(middle, tmp_path / "last", seed=2)
    config = ZerothOrderMethod(method="z0_inf", checkpoints=(str(folder), str(middle)))
    setting = _setting(last, tmp_path)
    found = _scores(ZerothOrder(setting, config))
    models = [ModelConfig(name=str(each), device="cpu") for each in (folder, middle, last)]
    trunks = [load_trunk(each) for each in models]

    def losses(queries: Sequence[Query]) -> Float64Array:
        return np.stack([mean_losses(trunk, tokenized(trunk, queries, max_tokens=1_024)) for trunk in trunks])

    rows, queries = np.diff(losses([Query(text) for text in TEXTS]), axis=0), np.diff(losses(QUERIES), axis=0)
    expected = np.zeros((len(TEXTS), len(QUERIES)))
    for step in range(2):
        pairs = zip(trunks[step].model.parameters(), trunks[step + 1].model.parameters(), strict=True)
        square = sum(float((after.double() - before.double()).square().sum()) for before, after in pairs)
        assert step_length(models[step], models[step + 1]) == pytest.approx(square**0.5, rel=1e-6)
        expected += np.outer(rows[step], queries[step]) / square
    usable = [0, 1, 2, 4, 5]
    assert found[usable] == pytest.approx(expected[usable], rel=1e-3, abs=1e-9)
    assert np.isnan(found[3]).all()
    for trunk in trunks[1:]:
        unload_trunk(trunk)


def test_z0_inf_refuses_checkpoints_that_do_not_go_together(folder: Path, tmp_path: Path) -> None:
    setting = _setting(folder, tmp_path)
    with pytest.raises(ConfigError, match="needs checkpoints"):
        ZerothOrder(setting, ZerothOrderMethod(method="z0_inf"))
    same = ZerothOrder(setting, ZerothOrderMethod(method="z0_inf", checkpoints=(str(folder),)))
    with pytest.raises(ModelError, match="are the same"):
        same.load()
    other = tiny_models.save("olmo2", tmp_path / "olmo2")
    with pytest.raises(ModelError, match="is in one of them only"):
        ZerothOrder(setting, ZerothOrderMethod(method="z0_inf", checkpoints=(str(other),))).load()
    wide = tiny_models.save("gpt_neox", tmp_path / "wide", vocab_size=420)
    with pytest.raises(ModelError, match="has another shape"):
        ZerothOrder(setting, ZerothOrderMethod(method="z0_inf", checkpoints=(str(wide),))).load()


@pytest.mark.parametrize("punctuation", [True, False])
def test_bm25_is_the_formula(folder: Path, tmp_path: Path, punctuation: bool) -> None:
    config = Bm25Method(method="bm25", k1=1.2, b=0.6, punctuation=punctuation)
    found = _scores(Bm25(_setting(folder, tmp_path), config))
    marks = ".,;:!?"

    def split(text: str) -> list[str]:
        spaced = "".join(f" {sign} " if sign in marks else sign for sign in text.lower())
        return [term for term in spaced.split() if punctuation or term not in marks]

    documents = [split(text) for text in TEXTS]
    average = sum(len(each) for each in documents) / len(documents)
    for row, document in enumerate(documents):
        for column, query in enumerate(QUERIES):
            score = 0.0
            for term in split(query.text):
                holding = sum(term in each for each in documents)
                idf = np.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                count = document.count(term)
                score += idf * count / (count + 1.2 * (1 - 0.6 + 0.6 * len(document) / average))
            assert found[row, column] == pytest.approx(score, abs=1e-4)


def test_hidden_states_are_averaged_where_tokens_count(folder: Path, tmp_path: Path) -> None:
    method = HiddenState(_setting(folder, tmp_path), HiddenStateMethod(method="hidden_state"))
    found = _scores(method)

    def pooled(query: Query) -> Float64Array:
        (text,) = tokenized(method.trunk, [query], max_tokens=1_024)
        if not text.counted:
            return np.zeros(32)
        states = method.trunk.hidden_states(torch.from_numpy(text.ids)[None], [len(text.ids)])[0]
        return _unit(states[text.start - 1 : len(text.ids) - 1].mean(dim=0))

    expected = np.stack([pooled(Query(text)) for text in TEXTS]) @ np.stack([pooled(query) for query in QUERIES]).T
    assert found == _near(expected, 2e-3)


def test_plain_figures_of_rows(folder: Path, tmp_path: Path) -> None:
    setting = _setting(folder, tmp_path)
    long = _scores(Length(setting, LengthMethod(method="length", order="highest")))
    short = _scores(Length(setting, LengthMethod(method="length", order="lowest")))
    assert long[:, 0].tolist() == [len(text) for text in TEXTS] and (short == -long).all()
    low = _scores(Loss(setting, LossMethod(method="loss", order="lowest")))
    trunk = load_trunk(setting.model)
    losses = mean_losses(trunk, tokenized(trunk, [Query(text) for text in TEXTS], max_tokens=1_024))
    assert low[:, 0] == pytest.approx(-losses, abs=1e-5, nan_ok=True)
    chance = [
        _scores(Random(_setting(folder, tmp_path, seed=seed), RandomMethod(method="random"))) for seed in (1, 1, 2)
    ]
    assert (chance[0] == chance[1]).all() and (chance[0] != chance[2]).any()


def test_rise_is_the_product_of_signatures(folder: Path, tmp_path: Path) -> None:
    method = Rise(_setting(folder, tmp_path, seed=42), RiseMethod(method="rise", temperature=0.5, dim_r=8))
    found = _scores(method)
    assert method.sketch == SKETCH.model_copy(update={"temperature": 0.5, "dim_r": 8, "seed": 42})
    rows = method._signer.rows(TEXTS).signature.astype(np.float64)
    queries = method._signer.queries([each.text for each in QUERIES], [each.prompt for each in QUERIES])
    assert found == _near(rows @ queries.signature.astype(np.float64).T, 1e-5)
    with pytest.raises(ConfigError, match="temperature auto was not chosen"):
        Rise(_setting(folder, tmp_path), RiseMethod(method="rise", temperature="auto"))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_needs_before_anything_is_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    config = CompareConfig(methods=[name]).methods[0]
    if isinstance(config, ZerothOrderMethod):
        config = config.model_copy(update={"checkpoints": (str(folder),)})
    method = open_method(config, _setting(folder, tmp_path))
    need = method.need()
    assert need.bytes > 0 and need.text
    assert not hasattr(method, "trunk")


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
def test_sizes_are_known_before_a_model_is_loaded(family: str, tmp_path: Path) -> None:
    folder = tiny_models.save(family, tmp_path / "whole")
    config = ModelConfig(name=str(folder), device="cpu")
    assert model_shape(config) == shape_of_model(load_trunk(config).model)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(ModelError, match="no causal language model that is known"):
        model_shape(ModelConfig(name=str(broken)))
