"""Variants stand on one genome, base and seed: when one of them changed under a run, it says so instead of going on."""

import pytest

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant
from chrysalis_ray.population.branch import check_origins

VARIANT = Variant("v000-code", 0, 0, "seed", "genome", "base", Hyperparameters(), Epigenome({"code": 1.0}), 4, 2, 2, 16)


def test_the_same_origins_pass():
    check_origins([VARIANT], "seed", "genome", "base")


@pytest.mark.parametrize("what", ["seed", "genome", "base"])
def test_another_origin_is_named(what):
    now = {key: "other" if key == what else key for key in ("seed", "genome", "base")}
    with pytest.raises(RunError, match=f"branched on {what} {what}, but the {what} is other now"):
        check_origins([VARIANT], now["seed"], now["genome"], now["base"])
