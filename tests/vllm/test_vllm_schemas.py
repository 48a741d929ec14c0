"""The keywords of stages/serving/json_schema.py mean what the package jsonschema, which vLLM brings, makes of
them.
"""

import itertools

import jsonschema

from stages.serving import json_schema


def test_schemas_are_judged_as_the_jsonschema_package_judges_them():
    values = [None, True, 0, 1, 1.0, 2.5, "", "ab", [], [1, "a"], {}, {"a": 1}, {"a": "b", "c": None}]
    schemas = [
        {},
        *({"type": kind} for kind in json_schema.TYPES),
        {"type": ["string", "null"]},
        {"enum": [1, "ab", None]},
        {"const": 1},
        {"const": True},
        {"minimum": 1},
        {"exclusiveMinimum": 1, "maximum": 2},
        {"exclusiveMaximum": 1},
        {"minLength": 1},
        {"maxLength": 1},
        {"pattern": "^a"},
        {"minItems": 1},
        {"maxItems": 0},
        {"items": {"type": "integer"}},
        {"required": ["a"]},
        {"properties": {"a": {"type": "string"}}},
        {"properties": {"a": {}}, "additionalProperties": False},
        {"additionalProperties": {"type": "integer"}},
        {"anyOf": [{"type": "array"}, {"minimum": 2}]},
    ]
    for schema, value in itertools.product(schemas, values):
        right = jsonschema.Draft202012Validator(schema).is_valid(value)
        assert (not any(json_schema.mismatches(schema, value))) is right, (schema, value)
