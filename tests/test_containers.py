"""Images, the compose file and the work pools' templates: what a container gets, without a container engine.

Base job templates go through the classes that the workers themselves use, against a real server, so what is looked
at is the container or the Kubernetes job that would be made.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from rise_ops import __version__
from tests.conftest import prefect_child_environment

containers = pytest.importorskip("docker.models.containers")
DockerWorker = pytest.importorskip("prefect_docker.worker").DockerWorker
KubernetesWorker = pytest.importorskip("prefect_kubernetes.worker").KubernetesWorker

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "deployments" / "docker"
POOLS = ROOT / "deployments" / "work-pools"
IMAGES = ("Dockerfile", "Dockerfile.cuda")
USER = "10001:10001"
WORKERS: dict[str, Any] = {
    "docker": DockerWorker,
    "docker-gpu": DockerWorker,
    "kubernetes": KubernetesWorker,
    "kubernetes-gpu": KubernetesWorker,
}
KEY_ID, KEY = "planted-key-id-4f1c", "planted-secret-key-9a77"
AS_SECRET = re.compile(
    r"(?i)(password|secret|token|auth_string|access_key)\w*[\"']?\s*[:=]\s*[\"']?(?!false)[^\s\"'{$/<&*\[]"
)


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile; lines that end in a backslash go on."""
    text = re.sub(r"\\\n", " ", "\n".join(line for line in _lines(DOCKER / name) if not line.startswith("#")))
    found = (line.partition(" ") for line in text.splitlines() if line.strip())
    return [(word.upper(), " ".join(rest.split())) for word, _, rest in found]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def ignored(path: str) -> bool:
    """Whether `.dockerignore` keeps a path of the checkout out of the build's context."""
    kept = {line.removeprefix("!") for line in _lines(ROOT / ".dockerignore") if line.startswith("!")}
    return not any(path == name or path.startswith(f"{name}/") for name in kept)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_a_user_without_rights(name: str) -> None:
    steps = instructions(name)
    last = max(index for index, (word, _) in enumerate(steps) if word == "FROM")
    assert [rest for word, rest in steps[last:] if word == "USER"] == [USER]
    assert not [rest for word, rest in steps if word in ("ENTRYPOINT", "ADD", "VOLUME")]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_built_from_named_versions(name: str) -> None:
    steps = instructions(name)
    bases = {rest.split()[0] for word, rest in steps if word == "FROM"}
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z-]+", base) for base in bases), bases
    installs = [part for word, rest in steps if word == "RUN" for part in rest.split("&&") if "pip install" in part]
    assert len(installs) >= 2
    assert all("-c deployments/constraints.txt" in part for part in installs)
    assert not any("://" in rest for _, rest in steps)


@pytest.mark.parametrize("name", IMAGES)
def test_what_an_image_copies_is_in_its_context(name: str) -> None:
    copied = [
        source
        for word, rest in instructions(name)
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    assert copied
    assert not [path for path in copied if not (ROOT / path).exists() or ignored(path)]
    assert ignored(".git/config") and ignored(".venv/bin/python") and ignored("tests/conftest.py")
    assert {"deployments/docker/.env", "deployments/docker/secrets"} <= set(_lines(ROOT / ".dockerignore"))


def test_both_images_differ_in_pytorch_only() -> None:
    cpu, cuda = (instructions(name) for name in IMAGES)
    apart = [step for step in cpu if step not in cuda] + [step for step in cuda if step not in cpu]
    assert all("TORCH_INDEX_URL" in rest or "editables" in rest or word == "ENV" for word, rest in apart), apart
    assert any("TORCH_INDEX_URL" in rest and "exit 1" in rest for word, rest in cpu if word == "RUN")


def test_secrets_of_a_checkout_are_not_committed() -> None:
    assert {"deployments/docker/.env", "deployments/docker/secrets/"} <= set(_lines(ROOT / ".gitignore"))


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_every_service_is_pinned_and_confined(compose: Mapping[str, Any]) -> None:
    for name, service in compose["services"].items():
        image = re.sub(r"\$\{CURATION_IMAGE:-(.*)\}", r"\1", service["image"])
        assert re.fullmatch(r"[a-z/-]+:\d+\.\d+[\w.-]*", image), name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "network_mode", "pid"} & set(service), name
        if name == "s3":  # begins as root to own its volume
            assert set(service["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "SETGID", "SETUID"}
        else:
            assert service["user"] in (USER, "postgres") and service["read_only"] is True and "cap_add" not in service
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "restart" in service, name


def test_no_secret_is_in_the_compose_file(compose: Mapping[str, Any]) -> None:
    declared = set(compose["secrets"])
    assert {name for service in compose["services"].values() for name in service["secrets"]} == declared
    for name, service in compose["services"].items():
        script = json.dumps([service.get("command", ""), service.get("environment", {})])
        read = set(re.findall(r"/run/secrets/([\w-]+)", script))
        assert read == set(service["secrets"]), name
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8") + (DOCKER / "env.example").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if AS_SECRET.search(line) and not line.lstrip().startswith("#")]
    assert not [line for line in shown if "/run/secrets/" not in line]
    assert AS_SECRET.search("POSTGRES_PASSWORD: hunter2") and AS_SECRET.search("AWS_SECRET_ACCESS_KEY=abc")


def test_files_and_variables_of_the_compose_file_exist(compose: Mapping[str, Any]) -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    known = set(re.findall(r"^([A-Z_0-9]+)=", (DOCKER / "env.example").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\$\{([A-Z_0-9]+)", text.replace("$$", ""))) == known
    build = compose["services"]["server"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    for name in IMAGES:
        assert (ROOT / build["dockerfile"].replace("${DOCKERFILE:-Dockerfile}", name)).is_file()
    assert set(build["args"]) == {rest.partition("=")[0] for word, rest in instructions("Dockerfile") if word == "ARG"}
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DOCKER / source).resolve().exists(), volume
        assert set(service["networks"]) <= set(compose["networks"])
        assert set(service.get("depends_on", ())) <= set(compose["services"])
        for path in re.findall(r"(?<![/\w])deployments/[\w./-]+\.(?:json|yaml)", json.dumps(service)):
            assert (ROOT / path).is_file(), path


def test_scripts_of_the_compose_file_are_shell(compose: Mapping[str, Any]) -> None:
    for name, service in compose["services"].items():
        command = service.get("command", [])
        if command[:1] == ["sh"]:
            assert command[1] == "-ec" and "exec " in command[2].splitlines()[-1], name
            assert shlex.split(command[2].replace("$$", "$"), comments=True), name


# -- work pools


def template(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((POOLS / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def secrets_on_server(prefect_harness: None) -> None:
    Secret(value=KEY_ID).save("curation-s3-access-key-id", overwrite=True)
    Secret(value=KEY).save("curation-s3-secret-key", overwrite=True)


def stored(name: str) -> dict[str, Any]:
    """The template as the server has it after `prefect work-pool create`."""

    async def create() -> dict[str, Any]:
        pool = WorkPoolCreate(name=f"curation-{name}", type=WORKERS[name].type, base_job_template=template(name))
        async with get_client() as client:
            await client.create_work_pool(pool, overwrite=True)
            return (await client.read_work_pool(pool.name)).base_job_template

    return asyncio.run(create())


def configured(name: str, **variables: Any) -> Any:
    """What a worker makes of the stored template for a run."""
    base = stored(name)

    async def resolve() -> Any:
        async with get_client() as client:
            kind = WORKERS[name].job_configuration
            return await kind.from_template_and_values(base, variables, client=client)

    found = asyncio.run(resolve())
    found.prepare_for_flow_run(flow_run=_FlowRun())
    return found


class _FlowRun:
    """As much of a flow run as a job's configuration looks at."""

    id = "00000000-0000-0000-0000-000000000001"
    name = "support-evaluate"
    flow_id = deployment_id = work_pool_id = None
    tags: tuple[str, ...] = ()
    parameters: dict[str, Any] = {}  # noqa: RUF012


def test_every_pool_of_the_deployments_has_a_template() -> None:
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8"))
    pools = {pool["name"] for pool in deployments["definitions"]["work_pools"].values()} - {"curation-process"}
    assert pools == {f"curation-{path.stem}" for path in POOLS.glob("*.json")}
    assert pools == {f"curation-{name}" for name in WORKERS}


@pytest.mark.parametrize("name", WORKERS)
def test_a_template_names_what_its_worker_knows(name: str) -> None:
    own = template(name)
    default = WORKERS[name].get_default_base_job_template()
    assert set(own["job_configuration"]) == set(default["job_configuration"])
    assert not AS_SECRET.search(json.dumps(own["job_configuration"]))
    image = own["variables"]["properties"].get("image", {}).get("default")
    assert image in (None, f"rise-ops:{__version__}-{'cuda' if 'gpu' in name else 'cpu'}")


@pytest.mark.usefixtures("secrets_on_server")
@pytest.mark.parametrize("name", ["docker", "docker-gpu"])
def test_secrets_stay_references_until_a_worker_starts_a_job(name: str) -> None:
    text = json.dumps(stored(name))
    assert KEY not in text and KEY_ID not in text
    assert "{{ prefect.blocks.secret.curation-s3-secret-key }}" in text
    environment = configured(name).env
    assert (environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]) == (KEY_ID, KEY)


@pytest.mark.usefixtures("secrets_on_server")
def test_a_reference_in_prefect_yaml_would_be_stored_in_clear(tmp_path: Path) -> None:
    """What the runbook warns of; if Prefect stops doing it, the warning can go."""
    stored("docker")
    (tmp_path / "flow.py").write_text(
        "from prefect import flow\n\n@flow\ndef look():\n    return 1\n", encoding="utf-8"
    )
    environment = {"KEY": "{{ prefect.blocks.secret.curation-s3-secret-key }}"}
    pool = {"name": "curation-docker", "job_variables": {"env": environment}}
    deployment = {"name": "leaky", "entrypoint": "flow.py:look", "work_pool": pool}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"pull": [], "deployments": [deployment]}), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=tmp_path,
        env=os.environ | prefect_child_environment(),
        check=True,
        capture_output=True,
    )

    async def variables() -> Any:
        async with get_client() as client:
            return (await client.read_deployment_by_name("look/leaky")).job_variables

    assert asyncio.run(variables())["env"]["KEY"] == KEY
    assert "prefect.blocks" not in (ROOT / "deployments" / "prefect.yaml").read_text(encoding="utf-8")


@pytest.mark.usefixtures("secrets_on_server")
@pytest.mark.parametrize("name", ["docker", "docker-gpu"])
def test_a_container_has_what_it_needs_and_no_more(name: str) -> None:
    variables = {"s3_endpoint": "http://s3:8333", **({"gpu": "3"} if name == "docker-gpu" else {})}
    made = _container(configured(name, **variables))
    host = made["host_config"]
    assert made["user"] == USER and made["image"] == template(name)["variables"]["properties"]["image"]["default"]
    assert made["command"] == "prefect flow-run execute"
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Init"]) == (True, ["ALL"], True)
    assert host["SecurityOpt"] == ["no-new-privileges:true"] and not host.get("Privileged")
    assert host["RestartPolicy"] == {"Name": "no"}
    assert host["Binds"] == ["/home/curation", "/tmp"]
    assert made["environment"]["AWS_ENDPOINT_URL"] == "http://s3:8333"
    devices = [(each["DeviceIDs"], each["Count"], each["Capabilities"]) for each in host.get("DeviceRequests", [])]
    assert devices == ([(["3"], 0, [["gpu"]])] if name == "docker-gpu" else [])


@pytest.mark.usefixtures("secrets_on_server")
def test_a_variable_without_a_value_is_left_out() -> None:
    assert "AWS_ENDPOINT_URL" not in configured("docker").env


def _container(configuration: Any) -> dict[str, Any]:
    """What the worker would ask Docker to create."""
    engine: Any = SimpleNamespace(version=lambda: {"Version": "28.2.2"})
    settings = object.__new__(DockerWorker)._build_container_settings(engine, configuration)
    settings.pop("network")
    made: dict[str, Any] = containers._create_container_args({**settings, "version": "1.44"})
    return {**made, "environment": settings["environment"]}


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize("name", ["kubernetes", "kubernetes-gpu"])
def test_a_job_of_kubernetes_has_what_it_needs_and_no_more(name: str) -> None:
    manifest = configured(name, env={"HF_HUB_OFFLINE": "1"}, memory_limit="13Gi", scratch="7Gi").job_manifest
    assert manifest["metadata"]["namespace"] == "curation"
    assert manifest["spec"]["backoffLimit"] == 0 and manifest["spec"]["ttlSecondsAfterFinished"] == 86400
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never" and pod["automountServiceAccountToken"] is False
    assert (pod["securityContext"]["runAsNonRoot"], pod["securityContext"]["runAsUser"]) == (True, 10001)
    assert pod["securityContext"]["fsGroup"] == 10001
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == ("1" if name == "kubernetes-gpu" else None)
    assert container["resources"]["limits"]["memory"] == "13Gi" and container["resources"]["requests"]["memory"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/home/curation", "/tmp"}
    assert {"name": "scratch", "emptyDir": {"sizeLimit": "7Gi"}} in pod["volumes"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert (environment["HF_HUB_OFFLINE"], environment["AWS_EC2_METADATA_DISABLED"]) == ("1", "true")
    assert container["envFrom"] == [{"secretRef": {"name": "curation-s3"}}]
    assert not {name for name in environment if name.startswith("AWS_") and name != "AWS_EC2_METADATA_DISABLED"}
    assert "{{" not in json.dumps(manifest)
