"""A reader of JSON schemas, of the words that the schema of recipes uses; another word is an error."""

import re

NOTES = {"description", "title", "default", "$schema", "$defs"}
SIZES = {
    "minimum": lambda value, bound: value >= bound,
    "maximum": lambda value, bound: value <= bound,
    "exclusiveMinimum": lambda value, bound: value > bound,
    "exclusiveMaximum": lambda value, bound: value < bound,
}
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}


def is_valid(value, schema, root):
    """True if the value is one that the schema, a part of `root`, takes."""
    return all(_holds(word, of, value, schema, root) for word, of in schema.items())


def _holds(word, of, value, schema, root):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    items = value if isinstance(value, list) else []
    members = value if isinstance(value, dict) else {}
    prefix, known = schema.get("prefixItems", []), schema.get("properties", {})
    match word:
        case "type":
            if of == "integer" and isinstance(value, float):  # 2.0 is an integer to JSON schema
                return value.is_integer()
            wrong = isinstance(value, bool) and of in ("integer", "number")
            return isinstance(value, TYPES[of]) and not wrong
        case "const":
            return type(value) is type(of) and value == of
        case "enum":
            return any(type(value) is type(one) and value == one for one in of)
        case "$ref":
            return is_valid(value, root["$defs"][of.removeprefix("#/$defs/")], root)
        case "anyOf":
            return any(is_valid(value, one, root) for one in of)
        case "properties":
            return all(is_valid(members[name], of[name], root) for name in of if name in members)
        case "required":
            return not isinstance(value, dict) or set(of) <= set(value)
        case "additionalProperties":
            others = [members[name] for name in members if name not in known]
            return not others if of is False else all(_of(one, of, root) for one in others)
        case "propertyNames":
            return all(is_valid(name, of, root) for name in members)
        case "prefixItems":
            return all(is_valid(one, part, root) for one, part in zip(items, of, strict=False))
        case "items":
            return all(_of(one, of, root) for one in items[len(prefix) :])
        case "minItems" | "maxItems":
            more = len(items) >= of if word == "minItems" else len(items) <= of
            return not isinstance(value, list) or more
        case "pattern":
            return not isinstance(value, str) or re.search(of, value) is not None
        case "format":  # a path: any text
            return True
        case _ if word in SIZES:
            return not number or SIZES[word](value, of)
        case _ if word in NOTES:
            return True
    raise AssertionError(f"{word} is not a word of the schema of recipes")


def _of(value, schema, root):
    return schema is True or is_valid(value, schema, root)
