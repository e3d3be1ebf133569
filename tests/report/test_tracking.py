"""W&B offline, read back from the files it wrote: no server, no network."""

import json
import math
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_run import metrics_row, write_branch, write_judgement, write_training

from chrysalis_ray.core.errors import RunError
from chrysalis_ray.core.layout import RunLayout
from chrysalis_ray.core.records import read_json
from chrysalis_ray.report.metrics import append_metrics, read_metrics
from chrysalis_ray.report.tracking import Tracker, check_tracking, run_identity, track_run

CANARY = "canary0123456789canary0123456789canary01"
BLOCK = 32768


def _records(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: a LevelDB log (blocks of 32 KiB; crc, length, type; full, first, middle, last)."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    assert struct.unpack("<HB", content[4:7])[0] == 0xBEE1
    at, parts = 7, b""
    while at + 7 <= len(content):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        if kind == 0 and length == 0:
            break
        data = content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind == 1:
            yield data
        else:
            parts = data if kind == 2 else parts + data
            if kind == 4:
                yield parts


def _read_runs(layout: RunLayout) -> dict[str, dict]:
    """Everything W&B was told, by run id, over all its offline files."""
    from wandb.proto import wandb_internal_pb2 as pb

    runs: dict[str, dict] = defaultdict(lambda: {"rows": [], "metrics": {}, "summary": {}, "files": 0, "exit": []})
    for path in sorted(layout.wandb.glob("wandb/offline-run-*/*.wandb")):
        told = runs[path.stem.removeprefix("run-")]
        told["files"] += 1
        for data in _records(path):
            record = pb.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
                told["run"] = {"id": run.run_id, "project": run.project, "group": run.run_group, "type": run.job_type,
                               "name": run.display_name, "tags": set(run.tags), "host": run.host, "config": config}  # fmt: skip
            elif kind == "metric":
                name = record.metric.name or record.metric.glob_name
                told["metrics"][name] = (record.metric.step_metric, record.metric.summary.min)
            elif kind == "history":
                told["rows"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
            elif kind == "summary":
                told["summary"] |= {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.summary.update}
            elif kind == "exit":
                told["exit"].append(record.exit.exit_code)
    return dict(runs)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)


def test_one_run_per_variant_merge_and_verdict(judged: RunLayout) -> None:
    touched = track_run(judged.root, "offline", "chrysalis", None, ("nightly",))
    runs = _read_runs(judged)
    assert sorted(runs) == touched
    assert [told["run"]["type"] for told in runs.values()].count("variant") == 8
    assert [told["run"]["type"] for told in runs.values()].count("merge") == 4
    assert {told["run"]["group"] for told in runs.values()} == {"quickstart-7f3ad001"}
    assert {told["run"]["project"] for told in runs.values()} == {"chrysalis"}
    assert all("nightly" in told["run"]["tags"] and "brood:7f3ad001" in told["run"]["tags"] for told in runs.values())
    assert all(told["exit"] == [0] for told in runs.values())
    variant = runs["7f3ad001-v000-api_docs"]
    assert variant["run"]["name"] == "v000-api_docs"
    assert variant["run"]["config"]["mix"]["api_docs"] == pytest.approx(4 / 9)
    assert variant["run"]["config"]["lora"]["rank"] == 4
    assert variant["run"]["config"]["adapter"] == {"type": "lora"}
    assert variant["run"]["config"]["optim"]["learning_rate"] == pytest.approx(1e-3 * 1.4**-3)
    assert variant["metrics"]["eval/*"] == ("train/tokens", True)
    assert variant["metrics"]["train/*"][0] == "train/tokens"
    assert variant["summary"]["eval/domain/code"] == pytest.approx(3.1)
    assert variant["summary"]["eval/domain/code/accuracy"] == pytest.approx(1 / 3.1)
    assert variant["summary"]["eval/domain/code/perplexity"] == pytest.approx(math.exp(3.1))
    assert variant["summary"]["eval/domain/code/bits_per_byte"] == pytest.approx(3.1 / 4 / math.log(2))
    assert 0.2 < variant["summary"]["eval/accuracy"] < 0.4
    assert "eval/bits_per_byte" not in variant["summary"]  # of one domain the bytes are not known
    assert "eval/domain/unicode/bits_per_byte" not in variant["summary"]
    merge = runs["7f3ad001-merge-ensemble"]
    assert merge["run"]["config"]["method"] == "ensemble"
    assert len(merge["run"]["config"]["parents"]) == 4
    assert all(len(sha) == 64 for sha in merge["run"]["config"]["parents"].values())
    assert merge["rows"][0]["merge/residual"] == 0.21
    assert {"merge:ensemble", "chosen"} <= merge["run"]["tags"]
    assert runs["7f3ad001-verdict"]["rows"][0]["verdict/merging_helped"] == "yes"


def test_every_report_arrives_with_its_tokens(judged: RunLayout) -> None:
    track_run(judged.root, "offline")
    runs = _read_runs(judged)
    for variant in read_json(judged.branch_manifest)["variants"]:
        expected = [row for row in read_metrics(judged.metrics) if row["variant"] == variant]
        rows = [row for row in runs[f"7f3ad001-{variant}"]["rows"] if "train/tokens" in row]
        assert [row["train/tokens"] for row in rows] == [row["tokens"] for row in expected]
        assert [row["eval/loss"] for row in rows] == pytest.approx([row["select_loss"] for row in expected])
        assert [row["_step"] for row in rows] == [row["report"] for row in expected]


def test_a_second_call_sends_nothing_twice(layout: RunLayout) -> None:
    variants = write_branch(layout)
    write_training(layout, variants)
    track_run(layout.root, "offline")
    assert track_run(layout.root, "offline") == []
    write_judgement(layout, variants)
    assert len(track_run(layout.root, "offline")) == 8 + 4 + 1
    assert track_run(layout.root, "offline") == []
    reported = [row["_step"] for row in _read_runs(layout)["7f3ad001-v000-api_docs"]["rows"] if "train/tokens" in row]
    assert reported == list(range(1, 9))


def test_live_reports_and_those_replayed_after_a_resume(layout: RunLayout) -> None:
    variant = write_branch(layout)[0]
    with Tracker(layout.root, "offline") as tracker:
        for report in (1, 2, 3):
            tracker.report(metrics_row(variant, report))
    with Tracker(layout.root, "offline") as tracker:
        for report in (2, 3, 4):
            tracker.report(metrics_row(variant, report))
        tracker.finish(variant.variant_id, "stopped")
    told = _read_runs(layout)["7f3ad001-v000-api_docs"]
    assert [row["_step"] for row in told["rows"] if "train/tokens" in row] == [1, 2, 3, 4]
    assert told["files"] == 2
    assert told["summary"]["state"] == "stopped"


def test_nothing_outside_the_run_directory_and_no_secret_in_it(
    judged: RunLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    run = read_json(judged.run_manifest)
    judged.run_manifest.write_text(json.dumps(run | {"name": f"quickstart {CANARY}"}))
    track_run(judged.root, "offline", tags=(f"key {CANARY}"[:64],))
    assert list(home.iterdir()) == []
    for path in judged.wandb.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()
    runs = _read_runs(judged)
    assert {told["run"]["host"] for told in runs.values()} == {"undisclosed"}
    assert socket.gethostname() not in {told["run"]["host"] for told in runs.values()}


def test_ids_are_deterministic_and_never_collide() -> None:
    assert run_identity("7f3ad001", "v000-code") == "7f3ad001-v000-code"
    hostile = {
        run_identity("7f3ad001", name) for name in ("a/b", "a:b", "a?b", "a'b", "a#b", "a,b", "a;b", "a" * 200, "a" * 201)
    }
    assert len(hostile) == 9
    assert not any(set(identity) & set(":;,#?/'") or len(identity) > 128 for identity in hostile)


def test_disabled_writes_nothing(judged: RunLayout) -> None:
    assert track_run(judged.root, "disabled") == []
    with Tracker(judged.root, "disabled") as tracker:
        tracker.report(read_metrics(judged.metrics)[0])
        tracker.finish("v000-api_docs", "finished")
    assert not judged.wandb.exists()


def test_online_without_a_key_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RunError, match="wandb login"):
        check_tracking("online")
    with pytest.raises(RunError, match="offline, online, disabled"):
        check_tracking("sometimes")
    check_tracking("offline")
    check_tracking("disabled")


def test_a_report_of_an_unknown_variant_is_named(branched: RunLayout) -> None:
    append_metrics(branched.metrics, {"variant": "ghost", "report": 1, "tokens": 1})
    with pytest.raises(RunError, match="ghost"):
        track_run(branched.root, "offline")
