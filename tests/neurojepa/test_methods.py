"""The table of methods: a fourth one is a file (this one) and a line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from neurojepa.config import RootConfig, validate
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Grid
from neurojepa.methods import METHODS, Method
from neurojepa.model.averaged import Averaged
from neurojepa.objective.losses import sample_sums
from neurojepa.objective.views import Views
from neurojepa.storage import read_rows
from neurojepa.weights import export, load
from tests.helpers.feeds import GRID, tiny_config, write_feed

TOY = Method("tests.neurojepa.test_methods:Toy", about="a toy of width {objective.sparse.atoms}")


class Toy(Averaged):
    """Tells the mean intensity of a scan's patches from a linear map of them."""

    def __init__(self, config: RootConfig, grid: Grid) -> None:
        super().__init__(config, grid)
        self.head = nn.Linear(8, 1)

    @staticmethod
    def make_encoder(config: RootConfig, grid: Grid) -> nn.Module:
        return Tokens(config.model.patch_voxels**3)

    def forward(self, views: Views, l1: float | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        told_BN1 = self.head(self.encoder(views.tokens_BNP, views.coords_BN3, views.valid_BN))
        error_B = (told_BN1[..., 0] - views.tokens_BNP.mean(-1)).square().mean(-1)
        loss_B = views.weight_B * error_B
        return loss_B.sum(), sample_sums(views, loss_B.detach(), {"prediction": error_B})

    @staticmethod
    def flops(config: RootConfig, grid: Grid) -> tuple[float, float]:
        return 1.0, 1.0


class Tokens(nn.Module):
    def __init__(self, voxels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(voxels, 8)

    def forward(self, tokens_BNP: Tensor, coords_BN3: Tensor, valid_BN: Tensor) -> Tensor:
        return self.linear(tokens_BNP.to(self.linear.weight.dtype))


def toy_config(feed: str, run: Path) -> RootConfig:
    tree = tiny_config(feed, run, steps=2, checkpoint_every=2).model_dump(mode="json")
    tree["objective"] |= {"method": "toy"}
    return validate(tree, "tests")


TRAIN = """
import sys
from pathlib import Path
from neurojepa.methods import METHODS
from tests.neurojepa import test_methods
METHODS["toy"] = test_methods.TOY
from neurojepa.train.loop import train
sys.exit(train(test_methods.toy_config(sys.argv[1], Path(sys.argv[2]))))
"""


def test_a_fourth_method_is_a_file_and_a_line(run_cli: Any, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, is exported, loaded and embeds."""
    feed, run = write_feed(str(tmp_path / "feed")), tmp_path / "run"
    done = run_cli("-c", TRAIN, feed, str(run))
    assert done.returncode == 0, done.stderr
    rows = read_rows(str(run / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["loss"] < rows[0]["loss"]
    with pytest.raises(ConfigError, match=r"objective.method = 'toy': no such method; one of jepa"):
        toy_config(feed, run)
    monkeypatch.setitem(METHODS, "toy", TOY)
    export(str(run), str(tmp_path / "weights"))
    assert isinstance(load(str(tmp_path / "weights")).model, Toy)
    assert "a toy of width 0" in (tmp_path / "weights" / "README.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_each_line_names_a_class_and_describes_it(name: str) -> None:
    method = METHODS[name]
    assert issubclass(method.load(), Averaged)
    config = tiny_config("feed", "run")
    assert "{" not in method.describe(config.objective)
    assert method.load().flops(config, GRID)[0] > 0


def test_the_table_and_the_config_are_read_without_torch() -> None:
    script = ("import sys, neurojepa.methods, neurojepa.config\n"
              "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))")
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
