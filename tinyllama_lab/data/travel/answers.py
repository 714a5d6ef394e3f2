"""Compute what an answer needs from the slots of a request, and fill in templates.

A rule of an intent's `derive` block is one of:
  total: people * fare                       (also + - /; a name or a whole number each side)
  sky: {by: season, table: {winter: cold}}   (look up; `by` may be a list, joined by "_")
  fee: {by: days, upto: {15: 30, 30: 50}}    (first limit that the number does not pass)
A text may differ by style, {en: ..., hi: ..., ne: ...}, and may hold {slots} itself.
"""

import re
from typing import Any

ARTICLE = re.compile(r"^(a|an|the) ")
Values = dict[str, Any]


def by_style(value: Any, style: str) -> Any:
    """Choose the wording of a style where a value has one per style.

    Mixed language has no articles, so "a fever" becomes "fever" there.
    """
    if isinstance(value, dict):
        return value[style]
    if isinstance(value, str) and style != "en":
        return ARTICLE.sub("", value)
    return value


def flatten(picked: Values, style: str) -> Values:
    """Spread slots that are records (a route has from and to) into plain values."""
    flat: Values = {}
    for name, value in picked.items():
        fields = value if isinstance(value, dict) else {name: value}
        for key, field in fields.items():
            if key in flat:
                raise ValueError(f"two slots give a value for {key}")
            flat[key] = by_style(field, style)
    return flat


def calculate(rule: str, values: Values) -> int:
    """Evaluate `left operator right` on whole numbers; a division must be exact."""
    left, operator, right = rule.split()
    a, b = (int(values.get(side, side)) for side in (left, right))
    if operator == "/":
        if a % b:
            raise ValueError(f"{a} / {b} is not a whole number")
        return a // b
    return {"*": a * b, "+": a + b, "-": a - b}[operator]


def look_up(rule: dict[str, Any], values: Values) -> Any:
    """Find the entry of a table, or of the first limit that is large enough."""
    by = rule["by"]
    if "upto" in rule:
        limit = min(limit for limit in rule["upto"] if values[by] <= limit)
        return rule["upto"][limit]
    keys = by if isinstance(by, list) else [by]
    return rule["table"]["_".join(str(values[key]) for key in keys)]


def derive(rules: dict[str, Any], picked: Values, style: str) -> Values:
    """Return the plain slot values with every derived value added, in order."""
    values = flatten(picked, style)
    for name, rule in rules.items():
        if isinstance(rule, str):
            values[name] = calculate(rule, values)
            continue
        found = by_style(look_up(rule, values), style)
        values[name] = found.format(**values) if isinstance(found, str) else found
    return values


def fill(template: str, values: Values) -> str:
    """Fill a template and start it with a capital letter."""
    text = template.format(**values)
    return text[:1].upper() + text[1:]
