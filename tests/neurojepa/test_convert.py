"""Official checkpoints as weights: every tensor told, the same tokens, and what is refused.

The official code is not at hand here: ``tokens_of`` computes what it would, from its tensors by
their own names.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from neurojepa import model_card
from neurojepa.convert import convert
from neurojepa.downstream.__main__ import main as downstream
from neurojepa.downstream.table import read_embeddings
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import Grid
from neurojepa.model.official import Official
from neurojepa.objective.views import patch_centres_mm
from neurojepa.pretrain import main as pretrain
from neurojepa.weights import load
from neurojepa.weights import main as weights
from tests.helpers import feeds

DIM, DEPTH, HEADS, HIDDEN, EXPERTS, TOP = 96, 4, 3, 128, 4, 2  # size tiny
SHAPE, PATCH = (24, 36, 24), 6
COUNTS = (4, 6, 4)
MODEL: dict[str, Any] = {
    "img_size": list(SHAPE), "patch_size": [PATCH] * 3, "in_chans": 1, "use_rope": True,
    "use_silu": False, "use_moe": False,
    "moe_params": {"n_shared_experts": 1, "n_routed_experts": EXPERTS, "n_activated_experts": TOP,
                   "moe_inter_dim": HIDDEN, "score_func": "softmax", "route_scale": 2.5,
                   "moe_layer_indices": [1, 3]}}
Tensors = dict[str, Tensor]


def official(moe: bool, seed: int = 0) -> Tensors:
    """An encoder's random tensors by their official names."""
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj": (DIM, 1, PATCH, PATCH, PATCH),
                                          "norm": (DIM,)}
    for block in (f"blocks.{i}." for i in range(DEPTH)):
        shapes |= {f"{block}norm1": (DIM,), f"{block}norm2": (DIM,),
                   f"{block}attn.qkv": (3 * DIM, DIM), f"{block}attn.proj": (DIM, DIM),
                   f"{block}attn.proj_attn_gate": (HEADS, DIM)}
        mlps = {"": 4 * DIM}
        if moe and block in ("blocks.1.", "blocks.3."):
            mlps = {"shared_experts.": HIDDEN} | {f"experts.{e}.": HIDDEN for e in range(EXPERTS)}
        for name, hidden in mlps.items():
            shapes |= {f"{block}mlp.{name}fc1": (hidden, DIM),
                       f"{block}mlp.{name}fc2": (DIM, hidden)}
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = drawn(*shape) + ("norm" in name)
        found[f"{name}.bias"] = drawn(shape[0])
    for i in (1, 3) if moe else ():
        found[f"blocks.{i}.mlp.gate.gate.weight"] = drawn(EXPERTS, DIM)
        found[f"blocks.{i}.mlp.gate.bias"] = drawn(EXPERTS)
        found[f"blocks.{i}.mlp.counts"] = torch.arange(EXPERTS)
    return found


def tokens_of(tensors: Tensors, bright_NP: Tensor, coords_N3: Tensor) -> Tensor:
    """[N, D] of patches with these voxels, at these coordinates in patches."""
    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"].flatten(1), tensors[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (DIM,), tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def mlp(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}fc2", F.gelu(linear(f"{name}fc1", x)))

    def turned(x: Tensor) -> Tensor:
        """Thirds of the channels turn with the axes, channel j of 10 by 10000^(-(j mod 5) / 5)."""
        found = x.clone()
        for axis in range(3):
            for j in range(10):
                c = 10 * axis + j
                angle = coords_N3[:, axis] * 10000 ** -((j % 5) / 5)
                other = -x[:, c + 1] if j % 2 == 0 else x[:, c - 1]
                found[:, c] = x[:, c] * angle.cos() + other * angle.sin()
        return found

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = (each.split(DIM // HEADS, 1) for each in linear(f"{name}qkv", x).split(DIM, 1))
        gate = linear(f"{name}proj_attn_gate", x).sigmoid()
        read = [(turned(q[h]) @ turned(k[h]).T / (DIM // HEADS) ** 0.5).softmax(1) @ v[h]
                * gate[:, h:h + 1] for h in range(HEADS)]
        return linear(f"{name}proj", torch.cat(read, 1))

    def experts(name: str, x: Tensor) -> Tensor:
        score = (x @ tensors[f"{name}gate.gate.weight"].T).softmax(1)
        chosen = (score + tensors[f"{name}gate.bias"]).topk(TOP, 1).indices
        found = mlp(f"{name}shared_experts.", x)
        for n in range(len(x)):
            for e in chosen[n].tolist():
                found[n] += 2.5 * score[n, e] * mlp(f"{name}experts.{e}.", x[n:n + 1])[0]
        return found

    x = linear("patch_embed.proj", bright_NP)
    for block in (f"blocks.{i}." for i in range(DEPTH)):
        x = x + attention(f"{block}attn.", norm(f"{block}norm1", x))
        moe = f"{block}mlp.gate.bias" in tensors
        x = x + (experts if moe else mlp)(f"{block}mlp.", norm(f"{block}norm2", x))
    return norm("norm", x)


def write(folder: Path, encoder: Tensors, moe: bool = False, **more: Any) -> Path:
    """A checkpoint as the official trainer writes it, and its config."""
    wrapped = OrderedDict((f"module.backbone.{name}", tensor) for name, tensor in encoder.items())
    opt = torch.optim.AdamW([torch.zeros(2, requires_grad=True)]).state_dict()
    torch.save({"encoder": wrapped, "target_encoder": wrapped,
                "predictor": {"module.backbone.mask_tokens.0": torch.zeros(1, 1, 8)},
                "opt": opt, "scaler": None, "epoch": 7, "global_step": 1600, "loss": 0.5} | more,
               folder / "latest.pt")
    (folder / "config.json").write_text(json.dumps({"model": MODEL | {"use_moe": moe}}))
    return folder / "latest.pt"


def converted(folder: Path, *words: str) -> Path:
    assert weights(["convert", str(folder), "--out", str(folder.parent / "weights"), *words]) == 0
    return folder.parent / "weights"


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_the_same_voxels_give_the_same_tokens(moe: bool, tmp_path: Path) -> None:
    """Of all patches and of some of them in any order; at the mistaken positions alone."""
    tensors = official(moe)
    model = load(str(converted(write(tmp_path, tensors, moe)))).model
    assert isinstance(model, Official)
    assert {norm.eps for norm in model.target.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    bright_NP = torch.rand(96, PATCH**3)
    bright_NP[5:9] = 0
    number = torch.arange(96)
    true_N3 = torch.cartesian_prod(*(torch.arange(count) for count in COUNTS))
    taken_N3 = torch.stack([number // 24, number % 24 // 6, number % 24 % 6], 1)
    grid = Grid("24x36x24", SHAPE, 1.6)
    for kept in (number, torch.randperm(96, generator=torch.Generator().manual_seed(1))[:30]):
        found = model.target(((bright_NP - 0.5) / 0.25)[None, kept],
                             patch_centres_mm(grid, PATCH)[None, kept],
                             torch.ones(1, len(kept), dtype=torch.bool))[0]
        assert torch.allclose(found, tokens_of(tensors, bright_NP[kept], taken_N3[kept]), atol=2e-5)
        others = tokens_of(tensors, bright_NP[kept], true_N3[kept])
        assert (found - others).abs().mean() > 0.01


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_every_tensor_is_told(moe: bool, tmp_path: Path) -> None:
    tensors = official(moe)
    folder = converted(write(tmp_path, tensors, moe))
    report = json.loads((folder / "conversion.json").read_text())
    text, card = ((folder / name).read_text() for name in ("conversion.txt", "README.md"))
    names = [name for each in report["mapped"] for name in each["from"]]
    counts = [name for name in tensors if name.endswith("counts")]
    assert sorted([*names, *counts]) == sorted(tensors)
    model = load(str(folder)).model
    assert {each["to"] for each in (*report["mapped"], *report["without_source"])} == set(
        model.encoder.state_dict())
    left = {each["name"]: each["tensors"] for each in report["left_out"]}
    assert left == {"target_encoder": len(tensors), "predictor": 1, "opt": 0, "scaler": 0,
                    "epoch": 0, "global_step": 0, "loss": 0,
                    **{f"module.backbone.{name}": 1 for name in counts}}
    assert all(name in text for name in (*left, *model.encoder.state_dict()))
    share = Fraction(sum((n // 24, n % 24 // 6, n % 24 % 6) != (n // 24, n % 24 // 4, n % 4)
                         for n in range(96)), 96)
    for page in (text, card):
        assert f"{float(share):.1%} of this grid's patches" in page and "--preset paper" in page
    assert "latest.pt" in card and "trained for 1600 steps\n" in card and "license:" not in card
    assert "CC BY-NC-ND 4.0" in card
    told = "left out: target_encoder, predictor, opt, scaler, epoch, global_step, loss"
    assert told + (", 2 counters of experts." if moe else ".") in card


def test_parts_and_forms_of_a_checkpoint(tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """The moving average, released tensors with their card, and tensors of half precision."""
    one, other = official(False), official(False, seed=1)
    file = write(tmp_path, one, target_encoder={f"module.{name}": tensor.bfloat16()
                                                for name, tensor in other.items()})
    qkv = {part: convert(str(file), part=part).tensors["blocks.2.attention.qkv.weight"]
           for part in ("encoder", "target_encoder")}
    name = "blocks.2.attn.qkv.weight"
    assert torch.equal(qkv["encoder"], one[name])
    assert torch.equal(qkv["target_encoder"], other[name].bfloat16().float())
    save_file(one, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n# Theirs\n")
    folder = converted(tmp_path)
    assert "left out: nothing" in capsys.readouterr().out
    record = json.loads((folder / "config.json").read_text())
    assert record["licence"] == "cc-by-nc-nd-4.0" and record["step"] == 0
    assert 'license: "cc-by-nc-nd-4.0"' in (folder / "README.md").read_text()
    assert torch.equal(load(str(folder)).model.state_dict()[
        "target.blocks.2.attention.qkv.weight"], one[name])
    with pytest.raises(DataError, match="one encoder's tensors alone; leave --part out"):
        convert(str(tmp_path), part="target_encoder")


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(("alter", "said"), [
    (without("blocks.2.mlp.fc1.bias"), r"missing: blocks\.2\.mlp\.fc1\.bias; nothing was"),
    (without("norm.weight"), r"missing: norm\.weight"),
    (without("blocks.0.attn.proj_attn_gate.weight"), "rotary positions"),
    (lambda found: found | {"pos_embed": torch.zeros(1, 96, DIM)}, "of no known use: pos_embed"),
    (lambda found: found | {"blocks.1.mlp.fc3.bias": torch.zeros(2)}, r"use: blocks\.1\.mlp\.fc3"),
    (lambda found: found | {"patch_embed.proj.weight": torch.zeros(DIM, 2, 6, 6, 6)},
     r"patch_embed\.proj\.weight is \(96, 2, 6, 6, 6\), \(96, 1, 6, 6, 6\) is needed"),
    (lambda found: found | {"norm.bias": torch.zeros(DIM, dtype=torch.int64)},
     r"norm\.bias is of torch\.int64"),
    (lambda found: found | {"norm.bias": torch.full((DIM,), torch.nan)}, r"not finite: norm\.bias"),
    (lambda found: found | {"norm.bias": torch.full((DIM,), 1e300, dtype=torch.float64)},
     r"not finite: norm\.bias"),
    (lambda found: found | {"norm.bias": torch.full((DIM,), torch.nan).to(torch.float8_e4m3fn)},
     r"not finite: norm\.bias"),
    (lambda found: found | {"norm.bias": 3.0}, r"norm\.bias is a float, no tensor"),
    (lambda found: found | {"module.norm.bias": torch.zeros(DIM)}, r"two tensors are named norm"),
    (lambda found: found | official(True), r"has experts, .*config\.json says model\.use_moe = Fa"),
    (lambda found: found | {"blocks.4.norm1.bias": torch.zeros(DIM)},
     "width 96, 5 blocks, 3 heads: no such size"),
], ids=lambda each: each if isinstance(each, str) else "")
def test_tensors_that_do_not_fit_are_refused(alter: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        convert(str(write(tmp_path, alter(official(False)))))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("alter", "moe", "said"), [
    ({"use_rope": False}, False, r"model\.use_rope = False"),
    ({"patch_size": [6, 6, 3]}, False, r"model\.patch_size = \(6, 6, 3\)"),
    ({"img_size": [24, 36]}, False, r"model\.img_size = \[24, 36\], three numbers"),
    ({"img_size": [24, 36, 25]}, False, r"\[24, 36, 25\] is no multiple"),
    ({"use_silu": True}, False, r"model\.use_silu = True"),
    ({"in_chans": 3}, False, r"model\.in_chans = 3"),
    ({"use_moe": True}, False, r"has no experts, .*model\.use_moe = True"),
    ({"moe_params": None}, True, r"without model\.moe_params"),
    *(({"moe_params": MODEL["moe_params"] | {name: value}}, True,
       rf"model\.moe_params\.{name} = ") for name, value in (
        ("score_func", "sigmoid"), ("route_scale", None), ("route_scale", 0),
        ("route_scale", float("inf")), ("route_scale", float("nan")),
        ("n_activated_experts", 3), ("moe_layer_indices", [0, 2]))),
])
def test_configs_of_other_networks_are_refused(alter: dict[str, Any], moe: bool, said: str,
                                               tmp_path: Path) -> None:
    file = write(tmp_path, official(moe), moe)
    (tmp_path / "theirs.yaml").write_text(
        yaml.safe_dump({"model": MODEL | {"use_moe": moe} | alter}))
    with pytest.raises((ConfigError, DataError), match=said):
        convert(str(file), config=str(tmp_path / "theirs.yaml"))


class Loss:
    """What a checkpoint holds where pickle is needed."""


def test_files_that_are_no_plain_checkpoint_are_refused(tmp_path: Path) -> None:
    tensors = official(False)
    with pytest.raises(DataError, match=r"pickled objects besides tensors \(\S+\.Loss\).*run code"):
        convert(str(write(tmp_path, tensors, loss=Loss())))
    with pytest.raises(DataError, match="holds 'ema', which no official checkpoint has"):
        convert(str(write(tmp_path, tensors, ema={})))
    with pytest.raises(DataError, match="target_encoder is no table of tensors by name; it has 0"):
        convert(str(write(tmp_path, tensors, target_encoder={0: torch.zeros(1)})),
                part="target_encoder")
    file = write(tmp_path, tensors)
    whole = file.read_bytes()
    for name, data in (("half.pt", whole[:len(whole) // 2]), ("empty.pt", b""),
                       ("text.pt", b"no checkpoint"), ("dot.pt", b"."),
                       ("half.safetensors", b"\x10" + whole[:50])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: is no checkpoint, or damaged"):
            convert(str(tmp_path / name))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds a list"):
        convert(str(tmp_path / "list.pt"))
    with pytest.raises(DataError, match="no such file; name a checkpoint on this machine"):
        convert(str(tmp_path / "none.pt"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json: no such file; .*--config"):
        convert(str(file))
    for text, said in (("- 1", "no section model"), ("{", "neither YAML nor JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            convert(str(file))


def test_nothing_is_written_over_what_is_converted(tmp_path: Path) -> None:
    """Neither the checkpoint's folder nor that of its config."""
    file = write(tmp_path, official(False))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/latest.pt").write_bytes(file.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words in ([file], [tmp_path],
                  [tmp_path / "deep/latest.pt", "--config", tmp_path / "config.json"]):
        with pytest.raises(ConfigError, match=r"--out .*written over; name another"):
            weights(["convert", *map(str, words), "--out", str(tmp_path / "deep/..")])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_results_come_into_the_card(tmp_path: Path) -> None:
    folder = converted(write(tmp_path, official(False)))
    record = json.loads((folder / "config.json").read_text())
    found = {"step": record["step"], "feed": "f00d", "modality": "T1w", "cohort": None,
             "identity": {"model": record["sha256"]}, "results": {"neurojepa": {"age": {"r2": {
                 "value": 0.25, "low": 0.125, "high": 0.5, "num_people": 12}}}}}
    (tmp_path / "results.json").write_text(json.dumps(found))
    weights(["card", str(folder), "--results", str(tmp_path / "results.json")])
    card = (folder / "README.md").read_text()
    assert "| age | r2 | neurojepa | 0.250 | 0.125 to 0.500 | 12 |" in card
    assert "split test of feed f00d (T1w)" in card and "`conversion.txt` has each" in card
    assert "conversion.txt" not in model_card.card({**record, "purpose": "Tells age."})


@pytest.mark.slow(3)
def test_converted_weights_embed_and_are_not_trained(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "GRID", Grid("24x36x24", SHAPE, 1.6))
    feed = feeds.write_feed(str(tmp_path / "feed"), num_samples=6, modalities=("T1w",))
    folder = converted(write(tmp_path, official(True), moe=True), "--feed", feed)
    assert downstream(["embed", feed, "--weights", str(folder), "--out", str(tmp_path / "e"),
                       "--device", "cpu"]) == 0
    table = read_embeddings(str(tmp_path / "e"))
    values = torch.tensor(table["embedding"].to_pylist())
    assert values.shape == (6, DIM) and values.std(0).min() > 0
    opened = load(str(folder))
    assert opened.seen is None and opened.places is not None
    with pytest.raises(ConfigError, match=r"model\.official: .*not trained"):
        pretrain(["--config", "demo", f"data.feed={feed}", f"run.dir={tmp_path / 'run'}",
                  "model.official=true"])
    feeds.GRID = Grid("24x36x24", SHAPE, 2.0)
    other = feeds.write_feed(str(tmp_path / "other"), num_samples=4)
    with pytest.raises(ConfigError, match="packed at grid 24x36x24"):
        converted(write(tmp_path, official(False)), "--feed", other)
