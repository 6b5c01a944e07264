"""A strict schema, of our own, of the fields of a Volcano job that this project relies on.

Unknown fields are errors: a cluster would drop a misspelt one silently. What Volcano accepts beyond this is left out.
"""

from typing import Any

Schema = dict[str, Any]


def _object(required: Schema, optional: Schema | None = None) -> Schema:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(of: Schema, at_least: int = 0) -> Schema:
    return {"type": "array", "items": of, "minItems": at_least}


TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
MAP: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
# Part of a pod's name, which is at most 63 characters: lower case letters, digits and dashes.
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 58}
AMOUNT: Schema = {"type": "string", "pattern": "^[1-9][0-9]*[mM]?$"}
RESOURCES: Schema = _object({"cpu": AMOUNT, "memory": AMOUNT}, {"nvidia.com/gpu": AMOUNT})
MOUNT: Schema = _object(
    {"name": TEXT, "mountPath": {"type": "string", "pattern": "^/"}}, {"readOnly": {"type": "boolean"}}
)
VOLUME: Schema = _object(
    {"name": TEXT},
    {
        "emptyDir": _object({}, {"medium": {"const": "Memory"}}),
        "persistentVolumeClaim": _object({"claimName": TEXT}, {"readOnly": {"type": "boolean"}}),
        "hostPath": _object({"path": TEXT}),
    },
)
SECRET_KEY: Schema = _object({"secretKeyRef": _object({"name": TEXT, "key": TEXT})})
CONTAINER: Schema = _object(
    {
        "name": NAME,
        "image": TEXT,
        "command": _list({"type": "string"}, at_least=1),
        "env": _list(_object({"name": TEXT}, {"value": {"type": "string"}, "valueFrom": SECRET_KEY})),
        "resources": _object({"limits": RESOURCES, "requests": RESOURCES}),
        "volumeMounts": _list(MOUNT, at_least=1),
    },
    {
        "ports": _list(_object({"name": TEXT, "containerPort": COUNT})),
        "securityContext": {"const": {}},
        "envFrom": _list(_object({"secretRef": _object({"name": TEXT})})),
    },
)
POD: Schema = _object(
    {
        "containers": _list(CONTAINER, at_least=1),
        "restartPolicy": {"const": "Never"},
        "volumes": _list(VOLUME, at_least=1),
    },
    {
        "nodeSelector": MAP,
        "imagePullSecrets": _list(_object({"name": TEXT})),
        "tolerations": _list(_object({}, dict.fromkeys(("key", "operator", "value", "effect"), TEXT))),
    },
)
TASK: Schema = _object(
    {
        "name": NAME,
        "replicas": {"const": 1},
        "template": _object({"metadata": _object({"labels": MAP}, {"annotations": MAP}), "spec": POD}),
    },
    {
        "maxRetry": COUNT,
        # Left out, a cluster takes the number of replicas.
        "minAvailable": {"enum": [0, 1]},
        "policies": _list(_object({"event": {"enum": ["PodEvicted", "PodFailed"]}, "action": {"const": "RestartJob"}})),
    },
)
JOB: Schema = _object(
    {
        "apiVersion": {"const": "batch.volcano.sh/v1alpha1"},
        "kind": {"const": "Job"},
        "metadata": _object({"name": NAME}),
        "spec": _object(
            {
                "schedulerName": {"const": "volcano"},
                "queue": TEXT,
                "maxRetry": COUNT,
                "plugins": _object({"svc": _list(TEXT), "env": _list(TEXT)}),
                "tasks": _list(TASK, at_least=1),
            },
            {"priorityClassName": TEXT},
        ),
    }
)
