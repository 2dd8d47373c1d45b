"""What Kubernetes and SkyPilot say of a manifest's fields: extracts of their published schemas, and a look at both.

python -m tests.cluster.schemas TRAINJOBS.yaml TRAININGRUNTIMES.yaml makes kubeflow.yaml anew of Kubeflow Trainer's CRDs
(manifests/base/crds/ of its repository): the fields that launch/trainjob.yaml has, and their siblings' names.
"""

import re
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
LAUNCH = HERE.parents[1] / "launch"
TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list}
RULES = ("type", "required", "enum", "pattern", "minimum", "maximum", "x-kubernetes-int-or-string", "anyOf")


def manifests(path):
    return list(yaml.safe_load_all(path.read_text()))


def problems(value, schema, path=""):
    """Where a value does not keep to a schema, in words."""
    if "anyOf" in schema and all(problems(value, choice) for choice in schema["anyOf"]):
        return [f"{path}: {value!r} is none of the {len(schema['anyOf'])} things that it may be"]
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{path}: {value!r} is no {kind}"]
    if value not in schema.get("enum", [value]):
        return [f"{path}: {value!r} is none of {', '.join(schema['enum'])}"]
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return [f"{path}: {value!r} does not match {schema['pattern']}"]
    if not isinstance(value, bool) and isinstance(value, int) and value < schema.get("minimum", value):
        return [f"{path}: {value} is less than {schema['minimum']}"]
    if isinstance(value, list) and "items" in schema:
        return [p for i, item in enumerate(value) for p in problems(item, schema["items"], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return []
    wrong = [f"{path}: lacks {name}" for name in schema.get("required", []) if name not in value]
    for name, item in value.items():
        if name in schema.get("properties", {}):
            wrong += problems(item, schema["properties"][name], f"{path}.{name}")
        elif isinstance(others := schema.get("additionalProperties", "properties" not in schema), dict):
            wrong += problems(item, others, f"{path}.{name}")
        elif not others:
            wrong.append(f"{path}.{name}: no such field")
    return wrong


def extract(schema, value):
    """The part of a schema that says something of a value: its fields and their siblings' names."""
    kept = {rule: schema[rule] for rule in RULES if rule in schema}
    if isinstance(value, dict) and "properties" in schema:
        kept["properties"] = {
            name: extract(field, value[name]) if name in value else {} for name, field in schema["properties"].items()
        }
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = extract(schema["additionalProperties"], None)
    if isinstance(value, list) and "items" in schema:
        merged = {}
        for item in value:
            merged = {**merged, **item} if isinstance(item, dict) else item
        kept["items"] = extract(schema["items"], merged)
    return kept


if __name__ == "__main__":
    schemas = {}
    for path in map(Path, sys.argv[1:]):
        crd = yaml.safe_load(path.read_text())
        kind, (version,) = crd["spec"]["names"]["kind"], crd["spec"]["versions"]
        (manifest,) = (each for each in manifests(LAUNCH / "trainjob.yaml") if each["kind"] == kind)
        schemas[kind] = extract(version["schema"]["openAPIV3Schema"], manifest)
    print(yaml.safe_dump(schemas, default_flow_style=None, width=118), end="")
