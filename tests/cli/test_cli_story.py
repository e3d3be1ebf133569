"""What a run says while it grows, in a pipe and on a terminal."""

from __future__ import annotations

import io

from chrysalis_ray.cli.story import TerminalStory
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def variants(count: int) -> list[Variant]:
    return [
        Variant(
            variant_id=f"v{index:03d}", index=index, rng_seed=index, seed_sha256="0" * 64, genome_id="1" * 64,
            base_sha256="2" * 64, hyperparameters=Hyperparameters(), epigenome=Epigenome({"code": 1.0}), steps=8, chunk_steps=4,
            rows_per_step=2, sequence_length=16,
        )
        for index in range(count)
    ]  # fmt: skip


def tell(story: TerminalStory) -> None:
    with story:
        story.stage("genome", "3 documents from https://me:hunter2secret@host")
        story.population(variants(2))
        story.row({"variant": "v000", "state": "training", "step": 4, "tokens": 128, "train_loss": 3.25, "select_loss": 3.5})
        story.conclusion("v001", "stopped", "the scheduler stopped it after report 1")
        story.stage("judge", "2 variants")


def test_in_a_pipe_each_event_is_a_line() -> None:
    stream = io.StringIO()
    tell(TerminalStory(stream))
    lines = stream.getvalue().splitlines()
    assert "hunter2secret" not in stream.getvalue()
    assert ["genome" in lines[0], "2 variants" in lines[1], "judge" in lines[-1]] == [True, True, True]
    assert any("v000" in line and "step 4/8" in line and "3.2500" in line for line in lines)
    assert any("v001" in line and "stopped" in line for line in lines)


def test_the_reason_of_a_loss_is_told() -> None:
    for stream in (io.StringIO(), Terminal()):
        with TerminalStory(stream) as story:
            story.population(variants(2))
            story.conclusion("v001", "failed", "VariantLost: the store holds no seed [/v001]")
        assert "v001 failed: VariantLost: the store holds no seed [/v001]" in stream.getvalue()


def test_on_a_terminal_the_table_stands_before_the_next_stage() -> None:
    stream = Terminal()
    tell(TerminalStory(stream))
    text = stream.getvalue()
    assert text.rindex("v001") < text.rindex("judge")
    assert "1 of 2 variants at work" in text
