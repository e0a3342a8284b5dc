"""Checkpoint folders: what is saved comes back, damage is named, and `transformers` agrees."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tf_gptopt._errors import UserError
from tf_gptopt._keras import keras
from tf_gptopt._tokenizer import Tokenizer
from tf_gptopt.models.checkpoints import (
    assign_weights,
    load_checkpoint,
    load_model,
    named_weights,
    save_checkpoint,
    save_model,
    weight_shapes,
)
from tf_gptopt.models.gpt import GPTModel, wrap_graph

Build = Callable[..., GPTModel]
IDS = np.arange(18).reshape(2, 9)
ODD_SHAPES = [
    {},
    {"tie_embeddings": False},
    {"num_layers": 3, "num_heads": (1, 4, 2), "head_dim": 5, "intermediate_dim": (7, 30, 11)},
    {"dropout": 0.1, "layer_norm_epsilon": 1e-3, "max_sequence_length": 9},
]


# Names


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_weight_shapes_name_every_weight(tiny_model: Build, shape: dict[str, Any]) -> None:
    model = tiny_model(**shape)
    weights = named_weights(model)
    assert {name: array.shape for name, array in weights.items()} == weight_shapes(model.config)
    assert sum(array.size for array in weights.values()) == model.count_params()
    assert {array.dtype for array in weights.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(
        weights["block_0_qkv/kernel"], model.get_layer("block_0_qkv").kernel
    )


def test_named_weights_are_copies(tiny_model: Build) -> None:
    model = tiny_model()
    weights = named_weights(model)
    weights["final_norm/gamma"][:] = 7.0
    assert not (model.get_layer("final_norm").gamma.numpy() == 7.0).any()


def test_weights_travel_under_mixed_precision(tiny_model: Build) -> None:
    weights = named_weights(tiny_model(seed=1))
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = tiny_model(seed=2)
    assign_weights(model, weights)
    for name, array in named_weights(model).items():
        np.testing.assert_array_equal(array, weights[name])


def test_assign_weights_says_what_does_not_fit(tiny_model: Build) -> None:
    model = tiny_model()
    weights = named_weights(model)
    before = named_weights(model)

    lacking = {name: array * 2 for name, array in weights.items() if "block_1_fc" not in name}
    with pytest.raises(UserError, match=r"2 of 28 weights are missing: block_1_fc/kernel"):
        assign_weights(model, lacking)
    with pytest.raises(UserError, match="no weights named block_0_qvk/kernel"):
        assign_weights(model, {**weights, "block_0_qvk/kernel": np.zeros(3)})
    transposed = {**weights, "block_0_fc/kernel": weights["block_0_fc/kernel"].T}
    with pytest.raises(UserError, match=r"Expected \(24, 96\)\. Received \(96, 24\)"):
        assign_weights(model, {name: array * 2 for name, array in transposed.items()})
    for name, array in named_weights(model).items():
        np.testing.assert_array_equal(array, before[name])  # nothing was assigned


def test_a_wrapped_model_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    from tf_gptopt._keras import tfmot

    model = tiny_model()

    def wrap(layer: keras.layers.Layer) -> keras.layers.Layer:
        if layer.name == "block_0_qkv":
            return tfmot.sparsity.keras.prune_low_magnitude(layer)
        return layer

    wrapped = wrap_graph(keras.models.clone_model(model, clone_function=wrap), model.config)
    with pytest.raises(UserError, match="strip_pruning or strip_quantization"):
        save_model(wrapped, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Our folders


@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_save_and_load(tiny_model: Build, tmp_path: Path, shape: dict[str, Any]) -> None:
    model = tiny_model(**shape)
    save_model(model, tmp_path / "deep" / "er", extra={"metrics": {"loss": 1.5}})
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    for load in (load_model, load_checkpoint, GPTModel.from_preset):
        loaded = load(tmp_path / "deep" / "er")
        assert loaded.config == model.config
        assert loaded.tokenizer is None
        np.testing.assert_array_equal(loaded(IDS), model(IDS))
    config = json.loads((tmp_path / "deep" / "er" / "config.json").read_text())
    assert config["format"] == "tf_gptopt"
    assert config["metrics"] == {"loss": 1.5}


def test_activation_ranges_travel_with_the_model(tiny_model: Build, tmp_path: Path) -> None:
    model = tiny_model()
    save_model(model, tmp_path)
    assert "activation_ranges" not in json.loads((tmp_path / "config.json").read_text())
    assert load_model(tmp_path).activation_ranges is None
    before = len(model.weights), set(model._trackable_children())
    ranges = {"block_0_qkv/input": (-1.5, np.float32(0.1)), "token_logits/output": (0.0, 3.0)}
    model.activation_ranges = ranges
    after = len(model.weights), set(model._trackable_children())
    assert after == before  # a checkpoint of the training is as it was
    save_model(model, tmp_path)
    assert load_model(tmp_path).activation_ranges == ranges
    config = json.loads((tmp_path / "config.json").read_text())
    for damaged in ([1], {"block_0_qkv/input": 3}, {"block_0_qkv/input": ["low", "high"]}):
        (tmp_path / "config.json").write_text(json.dumps({**config, "activation_ranges": damaged}))
        with pytest.raises(UserError, match="'activation_ranges' must map names"):
            load_model(tmp_path)


def test_extra_cannot_replace_the_format(tiny_model: Build, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'gpt'"):
        save_model(tiny_model(), tmp_path, extra={"gpt": {}})


def test_the_tokenizer_travels_with_the_model(
    tiny_model: Build, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    model = tiny_model(vocab_size=300)
    model.tokenizer = tiny_tokenizer
    save_model(model, tmp_path / "a")
    loaded = load_model(tmp_path / "a")
    text = "def test(self):  # ünïcödé 文字\n"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    assert loaded.tokenizer.encode(text).tolist() == tiny_tokenizer.encode(text).tolist()
    assert loaded.tokenizer.fingerprint == tiny_tokenizer.fingerprint
    assert loaded.tokenizer.eot_id == 0
    assert loaded.tokenizer.encode("a<|endoftext|>b")[1] == 0
    save_model(loaded, tmp_path / "b")
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (
        tmp_path / "b/tokenizer.json"
    ).read_bytes()

    with pytest.raises(UserError, match="do not belong together"):
        save_model(tiny_model(), tmp_path / "d", tokenizer=tiny_tokenizer)
    # another tokenizer of the same size would give nonsense without an error
    file = tmp_path / "a" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"~a"', 1))
    with pytest.raises(UserError, match="not the tokenizer that the model was saved with"):
        load_model(tmp_path / "a")


@pytest.fixture
def saved(tiny_model: Build, tmp_path: Path) -> Path:
    save_model(tiny_model(), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("keep", [0, 5, 100, 5_000, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged.* again"):
        load_model(saved)


def test_not_a_checkpoint(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist\. A checkpoint is a folder"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        load_checkpoint(saved / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors does not exist"):
        load_model(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2 .* Upgrade"),
        ({"format": "other"}, "not a tf_gptopt checkpoint"),
        ({"gpt": None}, "lacks the model's shape"),
        ({"gpt": {"vocab_size": 61}}, "'gpt' is incomplete"),
        ({"gpt": {"vocab_sise": 61}}, "Did you mean 'vocab_size'"),
    ],
)
def test_a_config_that_cannot_be(saved: Path, change: dict[str, Any], message: str) -> None:
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe"])
def test_a_config_that_is_no_json_object(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text, "latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        load_checkpoint(saved)


def test_weights_of_another_shape(saved: Path, tiny_model: Build, tmp_path: Path) -> None:
    save_model(tiny_model(num_layers=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", saved)
    with pytest.raises(UserError, match="saved: 12 of 28 weights are missing"):
        load_model(saved)


def test_a_folder_that_cannot_be_written(saved: Path, tiny_model: Build) -> None:
    with pytest.raises(UserError, match="Cannot write the model to"):
        save_model(tiny_model(), saved / "config.json" / "below")


def test_a_full_disk_leaves_the_old_model(saved: Path, run_child: Callable[..., str]) -> None:
    code = f"""
        import resource
        from tf_gptopt._errors import UserError
        from tf_gptopt.models.checkpoints import load_model, save_model
        model = load_model({str(saved)!r})
        model.get_layer("final_norm").gamma.assign([0.0] * 24)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as a full disk would
        try:
            save_model(model, {str(saved)!r})
        except UserError as error:
            print(error)
    """
    assert "Cannot write the model" in run_child(code)
    assert (load_model(saved).get_layer("final_norm").gamma.numpy() != 0).all()
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_kill_while_saving(saved: Path, tmp_path: Path, run_child: Callable[..., str]) -> None:
    """Killed before the 1st, then before the 2nd rename; over an old model, then into no folder."""
    code = f"""
        import os, shutil, signal
        from tf_gptopt.models.checkpoints import load_model, save_model

        def die_at(call):
            def counted(rename):
                def counting(*args):
                    nonlocal call
                    call -= 1
                    if call == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    rename(*args)
                return counting
            os.rename, os.replace = counted(os.rename), counted(os.replace)

        model = load_model({str(saved)!r})
        model.get_layer("final_norm").gamma.assign([5.0] * 24)
        for call in (1, 2):
            shutil.copytree({str(saved)!r}, {str(tmp_path)!r} + f"/old{{call}}")
            for folder in ("old", "new"):
                if os.fork() == 0:
                    die_at(call)
                    save_model(model, {str(tmp_path)!r} + f"/{{folder}}{{call}}")
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
    """
    run_child(code)
    before = named_weights(load_model(saved))
    for name, array in named_weights(load_model(tmp_path / "old1")).items():
        np.testing.assert_array_equal(array, before[name])
    for folder in ("old2", "new2"):  # the first rename decides, and the reader does the others
        assert (load_model(tmp_path / folder).get_layer("final_norm").gamma.numpy() == 5.0).all()
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == [
            "config.json",
            "model.safetensors",
        ]
    with pytest.raises(UserError, match=r"no config\.json: .*cut short"):
        load_model(tmp_path / "new1")


# Hugging Face


def gpt2(seed: int = 0, **options: Any) -> Any:
    """A random `transformers` model, no parameter at its initial 0 or 1."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    shape = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def torch_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_embd": 7, "n_head": 1, "n_layer": 1, "vocab_size": 5, "n_positions": 9},
        {"n_embd": 30, "n_head": 10, "n_layer": 3, "n_inner": 17, "vocab_size": 101},
        {"n_embd": 33, "n_head": 3, "n_inner": 1, "layer_norm_epsilon": 1e-3},
        {"n_embd": 16, "n_head": 16, "tie_word_embeddings": False},
        {"activation_function": "gelu_pytorch_tanh", "n_layer": 5, "n_positions": 64},
        {"activation_function": "gelu", "scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
        {"activation_function": "relu", "scale_attn_weights": False},
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_transformers(tmp_path: Path, options: dict[str, Any], seed: int) -> None:
    theirs = gpt2(seed, **options)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    ours = load_checkpoint(tmp_path / "theirs")
    rng = np.random.default_rng(seed)
    time = ours.config.max_sequence_length
    ids = rng.integers(0, ours.config.vocab_size, (3, time))
    expected = torch_logits(theirs, ids)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(ours(ids), expected, atol=1e-4)

    # and the way back
    save_checkpoint(ours, tmp_path / "back", format="huggingface")
    back = type(theirs).from_pretrained(tmp_path / "back").eval()
    np.testing.assert_allclose(torch_logits(back, ids), expected, atol=1e-4)


def test_other_layouts_of_the_same_weights(tmp_path: Path) -> None:
    theirs = gpt2()
    expected = torch_logits(theirs, IDS)

    theirs.transformer.save_pretrained(tmp_path / "bare", safe_serialization=True)
    names = safetensors.numpy.load_file(tmp_path / "bare" / "model.safetensors").keys()
    assert not any(name.startswith("transformer.") for name in names)
    np.testing.assert_allclose(load_checkpoint(tmp_path / "bare")(IDS), expected, atol=1e-4)

    theirs.save_pretrained(tmp_path / "shards", safe_serialization=True, max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    np.testing.assert_allclose(load_checkpoint(tmp_path / "shards")(IDS), expected, atol=1e-4)
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"model-0000.* does not exist"):
        load_checkpoint(tmp_path / "shards")

    # old files carry the causal mask, and the head beside the table that it is
    file = tmp_path / "bare" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), bool))
    tensors["lm_head.weight"] = tensors["wte.weight"].copy()
    safetensors.numpy.save_file(tensors, file)
    model = load_checkpoint(tmp_path / "bare")
    assert model.config.tie_embeddings
    np.testing.assert_allclose(model(IDS), expected, atol=1e-4)
    tensors["lm_head.weight"] += 1.0
    safetensors.numpy.save_file(tensors, file)
    assert not load_checkpoint(tmp_path / "bare").config.tie_embeddings


def test_bfloat16_weights(tmp_path: Path) -> None:
    import torch

    theirs = gpt2().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    ours = load_checkpoint(tmp_path)
    np.testing.assert_allclose(ours(IDS), torch_logits(theirs.float(), IDS), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"activation_function": "silu"}, "gelu_new.*'silu'"),
        ({"activation_function": ["gelu"]}, "must be one of"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantized \(.*fp8",
        ),
        ({"attn_pdrop": "0.1"}, "attn_pdrop must be a number"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"n_head": None}, "lacks n_head"),
        ({"n_head": 5}, "n_head must divide n_embd"),
        ({"n_layer": 3}, "12 of 40 weights are missing"),
        ({"n_layer": 1}, "no weights named block_1"),
        ({"n_inner": 5}, "wrong shape"),
    ],
)
def test_unsupported_options(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    gpt2().save_pretrained(tmp_path, safe_serialization=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path)


def test_options_are_judged_before_a_tensor_is_read(tmp_path: Path) -> None:
    for change, message in [
        ({"model_type": "llama"}, "Only model_type 'gpt2'"),
        ({"activation_function": "silu"}, "'silu'"),
        ({"n_head": 5}, "n_head must divide"),
    ]:
        shape = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
        (tmp_path / "config.json").write_text(json.dumps({**shape, **change}))
        with pytest.raises(UserError, match=message):  # and not that there are no weights
            load_checkpoint(tmp_path)


def test_sizes_under_their_other_names(tmp_path: Path) -> None:
    theirs = gpt2()
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for ours, other in [
        ("n_embd", "hidden_size"),
        ("n_layer", "num_hidden_layers"),
        ("n_head", "num_attention_heads"),
        ("n_positions", "max_position_embeddings"),
    ]:
        config[other] = config.pop(ours)
    (tmp_path / "config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(load_checkpoint(tmp_path)(IDS), torch_logits(theirs, IDS), atol=1e-4)


def test_each_dropout_is_read_written_and_may_be_another(tmp_path: Path) -> None:
    theirs = gpt2(resid_pdrop=0.1, attn_pdrop=0.0, embd_pdrop=0.3)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    model = load_checkpoint(tmp_path / "theirs")
    assert model.config.dropouts == (0.3, 0.0, 0.1)
    assert model.get_layer("embedding_dropout").rate == 0.3
    assert model.get_layer("block_0_attention").dropout == 0.0
    assert model.get_layer("block_1_mlp_dropout").rate == 0.1
    for format in ("huggingface", "tf_gptopt"):
        save_checkpoint(model, tmp_path / format, format=format)
        assert load_checkpoint(tmp_path / format).config == model.config
        plain = load_checkpoint(tmp_path / format, dropout=0.0)
        plain.recompute = True  # for which all three must be 0
        np.testing.assert_array_equal(plain(IDS), model(IDS))
        other = GPTModel.from_preset(str(tmp_path / format), dropout=0.2, attention_dropout=0.4)
        assert other.config.dropouts == (0.2, 0.4, 0.2)
    with pytest.raises(UserError, match=r"load_checkpoint\(folder, dropout=0\.0\)"):
        model.recompute = True
    with pytest.raises(UserError, match=r"shape cannot be overridden.*Received: num_layers"):
        load_checkpoint(tmp_path / "theirs", num_layers=1)
    with pytest.raises(UserError, match=r"attention_dropout must be in \[0, 1\)"):
        load_checkpoint(tmp_path / "theirs", attention_dropout=1.0)


def test_quantized_weights_and_adapters_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    gpt2().save_pretrained(tmp_path, safe_serialization=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        name = "transformer.h.0.attn.c_attn.weight"
        save_file({**tensors, name: tensors[name].to(kind)}, file)
        with pytest.raises(UserError, match=r"c_attn\.weight.*F8_E.*original checkpoint") as told:
            load_checkpoint(tmp_path)
        assert "damaged" not in str(told.value)
    file.rename(tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for _ in range(2):  # with a config.json, and without
        with pytest.raises(UserError, match=r"adapter \(LoRA\) for gpt2, .*merge_and_unload"):
            load_checkpoint(tmp_path)
        (tmp_path / "config.json").unlink(missing_ok=True)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path, safe_serialization=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle.*safe_serialization=True"):
        load_checkpoint(tmp_path)


def test_unequal_blocks_do_not_fit_the_hugging_face_format(
    tiny_model: Build, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="one num_heads"):
        save_checkpoint(tiny_model(num_heads=(1, 2), head_dim=6), tmp_path, "huggingface")
    with pytest.raises(UserError, match="num_heads x head_dim"):
        save_checkpoint(tiny_model(num_heads=2, head_dim=6), tmp_path, "huggingface")
    with pytest.raises(UserError, match="Did you mean 'huggingface'"):
        save_checkpoint(tiny_model(), tmp_path, "hugginface")
    assert list(tmp_path.iterdir()) == []


def test_golden_loss_of_a_real_checkpoint(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "gpt" / "chemts_gpt2_0.5m"
    model = load_checkpoint(folder)
    assert model.count_params() == 460_992
    atoms = list("CC(=O)Nc1ccc(O)cc1")  # its tokenizer takes atoms one by one
    tokenizer = model.tokenizer
    ids = [13, *(tokenizer.encode(atom)[0] for atom in atoms), 14]
    assert tokenizer.eot_id == 14
    assert tokenizer.encode("<BOS>") == [13]

    def golden_loss(model: GPTModel) -> float:
        logits = np.asarray(model(np.array([ids[:-1]])), np.float64)[0]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -log_probs[np.arange(len(ids) - 1), ids[1:]].mean()

    assert golden_loss(model) == pytest.approx(0.90415, abs=1e-5)
    save_model(model, tmp_path)  # in our own format, end of text included
    loaded = load_model(tmp_path)
    assert golden_loss(loaded) == golden_loss(model)
    assert loaded.tokenizer.eot_id == 14


# Damage


def test_a_flipped_bit_of_the_weights_is_noticed(saved: Path) -> None:
    file, rng = saved / "model.safetensors", np.random.default_rng(0)
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*rng.integers(8, header, 15), *rng.integers(header, len(data), 15)]
    before = named_weights(load_model(saved))
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        if place >= header:
            with pytest.raises(UserError, match="damaged"):
                load_model(saved)
            continue
        with contextlib.suppress(UserError):  # unless it is in a name that nobody reads
            for name, array in named_weights(load_model(saved)).items():
                np.testing.assert_array_equal(array, before[name])


def test_a_config_of_another_save_or_damaged_is_noticed(saved: Path, tiny_model: Build) -> None:
    config, weights = saved / "config.json", saved / "model.safetensors"
    good, text = weights.read_bytes(), config.read_text()
    for before, after in (("1e-05", "2e-05"), ('"dropout": 0.0', '"dropout": 0.1')):
        assert before in text
        config.write_text(text.replace(before, after))
        with pytest.raises(UserError, match=r"config\.json has been damaged or changed"):
            load_model(saved)
    config.write_text(text)
    save_model(tiny_model(seed=1), saved)
    weights.write_bytes(good)  # the weights of the older save
    with pytest.raises(UserError, match=r"other weights than config\.json was written with"):
        load_model(saved)
    values = json.loads(config.read_text())
    changed = {**values, "gpt": {**values["gpt"], "dropout": 0.5}}
    for key in ("sha256", "weights_sha256"):
        del changed[key]
    config.write_text(json.dumps(changed))  # a folder of an earlier version, or changed by hand
    assert load_model(saved).config.dropout == 0.5


def test_a_lost_tokenizer_is_not_replaced(
    tiny_model: Build, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    save_model(tiny_model(vocab_size=300), tmp_path / "m", tokenizer=tiny_tokenizer)
    (tmp_path / "m" / "tokenizer.json").unlink()
    assert (tmp_path / "m" / "vocab.json").exists()
    lost = r"saved with a tokenizer\.json, and it is not there\. Restore it"
    with pytest.raises(UserError, match=f"{lost}.*tokenizer_sha256"):
        load_model(tmp_path / "m")
    with pytest.raises(UserError, match=lost):
        Tokenizer.load(tmp_path / "m")


def test_values_of_a_foreign_config_that_cannot_be(
    tiny_model: Build, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    save_checkpoint(tiny_model(vocab_size=300), tmp_path, "huggingface", tiny_tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in (("layer_norm_epsilon", [1]), ("resid_pdrop", "x"), ("n_head", 2.0)):
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(UserError, match="must be"):
            load_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for value in (["x"], -1, 10**12, 299.0):  # no token: as if nothing had been said
        (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": value}))
        assert load_checkpoint(tmp_path).tokenizer.eot_token == "<|endoftext|>"


@pytest.mark.parametrize("kind", ["tf_gptopt", "huggingface"])
@pytest.mark.parametrize("size", [4000, 10**9, 10**30])
def test_sizes_are_held_against_the_weights_before_anything_is_built(
    tiny_model: Build, tmp_path: Path, kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tiny_model(), tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {
        "tf_gptopt": ["vocab_size", "num_layers", "max_sequence_length", "intermediate_dim"],
        "huggingface": ["vocab_size", "n_layer", "n_positions", "n_inner"],
    }
    monkeypatch.setattr(GPTModel, "from_gpt_config", None)  # nothing is
    for name in names[kind]:
        changed = {key: value for key, value in config.items() if key != "sha256"}
        if kind == "tf_gptopt":
            changed["gpt"] = {**config["gpt"], name: size}
        else:
            changed[name] = size
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"must be at most|missing|wrong shape"):
            load_checkpoint(tmp_path)
