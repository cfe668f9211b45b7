"""The manifests in deploy/: valid for KubeRay's own schemas, unknown fields forbidden, and fit for long training runs.

KUBERAY_CRDS may name a directory with other CustomResourceDefinitions (`*.yaml` or `*.json.gz`) to check against.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
jsonschema = pytest.importorskip("jsonschema", reason="the schema checks need the `dev` extra")

ROOT = Path(__file__).resolve().parents[2]
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT / "tests" / "data" / "kuberay-crds"))
MANIFESTS = sorted((ROOT / "deploy").rglob("*.yaml"))
DEFAULT_GRACE_S = 25

Schema = dict[str, Any]


def strict(schema: Schema) -> Schema:
    """An OpenAPI v3 structural schema as plain JSON Schema that forbids unknown fields, as the API server would."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes") and key != "format"}
    if result.pop("nullable", False) and "type" in result:
        result["type"] = [result["type"], "null"]
    if "properties" in result:
        result["properties"] = {name: strict(child) for name, child in result["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
    for key in ("additionalProperties", "items"):
        if isinstance(result.get(key), dict):
            result[key] = strict(result[key])
    return result


def read_crd(path: Path) -> Schema:
    if path.suffix == ".gz":
        return json.loads(gzip.decompress(path.read_bytes()))
    return yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def validators() -> dict[tuple[str, str], Any]:
    """(apiVersion, kind) -> validator."""
    found = {}
    for path in sorted([*CRDS.glob("*.yaml"), *CRDS.glob("*.json.gz")]):
        crd = read_crd(path)["spec"]
        for version in crd["versions"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            name = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", "maxLength": 253}
            schema["properties"]["metadata"] = {"required": ["name"], "properties": {"name": name}}
            key = (f"{crd['group']}/{version['name']}", crd["names"]["kind"])
            found[key] = jsonschema.Draft202012Validator(schema)
    if not found:
        pytest.skip(f"no KubeRay schemas in {CRDS}; set KUBERAY_CRDS to a directory that has them")
    return found


def documents(path: Path) -> list[Schema]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def problems(document: Schema) -> list[str]:
    validator = validators().get((document.get("apiVersion", ""), document.get("kind", "")))
    if validator is None:
        return [f"no schema for {document.get('apiVersion')} {document.get('kind')}"]
    return [f"{'/'.join(map(str, e.absolute_path))}: {e.message[:200]}" for e in validator.iter_errors(document)]


def cluster_spec(document: Schema) -> Schema:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def pods(document: Schema) -> Iterator[tuple[str, Schema]]:
    """(where, pod specification) of head and workers."""
    cluster = cluster_spec(document)
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def all_documents() -> list[Any]:
    return [pytest.param(document, id=path.name) for path in MANIFESTS for document in documents(path)]


def document_of(kind: str) -> Schema:
    return copy.deepcopy(next(d for path in MANIFESTS for d in documents(path) if d["kind"] == kind))


every_document = pytest.mark.parametrize("document", all_documents())


def test_there_is_a_cluster_and_a_job() -> None:
    assert {document["kind"] for path in MANIFESTS for document in documents(path)} == {"RayCluster", "RayJob"}


@every_document
def test_it_fits_the_schema(document: Schema) -> None:
    assert problems(document) == []


@every_document
def test_dev_shm_is_backed_by_memory_of_a_stated_size(document: Schema) -> None:
    for where, pod in pods(document):
        volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert mounts["/dev/shm"]["medium"] == "Memory", where
            assert re.fullmatch(r"\d+Gi", mounts["/dev/shm"]["sizeLimit"]), where


@every_document
def test_pods_have_time_to_save_before_they_are_killed(document: Schema) -> None:
    for where, pod in pods(document):
        assert pod["terminationGracePeriodSeconds"] >= DEFAULT_GRACE_S + 30, where


@every_document
def test_storage_credentials_come_from_a_secret_and_reach_every_pod(document: Schema) -> None:
    for where, pod in pods(document):
        for container in pod["containers"]:
            env = {variable["name"]: variable for variable in container["env"]}
            assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= set(env), where
            assert all("secretKeyRef" in env[name]["valueFrom"] for name in env if name.startswith("AWS_")), where


@every_document
def test_the_head_takes_no_ranks_and_ray_asks_for_its_token(document: Schema) -> None:
    cluster = cluster_spec(document)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"] == {"mode": "token"}


@every_document
def test_pods_are_not_privileged(document: Schema) -> None:
    for where, pod in pods(document):
        assert pod["securityContext"]["runAsNonRoot"], where
        assert all(c["securityContext"]["allowPrivilegeEscalation"] is False for c in pod["containers"]), where


def test_the_job_launches_a_named_run_that_fits_its_workers() -> None:
    job = document_of("RayJob")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["orchestrator", "launch"]
    options = dict(zip(words[2:-1:2], words[3:-1:2], strict=True))
    assert set(options) == {"--address", "--workers", "--storage", "--run-name"}
    assert options["--address"] == "auto" and options["--storage"].startswith("s3://")
    assert (ROOT / words[-1]).is_file()
    cpus = sum(
        group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
        for group in cluster_spec(job)["workerGroupSpecs"]
    )
    assert int(options["--workers"]) <= cpus


def test_ray_in_the_manifests_is_the_ray_that_was_tested() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned
    versions = {cluster_spec(d)["rayVersion"] for path in MANIFESTS for d in documents(path)}
    assert versions == {pinned[1]}


def test_the_image_does_not_run_as_root_and_copies_what_exists() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("USER")] == ["1000"]
    copied = [word for line in lines if line.startswith("COPY") and "--from" not in line for word in line.split()[1:-1]]
    missing = [word for word in copied if not word.startswith("--") and not (ROOT / word).exists()]
    assert copied and missing == []


@pytest.mark.parametrize(
    "path, value",
    [
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "terminationGracePeriod"), 60),
        (("spec", "backoffLimit"), "five"),
        (("spec", "rayClusterSpec", "workerGroupSpecs"), {}),
        (("metadata", "name"), "Not_A_Name"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_the_schema_check_sees_a_mistake(path: tuple[str, ...], value: Any) -> None:
    job = document_of("RayJob")
    target = job
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert len(problems(job)) == 1
