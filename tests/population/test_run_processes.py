"""The processes of a run: none without a use, trial processes that stay light, and none left when the driver is killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from garden import cuts, end
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray

RAYS_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}  # they look after their node themselves, now and then


def titles(processes):
    """What Ray's processes call themselves, without the method they are in."""
    found = set()
    for process in processes:
        try:
            title = (process.cmdline() or [""])[0]
        except psutil.NoSuchProcess:
            continue
        if title.startswith("ray::"):
            found.add(title.partition("(")[0].partition(".")[0].strip())
    return found


def test_a_run_starts_no_process_without_a_use_and_a_killed_driver_leaves_none(garden):
    process = garden.start("lean", "population.reports=6", "population.tokens_per_variant=7680")
    try:
        garden.wait_for("lean", lambda run: len(cuts(run)) >= 1, process)
        below = psutil.Process(process.pid).children(recursive=True)
        own = [child for child in below if titles([child]) - RAYS_AGENTS]
        assert titles(own) - {"ray::IDLE"} == {
            "ray::Omega",
            "ray::BodyWorker",
            "ray::VariantTrial",
        }
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _, alive = psutil.wait_procs(own, timeout=60)
        assert not alive
    finally:
        end(process)


def test_a_trial_process_loads_neither_torch_nor_tune_nor_data_frames(tmp_path):
    script = """
import sys
from pathlib import Path
import ray
from chrysalis_ray.body.cluster import joined
from chrysalis_ray.body.manifest import awaken_omega, namespace
from chrysalis_ray.core.records import Epigenome, Hyperparameters, Variant, write_json
from chrysalis_ray.population.trial import VariantTrial

folder = Path(sys.argv[1])
variant = Variant("v000", 0, 1, "seed", "genome", "base", Hyperparameters(), Epigenome({"code": 1.0}), 4, 2, 2, 32)
write_json(folder / "variants" / "v000" / "variant.json", variant.to_json())
with joined(None):
    omega = awaken_omega("omega", folder / "store", folder / "weave.jsonl", [variant], 1)
    places = {"omega": "omega", "namespace": namespace(), "variants": str(folder / "variants")}
    settings = {**places, "variant": "v000", "memory": 1}
    trial = ray.remote(VariantTrial).options(num_cpus=0).remote(config=settings)
    loaded = ray.get(trial.__ray_call__.remote(lambda self: sorted(sys.modules)))
heavy = ("torch", "transformers", "pandas", "ray.data", "ray.train.torch", "safetensors", "tokenizers")
heavy += ("chrysalis_ray.config.questions", "ray.tune", "ray.train")
print("chrysalis_ray.population.trial" in loaded, [name for name in heavy if name in loaded])
"""
    (tmp_path / "store").mkdir()
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "True []"


@pytest.mark.parametrize(
    "use",
    [
        "from pandas import DataFrame; import pandas as early",
        "import pandas as early; import pandas.core.frame; from pandas import DataFrame",
        "import ray.data; import pandas as early; from ray.data.context import DataContext; from pandas import DataFrame",
    ],
)
def test_whoever_uses_a_postponed_module_gets_the_real_one(use):
    script = f"""
import sys
import ray
from chrysalis_ray.core.postponed import postponed
with postponed():
    {use}
    assert not isinstance(3, DataFrame)
import pandas, pandas.core.frame, ray.data
assert pandas.core.frame.DataFrame is pandas.DataFrame and sys.modules["pandas"] is pandas
assert early.read_csv is pandas.read_csv and early.DataFrame is pandas.DataFrame
assert type(DataFrame()) is pandas.DataFrame and isinstance(pandas.DataFrame(), DataFrame)
assert ray.data is sys.modules["ray.data"] and ray.data.from_items
assert pandas.core.__spec__.origin == pandas.core.__file__ and ray.data.context.__spec__.origin == ray.data.context.__file__
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_killed_driver_frees_its_share_of_a_cluster(garden):
    look = """
import sys, ray
from ray.util import placement_group_table
ray.init(address=sys.argv[1], logging_level=40, log_to_driver=False)
groups = [group["state"] for group in placement_group_table().values()]
print(int(ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"] and set(groups) <= {"REMOVED"}))
"""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = garden.start("abandoned", "population.tokens_per_variant=7680", address=cluster.address)
        try:
            garden.wait_for("abandoned", lambda run: len(cuts(run)) >= 1, process)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        finally:
            end(process)
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        command, deadline, free = [sys.executable, "-c", look, cluster.address], time.monotonic() + 90, False
        while not free and time.monotonic() < deadline:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            free = done.stdout.splitlines()[-1:] == ["1"]
        assert free, done.stdout + done.stderr[-3000:]
    finally:
        cluster.shutdown()
