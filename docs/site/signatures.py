"""Print every public signature, side by side, so that one hand can keep them alike.

python docs/site/signatures.py           # a line for each function
python docs/site/signatures.py --words   # each argument name, with its defaults and who has it
"""

import argparse
import inspect
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import influence


def public(room: ModuleType, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the functions and classes that a room's `__all__` names, and those of modules among them."""
    for word in sorted(getattr(room, "__all__", ())):
        thing, full = getattr(room, word), f"{name}.{word}"
        if isinstance(thing, ModuleType):
            inner = getattr(thing, "__all__", None) or [
                each for each, value in vars(thing).items() if getattr(value, "__module__", "") == thing.__name__
            ]
            for each in sorted(inner):
                value = getattr(thing, each)
                if not each.startswith("_") and callable(value) and full.count(".") < 3:
                    yield f"{full}.{each}", value
        elif callable(thing):
            yield full, thing


def arguments(thing: Any) -> list[tuple[str, str]]:
    """Return the names and defaults of a signature's arguments; keyword-only ones begin behind `*`."""
    found: list[tuple[str, str]] = []
    kinds = inspect.Parameter
    for parameter in inspect.signature(thing).parameters.values():
        star = parameter.kind is kinds.KEYWORD_ONLY and not any(name == "*" for name, _ in found)
        found += [("*", "")] if star else []
        default = "" if parameter.default is kinds.empty else repr(parameter.default)
        found.append((parameter.name, default if len(default) < 30 else "…"))
    return found


def main() -> None:
    """Print signatures, or the words they use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--words", action="store_true", help="each argument name, its defaults, who has it")
    options = parser.parse_args()
    words: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for full, thing in dict(public(influence, "influence")).items():
        try:
            found = arguments(thing)
        except ValueError:  # a type of C's
            continue
        if not options.words:
            print(f"{full}({', '.join(f'{n}={d}' if d else n for n, d in found)})")
        for name, default in found:
            words[name][default or "required"].append(full)
    for name, defaults in sorted(words.items()) if options.words else ():
        if name != "*":
            print(name)
            for default, who in sorted(defaults.items()):
                print(f"    {default}: {', '.join(who)}")


if __name__ == "__main__":
    main()
