"""The whole model on toy batches: it learns, gradients go where they should, bad shapes fail."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from neurojepa.config import RootConfig, validate
from neurojepa.errors import ConfigError
from neurojepa.feed.format import TRAINING_GRIDS
from neurojepa.model.build import build_model, check_shapes
from neurojepa.model.jepa import SparseJEPA
from neurojepa.model.moe import moe_layers, update_router_bias
from neurojepa.model.sizes import SIZES
from neurojepa.objective.losses import crowding
from neurojepa.objective.views import Views, make_views
from tests.helpers.batches import GRID, make_batch, make_config
from tests.helpers.kernels import NoSyncNoAtomics


@pytest.fixture(scope="module")
def config() -> RootConfig:
    return make_config(96)


@pytest.fixture(scope="module")
def views(config: RootConfig) -> Views:
    return make_views(make_batch(3), config, GRID, seed=0)


def with_rows(views: Views, index: list[int]) -> Views:
    return Views(**{name: value[index] if isinstance(value, torch.Tensor) else value
                    for name, value in vars(views).items()})


@pytest.mark.parametrize("objective", [{}, {"sparse": {"code": "gated"}},
                                       {"sparse": {"code": "identity"}}],
                         ids=["sparse", "gated", "dense"])
def test_loss_decreases_and_targets_stay(objective: dict, views: Views):
    model = build_model(make_config(96, objective=objective), GRID)
    before = [p.clone() for p in model.target.parameters()]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(30):
        loss, _ = model(views, 1e-3)
        optimizer.zero_grad()
        (loss / 3).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
    assert all(p.grad is None and torch.equal(p, q)
               for p, q in zip(model.target.parameters(), before, strict=True))


@pytest.mark.slow(5)
def test_spread_keeps_the_targets_from_collapsing(views: Views):
    ranks = {}
    for spread in (0.0, 0.05):
        model = build_model(make_config(96, objective={"spread": spread, "tissue_weight": 0.0}),
                            GRID)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(40):
            loss, metrics = model(views, 0.0)
            optimizer.zero_grad()
            (loss / 3).backward()
            optimizer.step()
            with torch.no_grad():  # a fast average, under which the targets follow what is easy
                for slow, fast in zip(model.target.parameters(), model.encoder.parameters(),
                                      strict=True):
                    slow.lerp_(fast, 0.2)
        ranks[spread] = float(metrics["effective_rank"] / metrics["weight"])
    assert ranks[0.0] < 2 and ranks[0.05] > 4


def test_crowding_is_of_each_scan_alone_and_none_where_latents_fill_their_space():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 8, generator=generator, dtype=torch.float64))[0]
    basis -= basis.mean(0)
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(basis.T @ basis / 39), basis.T, upper=False).T
    latents = torch.stack([whitened, whitened[:, :1].expand(-1, 8), torch.ones_like(whitened)])
    valid = torch.ones(3, 40, dtype=torch.bool)
    full, same, constant = crowding(latents, valid).tolist()
    assert abs(full) < 1e-3  # unit variances, no covariance
    assert abs(same - 0.04 * 7) < 1e-3  # each dimension repeats the other seven
    assert abs(constant - 0.99) < 1e-6  # no variance at all, but for epsilon
    hidden = torch.cat([latents, 100 * torch.ones(3, 5, 8)], 1)
    some = torch.cat([valid, torch.zeros(3, 5, dtype=torch.bool)], 1)
    torch.testing.assert_close(crowding(hidden, some), crowding(latents, valid))
    assert torch.equal(crowding(latents[1:2], valid[:1]), crowding(latents, valid)[1:2])


@pytest.mark.parametrize("changes", [{}, {"head_gate": True, "activation_checkpointing": 2},
                                     {"moe": False}], ids=["moe", "gate+recompute", "dense-mlp"])
def test_every_trained_parameter_gets_a_gradient(changes: dict, views: Views):
    model = build_model(make_config(96, model={
        "size": "tiny", "patch_voxels": 3, "token_budget": 96, **changes}), GRID)
    model(views, 1e-3)[0].backward()
    missing = [name for name, p in model.named_parameters()
               if p.requires_grad and (p.grad is None or not p.grad.any())]
    # only the modalities of the batch (T1w, T2w, FLAIR) are moved, but the parameter is one
    assert missing == []
    assert all(not p.requires_grad for p in model.target.parameters())


def test_metrics_are_weighted_sums_that_add_up_over_batches(config: RootConfig, views: Views):
    model = build_model(config, GRID).eval()
    with torch.no_grad():
        loss, whole = model(views, 1e-3)
        parts = [model(with_rows(views, [i]), 1e-3) for i in range(3)]
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    for name in ("weight", "prediction", "sparsity", "crowding", "tissue", "l0", "loss/T1w",
                 "weight/T2w"):
        torch.testing.assert_close(sum(part[1][name] for part in parts), whole[name])
    weighted = (config.objective.spread * whole["crowding"]
                + config.objective.tissue * whole["tissue"])
    torch.testing.assert_close(whole["prediction"] + whole["sparsity"] + weighted, loss)
    torch.testing.assert_close(whole["loss/T1w"] + whole["loss/T2w"] + whole["loss/FLAIR"], loss)
    assert whole["weight"] == 3 and all(not value.requires_grad for value in whole.values())
    assert 1 < whole["effective_rank"] / 3 < 96 and 0.3 < whole["target_std"] / 3 <= 1.05


def test_samples_of_weight_zero_count_for_nothing(config: RootConfig, views: Views):
    model = build_model(config, GRID)
    alone = model(with_rows(views, [0, 1]), 1e-3)
    filled = model(replace(views, weight_B=torch.tensor([1.0, 1.0, 0.0])), 1e-3)
    torch.testing.assert_close(filled[0], alone[0])
    torch.testing.assert_close(filled[1]["explained_variance"], alone[1]["explained_variance"])


def test_collapse_shows_in_rank_and_std(config: RootConfig, views: Views):
    model = build_model(config, GRID)
    with torch.no_grad():
        model.target.norm.weight.zero_()
        model.target.norm.bias.normal_()
    _, metrics = model(views, 0.0)
    assert metrics["target_std"] / 3 < 1e-3 and metrics["effective_rank"] / 3 < 2


@pytest.mark.parametrize("checkpointing", [0, 1])
def test_a_step_never_waits_for_the_device_nor_adds_with_atomics(checkpointing: int):
    config = make_config(96, model={"size": "tiny", "patch_voxels": 3, "token_budget": 96,
                                    "activation_checkpointing": checkpointing})
    model, batch = build_model(config, GRID), make_batch(2)
    layers = moe_layers(model)
    with NoSyncNoAtomics():
        loss, _ = model(make_views(batch, config, GRID, 0), torch.tensor(1e-3))
        loss.backward()
        update_router_bias(layers, torch.stack([layer.load for layer in layers]), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_recomputation_changes_no_bit(dtype: torch.dtype):
    found = []
    for checkpointing in (0, "selective"):
        config = make_config(96, model={"size": "tiny", "patch_voxels": 3, "token_budget": 96,
                                        "activation_checkpointing": checkpointing})
        model = build_model(config, GRID)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        loss, _ = model(make_views(make_batch(2), config, GRID, 0), 1e-3)
        loss.backward()
        found.append([loss, *(layer.load for layer in moe_layers(model)),
                      *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_bf16(config: RootConfig, views: Views):
    model = build_model(config, GRID)
    reference = float(model(views, 1e-3)[0].detach())
    for parameter in model.parameters():  # as the engine does: buffers stay float32
        parameter.data = parameter.data.bfloat16()
    loss, metrics = model(views, 1e-3)
    loss.backward()
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(reference, rel=0.02)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert metrics["l0"].dtype == torch.float32


def test_unscanned_tokens_influence_nothing(config: RootConfig):
    batch = make_batch(2)
    batch.voxels[:, :, :, 12:] = 255
    full = make_config(None)
    views = make_views(batch, full, GRID, seed=0)
    assert not views.valid_BN.all()
    model = build_model(full, GRID)
    poison = torch.where(views.valid_BN[..., None], views.tokens_BNP, 50.0)
    a, b = model(views, 1e-3), model(replace(views, tokens_BNP=poison), 1e-3)
    assert torch.equal(a[0], b[0])
    assert torch.equal(model.embed(views), model.embed(replace(views, tokens_BNP=poison)))
    loads = [layer.load.sum() for layer in moe_layers(model)]
    valid_context = views.valid_BN[torch.arange(2)[:, None, None], views.context_BMC].sum()
    assert all(load == 2 * valid_context * SIZES["tiny"].top_k for load in loads)  # two forwards


def test_target_routes_with_the_encoders_bias(config: RootConfig, views: Views):
    model = build_model(config, GRID)
    layers = moe_layers(model)
    assert len(layers) == 2
    layers[0].bias[1] = 5.0
    model(views, 0.0)
    assert model.target.blocks[1].mlp.bias[1] == 5.0  # type: ignore[union-attr, index]
    assert not model.target.blocks[1].mlp.load.any()  # type: ignore[union-attr, operator]


def test_embedding_is_the_mean_over_valid_tokens(config: RootConfig, views: Views):
    model = build_model(config, GRID)
    embedding = model.embed(views)
    assert embedding.shape == (3, 96) and embedding.dtype == torch.float32
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    shuffled = replace(views, tokens_BNP=views.tokens_BNP[:, order],
                       coords_BN3=views.coords_BN3[:, order], valid_BN=views.valid_BN[:, order])
    torch.testing.assert_close(model.embed(shuffled), embedding, atol=1e-5, rtol=1e-4)


PROGRAM = """
import hashlib, torch
from neurojepa.model.build import build_model
from neurojepa.objective.views import make_views
from tests.helpers.batches import GRID, make_batch, make_config
torch.set_num_threads(1)
config = make_config(96)
model = build_model(config, GRID)
loss, _ = model(make_views(make_batch(2), config, GRID, 0), 1e-3)
loss.backward()
digest = hashlib.sha256()
for p in model.parameters():
    digest.update(p.detach().numpy().tobytes())
    if p.grad is not None:
        digest.update(p.grad.numpy().tobytes())
print(repr(float(loss.detach())), digest.hexdigest())
"""


@pytest.mark.slow(9)
def test_bit_equal_across_processes(run_cli):
    outputs = []
    for _ in range(2):
        result = run_cli("-c", PROGRAM)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1] and len(outputs[0]) > 64


@pytest.mark.parametrize("patch, budget, words", [
    (7, 64, ["model.patch_voxels = 7", "axis x", "108 = 15 x 7 + 3"]),
    (12, 900, ["model.token_budget = 900", "891 tokens", "9 x 11 x 9"]),
])
def test_impossible_shapes_are_refused(patch: int, budget: int, words: list[str]):
    config = make_config(96, model={"size": "tiny", "patch_voxels": patch, "token_budget": budget})
    with pytest.raises(ConfigError) as error:
        build_model(config, TRAINING_GRIDS["1.5mm"])
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("size", list(SIZES))
def test_every_size_builds(size: str):
    """On the meta device: shapes fit, and head dimensions suit the attention kernels."""
    config = make_config(None, model={"size": size, "patch_voxels": 12})
    shape = SIZES[size]
    check_shapes(config, TRAINING_GRIDS["1.5mm"])
    assert shape.dim % shape.heads == 0 and shape.dim // shape.heads % 8 == 0
    assert shape.predictor_dim // shape.predictor_heads % 8 == 0
    assert (shape.top_k + shape.num_shared) * shape.expert_hidden == 4 * shape.dim
    with torch.device("meta"):
        model = SparseJEPA(config, TRAINING_GRIDS["1.5mm"])
    millions = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    low, high = {"tiny": (0.5, 1), "small": (25, 50), "base": (115, 130), "large": (500, 1000),
                 "huge": (1500, 4000)}[size]
    assert low < millions < high


class _Masks(TorchFunctionMode):
    """Notes which attention gets a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[bool] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.masked.append(kwargs["attn_mask"] is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["jepa", "mae"])
def test_where_all_is_scanned_no_mask_is_made_and_nothing_changes(method: str):
    config = make_config(objective={"method": method})
    batch = make_batch(3)
    batch.weight[2] = 0  # one that fills up: none of its tokens is valid
    views = make_views(batch, config, GRID, 0).without_fill_up()
    assert views.valid_BN[:2].all() and not views.valid_BN[2].any()
    model, results = build_model(config, GRID), []
    for known in (False, True):
        model.zero_grad()
        with _Masks() as attention:
            loss, _ = model(replace(views, all_scanned=known), 1e-3)
        loss.backward()
        assert set(attention.masked) == {not known}
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for masked, free in zip(*results, strict=True):
        torch.testing.assert_close(free, masked, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("code", ["relu", "gated"])
def test_one_dictionary_for_visible_and_predicted_tokens(code: str, views: Views):
    model = build_model(make_config(96, objective={
        "sparse": {"code": code, "visible": 1.0}, "tissue_weight": 0.0, "spread": 0.0}), GRID)
    assert isinstance(model, SparseJEPA)
    loss, metrics = model(views, 1e-2)
    parts = [metrics[name] for name in ("prediction", "sparsity", "gate", "visible")
             if name in metrics]
    torch.testing.assert_close(loss.detach(), torch.stack(parts).sum())
    h_BNA = model.atoms(views)
    assert h_BNA.shape == (*views.valid_BN.shape, 4 * 96) and h_BNA.min() >= 0
    z_hat = model.code.decoder(h_BNA)
    assert z_hat.shape == model.latents(views).shape


def test_the_penalty_on_visible_tokens_reaches_the_encoder(views: Views):
    """Without the predictor's gradient too: what is penalised is what users get."""
    norms = []
    for l1 in (0.0, 1.0):
        model = build_model(make_config(96, objective={
            "sparse": {"visible": 1.0}, "tissue_weight": 0.0, "spread": 0.0}), GRID)
        for param in model.predictor.parameters():
            param.requires_grad_(False)
        model(views, l1)[0].backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.encoder.parameters()
                                if p.grad is not None]))
    assert not torch.allclose(norms[0], norms[1], rtol=0.1)


def test_without_it_the_model_has_the_weights_it_had(config: RootConfig):
    names = {name for name, _ in build_model(config, GRID).named_parameters()}
    shared = {name for name, _ in build_model(make_config(96, objective={
        "sparse": {"visible": 0.5}}), GRID).named_parameters()}
    assert shared - names == {"widen.weight"} and not names - shared


def test_a_dense_code_has_no_atoms_to_share():
    with pytest.raises(ConfigError, match=r"objective\.sparse\.visible 1\.0: code identity"):
        make_config(96, objective={"sparse": {"code": "identity", "visible": 1.0}})


@pytest.mark.parametrize(("objective", "state", "expected"), [
    ({}, "48afc43d3cae68ce", 4.800676),
    ({"sparse": {"code": "gated"}}, "caeb49b2090608aa", 8.152603),
    ({"sparse": {"code": "identity"}}, "2658623b84742be0", 4.027331),
    ({"method": "mae"}, "432637ce2d755a20", 2.998430)])
def test_weights_of_version_0_2_0_fit_and_mean_the_same(objective: dict, state: str,
                                                        expected: float):
    """Figures are that version's: a hash of the names, shapes and types of its state, its loss."""
    tree = make_config(96, objective=objective).model_dump()
    del tree["objective"]["sparse"]["visible"], tree["train"]["compile"]  # came later
    config = validate(tree, "stored by 0.2.0")
    model = build_model(config, GRID)
    lines = "".join(f"{name} {tuple(value.shape)} {value.dtype}\n"
                    for name, value in sorted(model.state_dict().items()))
    assert hashlib.sha256(lines.encode()).hexdigest().startswith(state)
    loss, _ = model(make_views(make_batch(3), config, GRID, 0), 1e-3)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
