"""The options of a command, declared and parsed before anything heavy is imported."""

from __future__ import annotations

from typing import Any

from tf_gptopt._errors import UserError, suggest


class Options:
    """A command's options; they are declared before anything heavy is imported."""

    def __init__(self, name: str, description: str) -> None:
        from jsonargparse import ArgumentParser

        self.name = name
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
            raise UserError(self._advice(" ".join(str(error).split()))) from None
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


def spelt_out(argv: list[str], section: type) -> list[str]:
    """A training's options may be written short: `--mesh M --profile` is `--fit.mesh M
    --fit.profile true`."""
    import dataclasses

    fit = getattr(section, "fit", None)
    if fit is None:
        return argv
    short = {field.name: field.default for field in dataclasses.fields(fit)}
    del short["seed"]  # the stage has one of its own
    spelt = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=True):
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in short:
            spelt.append(word)
            continue
        spelt.append(f"--fit.{name}{equals}{value}")
        if isinstance(short[name], bool) and not equals and following.startswith("--"):
            spelt.append("true")
    return spelt
