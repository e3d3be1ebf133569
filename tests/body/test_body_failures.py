"""What ends the lives of a body is told, and kept where the error says."""

from types import SimpleNamespace
from typing import Any

import pytest

from chrysalis_ray.body.cluster import joined
from chrysalis_ray.body.manifest import ERRORS, Bodies
from chrysalis_ray.body.morphology import Morphology
from chrysalis_ray.core.errors import BodyError


class Told:
    """Stands for the handle of omega: hears how the group ended, and says why the body is lost."""

    def __init__(self) -> None:
        self.reason = "6 lives in a row ended before they finished a turn"
        self.ended = self.lost_because = self

    def remote(self, *said: Any) -> Any:
        import ray

        return ray.put(self.reason)


@pytest.mark.ray
@pytest.mark.slow
def test_what_ended_the_lives_of_a_body_is_told_and_kept(tmp_path):
    """Workers look for an omega that is not there: Ray's error is the cause."""
    plan = SimpleNamespace(morphology=Morphology(workers=1), number=0, omega_name="nobody", namespace="nowhere")
    plan.of_body = lambda number: plan
    with joined(None):
        bodies = Bodies(plan, Told(), tmp_path, autoscaling=False)
        bodies.all[0].max_failures = 1
        bodies.manifest()
        bodies.all[0].join(120)
        with pytest.raises(BodyError, match=r"6 lives in a row.*; the last before: .*look up.*nobody") as told:
            bodies.check()
    assert len(bodies.all[0].failures) == 2
    kept = (tmp_path / "body-00-life-000" / ERRORS).read_text()
    assert kept.count("Rank 0") == 2
    assert kept.count("BodyContext.enter") == 2
    assert f"{ERRORS} in {tmp_path}" in str(told.value)
