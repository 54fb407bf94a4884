"""`fields`: what a recipe consists of, and so what a study may search and `--set` may change."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from pipeline.cli.common import make_console, say
from pipeline.errors import UserError, did_you_mean

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def fields(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A section or a field, e.g. optimizer or optimizer.lr; default: all.")
    ] = "",
) -> None:
    """List the fields of a recipe: allowed values, default, which kinds have it, what it means."""
    from pipeline.recipe import Recipe
    from pipeline.sections.data import FORM_FIELDS, SAMPLER_FIELDS

    schema = Recipe.model_json_schema()
    rows = [row for section in schema["properties"] for row in _rows(schema, section)]
    chosen = [row for row in rows if not name or row[0] == name or row[0].startswith(f"{name}.")]
    if not chosen:
        known = [*schema["properties"], *(field for field, *_ in rows)]
        ends = dict.fromkeys(field for field in known if field.partition(".")[2] == name)
        hint = f" (did you mean {' or '.join(ends)}?)" if ends else did_you_mean(name, known)
        raise UserError(name, f"no such section or field{hint}", f"sections: {', '.join(schema['properties'])}")
    console = make_console()
    for field, values, default, of, meaning in chosen:
        say(console, f"{field:<28}  {values}{f'; default {default}' if default else ''}{f' ({of})' if of else ''}")
        if meaning:
            say(console, f"    {meaning}")
    fixed = [row[0] for row in chosen if row[0].startswith("data.") and row[0] not in FORM_FIELDS + SAMPLER_FIELDS]
    if searched := [row[0] for row in chosen if row[0] not in fixed]:
        example = f"`study NAME --set {searched[0]}=...` fixes one for all trials"
        say(console, f"a space suggests them by these names; {example}")
    if fixed:
        say(
            console,
            "trials share their data: a space can't suggest other fields of `data`, only options and `--set` can",
        )


def _rows(schema: Mapping[str, Any], section: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Field, values, default, kinds that have it where not all do, meaning; a row for each form of a field."""
    described = schema["properties"][section]
    kinds = described.get("discriminator", {}).get("mapping", {"": described.get("$ref")})
    kind_field = described.get("discriminator", {}).get("propertyName")
    forms: dict[tuple[str, str, str, str], list[str]] = {}
    if kind_field:
        default = described.get("default", {}).get(kind_field, "")
        forms[kind_field, ", ".join(kinds), default, "the kind, which has the fields below that name it"] = list(kinds)
    for kind, reference in kinds.items():
        model = schema["$defs"][reference.rpartition("/")[2]]
        for field, about in model["properties"].items():
            if field != kind_field:
                default = _shown(about["default"]) if "default" in about else ""
                forms.setdefault((field, _values(about), default, about.get("description", "")), []).append(kind)
    places = {field: place for place, (field, *_) in reversed(list(enumerate(forms)))}  # forms of a field side by side
    for (field, values, default, meaning), having in sorted(forms.items(), key=lambda item: places[item[0][0]]):
        of = "" if len(having) == len(kinds) else ", ".join(having)
        yield f"{section}.{field}", values, default, of, meaning


def _values(about: Mapping[str, Any]) -> str:
    """Of a field's JSON schema: `> 0, <= 100`, `true, false`, `a, b`."""
    if options := about.get("anyOf") or about.get("oneOf"):
        return " or ".join(_values(option) for option in options)
    if "enum" in about or "const" in about:
        return ", ".join(map(_shown, about.get("enum", [about.get("const")])))
    bounds = ", ".join(f"{sign} {_shown(about[bound])}" for bound, sign in _BOUNDS.items() if bound in about)
    match about.get("type"):
        case "boolean":
            return "true, false"
        case "array":
            items = about.get("items") or {}
            return f"list of {_values(items)}" if items else "list"
        case "integer":
            return f"integer {bounds}".strip()
        case "number":
            return bounds or "number"
    return "text"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
