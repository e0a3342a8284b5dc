"""The public names: all there, and free until they are used."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "tf_gptopt"


def test_importing_the_package_loads_nothing_heavy(run_child: Callable[..., str]) -> None:
    code = """
        import json, sys
        before = set(sys.modules)
        import tf_gptopt
        print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
    """
    loaded = set(json.loads(run_child(code, devices=0)))
    heavy = {"tensorflow", "tf_keras", "keras", "numpy", "tokenizers", "rich", "jsonargparse"}
    assert not loaded & heavy


def test_every_public_name_resolves(run_child: Callable[..., str]) -> None:
    code = """
        import tf_gptopt
        broken = {}
        for name in tf_gptopt.__all__:
            try:
                getattr(tf_gptopt, name)
            except Exception as error:
                broken[name] = repr(error)
        assert not broken, broken
        assert set(tf_gptopt.__all__) <= set(dir(tf_gptopt))
        namespace = {}
        exec("from tf_gptopt import *", namespace)
        assert set(tf_gptopt.__all__) <= set(namespace)
    """
    run_child(code, devices=0)


def test_an_unknown_name_is_an_attribute_error(run_child: Callable[..., str]) -> None:
    code = """
        import tf_gptopt
        try:
            tf_gptopt.GptModel
        except AttributeError as error:
            print(error)
    """
    assert "GptModel" in run_child(code, devices=0)


def test_the_stub_names_what_the_package_does(run_child: Callable[..., str]) -> None:
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    typed = {
        alias.asname
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    code = "import json, tf_gptopt; print(json.dumps(tf_gptopt.__all__))"
    assert typed == set(json.loads(run_child(code, devices=0)))
