"""The configuration tree: loading, overrides, refusals, and every recipe that is shipped."""

from pathlib import Path

import pytest

from neurojepa.config import RETIRED, dump_config, free_keys, load_config, validate
from neurojepa.errors import ConfigError

MINIMAL = "data: {feed: f}\ntrain: {steps: 3}\nrun: {dir: r}\n"
RECIPES = sorted(Path("configs").glob("*.yaml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_apply_in_order_and_the_resolved_tree_loads_again(recipe: Path) -> None:
    config = load_config(recipe, ["train.steps=5", "train.steps=7", "optim.lr=1e-3",
                                  "data.modalities=[T1w]"])
    assert (config.train.steps, config.optim.lr, config.data.modalities) == (7, 1e-3, ["T1w"])
    recipe.write_text(dump_config(config))
    assert load_config(recipe) == config


@pytest.mark.parametrize(("override", "words"), [
    ("train.step=7", ["train.step", "'steps'"]),
    ("trian.steps=7", ["trian", "'train'"]),
    ("objective.masks.target_shar=1", ["objective.masks.target_shar", "'target_share'"]),
    ("train.steps=many", ["train.steps", "'many'"]),
    ("train.zero=4", ["train.zero", "4"]),
    ("train.offload=nvme", ["train.offload", "'nvme'", "'optimizer' or 'all'"]),
    ("train.offload=all", ["train.zero 3", "now 1"]),
    ("train.offload=optimizer", ["summed in bf16", "train.dtype=fp32"]),
    ("objective.masks.target_share=0.999", ["token_budget 320", "0.999", "320 target"]),
    ("train.steps", ["a.b=value"]),
    ("run.dir=[", ["'run.dir=['", "not valid YAML"]),
    ("run.dir.x=1", ["dir is a value"]),
])
def test_a_bad_override_is_refused_by_name(recipe: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    for word in words:
        assert word in str(caught.value)


def test_keys_that_may_change_are_marked_where_they_stand() -> None:
    expected = {
        "data.feed", "data.prefetch_batches", "data.read_threads", "data.retry_s",
        "data.replace_damaged", "data.max_damaged_share", "model.activation_checkpointing",
        "train.health.spike_deviations", "train.health.max_skips", "train.health.max_rollbacks",
        "train.health.min_target_std", "train.health.min_effective_rank", "train.zero",
        "train.offload", "train.micro_batch", "train.compile", "train.checkpoint_every",
        "train.keep_last",
        "train.milestone_every", "train.log_every", "train.probe_every", "optim.cooldown_steps",
        "run.dir", "run.launcher", "run.ranks", "run.min_ranks", "run.accept_changes",
        "run.deterministic", "run.network", "run.trackers", "run.time_limit_min"}
    assert free_keys() == expected


def test_a_key_that_is_gone_still_opens_with_the_value_that_did_nothing(recipe: Path) -> None:
    assert RETIRED == {"model.registers": 0, "model.layer_scale": 0,
                       "objective.sparse.active": 16}
    recipe.write_text(MINIMAL + "model: {size: tiny, registers: 0, layer_scale: 0.0}\n")
    assert load_config(recipe).model.size == "tiny"
    recipe.write_text(MINIMAL + "model: {registers: 4}\n")
    with pytest.raises(ConfigError, match=r"model\.registers = 4: .*use the version"):
        load_config(recipe)
    tree = {"data": {"feed": "f"}, "train": {"steps": 3}, "run": {"dir": "r"},
            "objective": {"sparse": {"code": "gated", "active": 16}}}
    assert validate(tree, "here").objective.sparse.code == "gated"
    assert tree["objective"]["sparse"]["active"] == 16  # whose it is keeps it
    for key, value in (("active", 8), ("code", "topk")):
        tree["objective"]["sparse"][key] = value
        with pytest.raises(ConfigError, match=rf"here: objective\.sparse\.{key}"):
            validate(tree, "here")
        tree["objective"]["sparse"]["active"] = 16


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_config(broken)
    broken.write_bytes("run: {dir: größe}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_config(broken)
    with pytest.raises(ConfigError, match=r"run\.dir is required"):
        validate({"data": {"feed": "f"}, "train": {"steps": 1}, "run": {}}, "here")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_validates_and_its_model_builds(path: Path) -> None:
    import torch

    from neurojepa.feed.format import TRAINING_GRIDS
    from neurojepa.model.build import build_model

    config = load_config(path, ["data.feed=f", "run.dir=r"])
    grid = TRAINING_GRIDS[{"demo.yaml": "3mm", "paper.yaml": "paper"}.get(path.name, "1.5mm")]
    with torch.device("meta"):
        model = build_model(config, grid)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e5
