"""`~` in a path that a person wrote: their home; the home of nobody is no traceback but a file that is not there."""

import re
from pathlib import Path

import pytest
from malformed import EXPERIMENT

from chrysalis_ray.config.loading import load_experiment
from chrysalis_ray.core.errors import ConfigError
from chrysalis_ray.core.written_paths import written_path

NOBODY = "~no-such-user-here/x"


def test_a_home_is_put_in_and_the_home_of_nobody_is_left(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert written_path("~/notes") == Path("/home/somebody/notes")
    assert written_path("notes/~") == Path("notes/~")
    assert written_path(NOBODY) == Path(NOBODY)


@pytest.mark.parametrize(
    "source",
    [
        f"{{type: folder, path: {NOBODY}, domain: a}}",
        f"{{type: archive, path: {NOBODY}.zip, domain: a}}",
        f"{{type: records, path: {NOBODY}.jsonl, domain: a}}",
        f"{{type: git, url: {NOBODY}, commit: v1, domain: a}}",
        f"{{type: registry, path: {NOBODY}.yaml}}",
        None,
    ],
)
def test_the_home_of_nobody_is_one_problem_with_its_line(good, source):
    forget = f"  forget: {NOBODY}\n" if source is None else ""
    more = "" if source is None else f"    - {source}\n"
    good.write_text(EXPERIMENT.replace("  split:", f"{more}{forget}  split:", 1))
    with pytest.raises(ConfigError) as caught:
        load_experiment(good)
    assert any(re.search(rf"^{good}:\d+: genome\..*no-such-user-here", problem) for problem in caught.value.problems)
