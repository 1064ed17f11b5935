"""What SkyPilot makes of the task files of end_to_end/cloud: run by tests/test_cloud.py with
SKYPILOT_PYTHON.

    HOME=EMPTY_FOLDER python tests/with_skypilot.py FILE ...

prints one JSON object: for each file what its own parser, its optimizer and its rule for restarts
make of it. No cloud, no account and no network: the catalog is a few rows with invented prices,
where SkyPilot keeps a downloaded one.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

CATALOG = {
    # A TPU VM has no row of its own as a machine; SkyPilot wants an N1 of that region beside it.
    "gcp/vms.csv": """\
InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice
n2-standard-4,4.0,16.0,,,,us-central1,us-central1-a,0.2,0.1
a3-highgpu-1g,26.0,234.0,,,,us-central1,us-central1-a,1.0,0.5
n1-highmem-8,8.0,52.0,,,,us-central1,us-central1-a,0.5,0.1
n1-highmem-8,8.0,52.0,,,,us-east1,us-east1-d,0.5,0.1
n1-highmem-8,8.0,52.0,,,,us-east5,us-east5-a,0.5,0.1
n1-highmem-8,8.0,52.0,,,,europe-west4,europe-west4-a,0.5,0.1
,,,H100,1.0,,us-central1,us-central1-a,10.0,3.0
,,,tpu-v6e-8,1,tpu-v6e-8,us-central1,us-central1-b,22.0,5.0
,,,tpu-v6e-8,1,tpu-v6e-8,us-east1,us-east1-d,22.0,4.0
,,,tpu-v6e-8,1,tpu-v6e-8,us-east5,us-east5-a,22.0,9.0
,,,tpu-v6e-8,1,tpu-v6e-8,europe-west4,europe-west4-a,22.0,1.0
,,,tpu-v6e-16,1,tpu-v6e-16,us-central1,us-central1-b,44.0,10.0
,,,tpu-v6e-16,1,tpu-v6e-16,us-east1,us-east1-d,44.0,8.0
,,,tpu-v6e-16,1,tpu-v6e-16,us-east5,us-east5-a,44.0,18.0
""",
    "gcp/images.csv": "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId\n",
    "common/accelerators.csv": "AcceleratorName,Clouds\nH100,GCP\n",
}


def write_catalog() -> None:
    from sky.skylet import constants

    folder = Path.home() / ".sky/catalogs" / constants.CATALOG_SCHEMA_VERSION
    for name, text in CATALOG.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def enable_gcp() -> None:
    """Says that there is an account, which `sky check` would find out by asking Google."""
    from sky import check, global_user_state
    from sky.clouds.cloud import CloudCapability

    workspace = "default"
    global_user_state.set_allowed_clouds(check._get_workspace_allowed_clouds(workspace), workspace)
    global_user_state.set_enabled_clouds(["gcp"], CloudCapability.COMPUTE, workspace)


def answer(path: str) -> dict:
    import sky
    import yaml
    from sky import backends
    from sky.jobs import recovery_strategy
    from sky.optimizer import Optimizer
    from sky.utils import dag_utils

    config = yaml.safe_load(Path(path).read_text())
    task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "gs://bucket/maxnano")])
    resources = list(task.resources)
    with sky.Dag() as dag:
        dag.add(task)
    dag_utils.fill_default_config_in_dag_for_job_launch(dag)  # as `sky jobs launch` does
    Optimizer.optimize(dag, quiet=True)
    best = task.best_resources
    rule = recovery_strategy.StrategyExecutor.make(
        "name", backends.CloudVmRayBackend(), task, 1, 0, None, set(), None, None
    )
    return {
        "name": task.name,
        "envs": task.envs,
        "regions": sorted(each.region or "" for each in resources),
        "machine": best.instance_type,
        "accelerators": best.accelerators,
        "spot": best.use_spot,
        "region": best.region,
        "price": best.get_cost(3600),
        # Stopped and saved: always again. A crash: once. In this order, for the rule counts.
        "restarts": [
            rule.should_restart_on_failure(exit_codes=[code]) for code in (75, 75, 75, 1, 75, 2)
        ],
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):  # SkyPilot prints what it does
        write_catalog()
        enable_gcp()
        answers = {Path(path).stem: answer(path) for path in sys.argv[1:]}
    print(json.dumps(answers))
