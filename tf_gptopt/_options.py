"""The options of a command, declared and parsed before anything heavy is imported."""

from __future__ import annotations

import re
from typing import Any

from tf_gptopt._errors import UserError, suggest


class Options:
    """A command's options; they are declared before anything heavy is imported."""

    def __init__(self, name: str, description: str) -> None:
        from jsonargparse import ArgumentParser

        self.name, self.description = name, description
        self.parser = ArgumentParser(
            prog=f"tf-gptopt {name}", description=f"{description}.", exit_on_error=False
        )
        self.add = self.parser.add_argument

    def section(self, config: type) -> None:
        """Every field of a recipe's section becomes an option."""
        self.parser.add_class_arguments(config, None)

    def parse(self, argv: list[str], section: type | None = None) -> tuple[Any, Any]:
        """The options, and the section that they fill in (or None)."""
        from jsonargparse import ArgumentError

        try:
            options = self.parser.instantiate(self.parser.parse_args(argv))
        except UserError:
            raise
        except (ArgumentError, TypeError, ValueError) as error:
            raise UserError(self._advice(one_line(error))) from None
        if section is None:
            return options, None
        import dataclasses

        fields = [field.name for field in dataclasses.fields(section)]
        return options, section(**{name: options[name] for name in fields})

    def _advice(self, message: str) -> str:
        unknown = [word for word in message.split() if word.startswith("--")]
        known = [flag for action in self.parser._actions for flag in action.option_strings]
        if "nrecognized" in message and unknown:
            flag = unknown[0].partition("=")[0]
            return f"Unknown option {flag!r} of `{self.name}`.{suggest(flag, known)}"
        return f"{message.rstrip('.')}. See `tf-gptopt {self.name} --help`."


# How jsonargparse begins about a section that may be None
_SECTION_OR_NONE = re.compile(r"Union subtypes Subtypes: \[<class 'tf_gptopt[^]]*\] Errors: - ")


def one_line(error: BaseException) -> str:
    """A parser's complaint without line breaks; about a section that may be left out, the part
    that says what is wrong inside."""
    message = " ".join(str(error).split())
    if sections := list(_SECTION_OR_NONE.finditer(message)):
        message = message[sections[-1].end() :].partition(" - Expected a <class 'NoneType'>")[0]
    return re.sub(r"Problem with given class_path \S+ ", "", message)


def spelt_out(argv: list[str], section: type) -> list[str]:
    """A training's options may be written short, what is true needs no value, and words may be
    joined by - or _: `--mesh M --profile` is `--fit.mesh M --fit.profile true`."""
    import dataclasses

    fit = getattr(section, "fit", None)
    short = {field.name: field.default for field in dataclasses.fields(fit)} if fit else {}
    short.pop("seed", None)  # the stage has one of its own
    own = {field.name: field.default for field in dataclasses.fields(section)}
    spelt = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in short | own:
            is_nested = flag.startswith("--") and "." in flag
            spelt.append(f"--{name}{equals}{value}" if is_nested else word)
            continue
        spelt.append(f"--{name}{equals}{value}" if name in own else f"--fit.{name}{equals}{value}")
        if isinstance((short | own)[name], bool) and not equals and following.startswith("--"):
            spelt.append("true")
    return spelt
