"""launch/'s other files: what each names exists, they agree with each other, and with the recipe they run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlpost.config import Recipe
from rlpost.doctor import TESTED
from rlpost.recipe import load_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
README = (LAUNCH / "README.md").read_text()


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each of the Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def arguments_of(name: str) -> list[str]:
    return [rest for other, rest in instructions() if other == name]


@pytest.fixture(scope="module")
def job() -> Any:
    documents = list(yaml.safe_load_all((LAUNCH / "kuberay.yaml").read_text()))
    return next(document for document in documents if document["kind"] == "RayJob")


@pytest.fixture(scope="module")
def claims() -> set[str]:
    documents = list(yaml.safe_load_all((LAUNCH / "kuberay.yaml").read_text()))
    shared = [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
    return {claim["metadata"]["name"] for claim in shared if claim["spec"]["accessModes"] == ["ReadWriteMany"]}


def groups(job: Any) -> list[Any]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods(job: Any) -> list[Any]:
    return [group["template"]["spec"] for group in groups(job)]


def limits(pod: Any) -> Any:
    return pod["containers"][0]["resources"]["limits"]


def gpus_of(recipe: Recipe) -> float:
    return recipe.sampler.workers * recipe.sampler.gpus + recipe.learner.ranks * recipe.learner.gpus_per_rank


def entrypoint(job: Any) -> tuple[Path, list[str]]:
    """The recipe in this tree that the entrypoint names by its path in the image, and the overrides."""
    program, verb, recipe, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (program, verb) == ("rlpost", "train")
    return ROOT / Path(recipe).relative_to(arguments_of("WORKDIR")[0]), overrides


# -- the RayJob --------------------------------------------------------------------------------------------------------


def test_the_rayjob_runs_the_documented_command_on_a_recipe_that_the_image_holds(job: Any) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["metadata"]["name"] == "rlpost"
    path, overrides = entrypoint(job)
    recipe = load_recipe(path, overrides)
    assert recipe.ray_address == "auto" and recipe.run_dir is not None
    generic = re.sub(r"\S+\.toml", "RECIPE", job["spec"]["entrypoint"])
    assert f"`{generic.replace(str(recipe.run_dir), '/runs/NAME')}`" in README


def test_the_rayjob_has_the_keys_that_kuberay_asks_for(job: Any) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == TESTED["ray"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    for group in cluster["workerGroupSpecs"]:
        assert group["groupName"]
        assert group["minReplicas"] == group["replicas"] == group["maxReplicas"], "a run places its workers once"
    known = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert all(group.keys() <= known for group in groups(job))
    assert job["spec"].keys() <= {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    assert job["spec"]["shutdownAfterJobFinishes"] is True


def test_the_cluster_has_the_gpus_that_its_recipe_needs_and_none_idle(job: Any) -> None:
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    supply = sum(group["replicas"] * limits(group["template"]["spec"])["nvidia.com/gpu"] for group in workers)
    assert supply == gpus_of(load_recipe(*entrypoint(job)))
    assert "nvidia.com/gpu" not in limits(pods(job)[0])
    # Ray counts a pod's limits; what is asked for must be what it may use.
    assert all(pod["containers"][0]["resources"]["requests"] == limits(pod) for pod in pods(job))


def test_every_pod_runs_the_same_image_as_its_user_and_sees_the_shared_disk(job: Any, claims: set[str]) -> None:
    (user,) = arguments_of("USER")
    run_dir = load_recipe(*entrypoint(job)).directory
    assert len({pod["containers"][0]["image"] for pod in pods(job)}) == 1
    for pod in pods(job):
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": int(user), "fsGroup": int(user)}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        (shared,) = (volume for path, volume in mounts.items() if run_dir.is_relative_to(path))
        assert shared["persistentVolumeClaim"]["claimName"] in claims
        memory = mounts["/dev/shm"]["emptyDir"]
        assert memory["medium"] == "Memory"
        assert _gib(memory["sizeLimit"]) < _gib(limits(pod)["memory"]) / 2


def _gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


# -- the image ---------------------------------------------------------------------------------------------------------


def test_the_image_copies_what_exists_and_all_that_is_installed() -> None:
    assert instructions()[0][0] == "FROM"
    copied = [source for rest in arguments_of("COPY") for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied), copied
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'"(\w+)\*"', re.search(r"^include = \[\"rlpost.*$", project, re.MULTILINE)[0])  # pyright: ignore
    readme = re.search(r'^readme = "(.*)"', project, re.MULTILINE)
    assert readme and {*packages, readme[1], "pyproject.toml", "recipes"} <= set(copied)
    order = [name for name, _ in instructions()]
    assert order.index("COPY") < max(i for i, (_, rest) in enumerate(instructions()) if ".[gpu]" in rest)


def test_the_image_leaves_no_package_lists_and_no_secret_and_does_not_run_as_root() -> None:
    for rest in arguments_of("RUN"):
        if "apt-get install" in rest:
            assert rest.index("apt-get update") < rest.index("apt-get install")
            assert "--no-install-recommends" in rest and rest.endswith("rm -rf /var/lib/apt/lists/*")
        assert "pip install" not in rest or "--no-cache-dir" in rest
        assert ";" not in rest, "what fails before a semicolon is passed over"
    (user,) = arguments_of("USER")
    assert int(user) > 0 and f"useradd --uid {user}" in " ".join(arguments_of("RUN"))
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    settings = " ".join(arguments_of("ENV") + arguments_of("ARG"))
    assert not re.search(r"(?i)token|secret|password|api_?key", settings)


def test_the_image_runs_rlpost_with_the_environment_that_slurm_gives_its_nodes() -> None:
    assert json.loads(arguments_of("ENTRYPOINT")[0]) == ["rlpost"]
    (settings,) = arguments_of("ENV")
    (exported,) = re.findall(r"^export (RAY_worker\S+ RAY_ACCEL\S+)", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    assert set(exported.split()) <= set(settings.split())
    assert f"`{exported}`" in README
    (shown,) = re.findall(r"#\s+(docker run .*) rlpost train (recipes/\S+) ", (LAUNCH / "Dockerfile").read_text())
    assert f"`{shown[0]} rlpost train RECIPE run_dir=/runs/NAME`" in README and (ROOT / shown[1]).is_file()


# -- the others --------------------------------------------------------------------------------------------------------


def test_a_slurm_job_has_the_gpus_that_the_recipe_in_its_usage_needs() -> None:
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    used = re.search(r"sbatch launch/slurm.sh (recipes/\S+)", text)
    assert used is not None
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == gpus_of(load_recipe(ROOT / used[1]))
    assert options["ntasks-per-node"] == "1" and options["signal"].startswith("B:TERM@")


def test_the_table_names_every_file() -> None:
    assert {path.name for path in LAUNCH.iterdir()} == {"README.md", *re.findall(r"\| `(\S+)` \|", README)}
