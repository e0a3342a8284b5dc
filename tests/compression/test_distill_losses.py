"""Every loss of distillation, and its gradient, against PyTorch in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_gptopt._errors import UserError
from tf_gptopt.compression.distillation.config import DistillConfig
from tf_gptopt.compression.distillation.features import (
    attention_maps_loss,
    hidden_states_loss,
    relations_loss,
)
from tf_gptopt.compression.distillation.linear_soft_labels import linear_soft_labels
from tf_gptopt.compression.distillation.losses import (
    AttentionMaps,
    HiddenStates,
    Relations,
    SoftLabels,
    layer_pairs,
)
from tf_gptopt.compression.distillation.soft_labels import Logits, TopK, distillation_loss
from tf_gptopt.models.linear_cross_entropy import Head

RNG = np.random.default_rng(0)
UPSTREAM = np.array([1.0, 2.0, 3.0, 4.0, 5.0], np.float32)  # another weight for every token


def normal(*shape, scale=2.0):
    return RNG.normal(0, scale, shape).astype(np.float32)


def divergence(log_p, log_q, kind, beta):
    """As the definitions read, over the last axis."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return (p * (log_p - log_q)).sum(-1)
    if kind == "reverse":
        return (q * (log_q - log_p)).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (log_p - m.log()) + (1 - beta) * q * (log_q - m.log())).sum(-1)


def theirs(function, student):
    """Losses and their gradient, weighted by UPSTREAM, in float64."""
    student = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    losses = function(student)
    (losses * torch.tensor(UPSTREAM)).sum().backward()
    return losses.detach().numpy(), student.grad.numpy()


def ours(function, student):
    variable = tf.Variable(student)
    with tf.GradientTape() as tape:
        losses = function(variable)
        total = tf.reduce_sum(losses * UPSTREAM)
    return losses.numpy(), tape.gradient(total, variable).numpy()


def check(mine, oracle, student, rtol=1e-4, atol=1e-5):
    for found, expected in zip(ours(mine, student), theirs(oracle, student), strict=True):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (3.0, 0.2)])
def test_soft_labels(kind, temperature, beta):
    teacher = normal(2, 5, 11)

    def oracle(student):
        log_p, log_q = (
            torch.log_softmax(x.double() / temperature, -1)
            for x in (torch.tensor(teacher), student)
        )
        return temperature**2 * divergence(log_p, log_q, kind, beta)

    check(
        lambda s: distillation_loss(tf.constant(teacher), s, temperature, kind, beta),
        oracle,
        normal(2, 5, 11),
    )


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_several_teachers_are_the_mean_of_their_probabilities(kind):
    teachers, shares = [normal(5, 7), normal(5, 7, scale=0.5)], (0.25, 0.75)

    def oracle(student):
        ps = [torch.softmax(torch.tensor(t).double() / 2.0, -1) for t in teachers]
        log_p = sum(share * p for share, p in zip(shares, ps, strict=True)).log()
        return 4.0 * divergence(log_p, torch.log_softmax(student / 2.0, -1), kind, 0.5)

    target = Logits(tuple(map(tf.constant, teachers)), shares)
    check(lambda s: distillation_loss(target, s, 2.0, kind), oracle, normal(5, 7))


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_top_k_is_the_divergence_over_k_tokens_and_any_other(kind):
    teacher, k = torch.tensor(normal(5, 13)).double(), 3
    p = torch.softmax(teacher / 2.0, -1)
    top, ids = p.topk(k)
    buckets = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)

    def oracle(student):
        q = torch.softmax(student / 2.0, -1).gather(-1, ids)
        own = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
        return 4.0 * divergence(buckets.log(), own.log(), kind, 0.5)

    target = TopK(
        tf.constant(ids.numpy(), tf.int32), tf.constant(buckets.log().numpy(), tf.float32)
    )
    check(lambda s: distillation_loss(target, s, 2.0, kind), oracle, normal(5, 13))


def test_top_k_of_all_tokens_but_the_last_is_the_divergence_itself():
    teacher, student = normal(5, 6), normal(5, 6)
    log_p = tf.nn.log_softmax(teacher)
    ids = tf.repeat(tf.range(5)[None], 5, axis=0)
    for kind in ("forward", "reverse", "js"):
        np.testing.assert_allclose(
            distillation_loss(TopK(ids, log_p), student, 1.0, kind),
            distillation_loss(teacher, student, 1.0, kind),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("kind", ["forward", "top_k"])
@pytest.mark.parametrize("chunk", [1 << 24, 30, 1])
def test_chunks_from_hidden_states_are_the_plain_losses(kind, chunk):
    rows, table = tf.Variable(normal(2, 5, 4)), tf.Variable(normal(9, 4))
    heads = [Head(tf.constant(normal(2, 5, w)), tf.constant(normal(9, w)), True) for w in (4, 6)]
    logits = tuple(tf.matmul(h.rows, h.table, transpose_b=True) for h in heads)
    target, source, shares = Logits(logits, (0.3, 0.7)), heads, (0.3, 0.7)
    if kind == "top_k":
        top, ids = tf.math.top_k(tf.nn.softmax(logits[0] / 2.0), 3)
        top = tf.concat([top, 1 - tf.reduce_sum(top, -1, keepdims=True)], -1)
        target = source = TopK(ids, tf.math.log(top))
    labels = RNG.integers(0, 9, (2, 5)).astype(np.int32)
    labels[0, 2:4] = -1
    weights = (labels >= 0) * UPSTREAM
    soft = SoftLabels(2.0)

    with tf.GradientTape() as tape:
        student = tf.matmul(rows, table, transpose_b=True)
        softs = tf.reduce_sum(distillation_loss(target, student, 2.0) * weights)
        hards = tf.nn.sparse_softmax_cross_entropy_with_logits(np.maximum(labels, 0), student)
        hards = tf.reduce_sum(hards * weights)
        expected = 0.3 * softs + 0.6 * hards
    gradients = tape.gradient(expected, [rows, table])

    @tf.function
    def chunked():
        with tf.GradientTape() as tape:
            head = Head(tf.convert_to_tensor(rows), tf.convert_to_tensor(table), True)
            arguments = tf.constant(labels), tf.constant(weights), soft, 0.3, 0.6, shares, chunk
            losses = linear_soft_labels(head, source, *arguments)
            doubled = 2.0 * losses[0]
        return losses, tape.gradient(doubled, [rows, table])

    losses, found = chunked()
    np.testing.assert_allclose(losses, (expected, softs, hards), rtol=1e-5)
    for a, b in zip(found, gradients, strict=True):
        np.testing.assert_allclose(a, 2.0 * b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_hidden_states(normalize):
    teacher = normal(2, 5, 7)

    def oracle(student):
        other = torch.tensor(teacher).double()
        if normalize:
            return (F.normalize(student, dim=-1) - F.normalize(other, dim=-1)).square().sum(-1)
        return (student - other).square().mean(-1)

    check(lambda s: hidden_states_loss(s, tf.constant(teacher), normalize), oracle, normal(2, 5, 7))


def maps(qkv, heads):
    """softmax(q k^T / sqrt(d)) of torch's `(batch, time, 3 inner)`, causal."""
    q, k, _ = (split(x, heads) for x in qkv.chunk(3, -1))
    return causal(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def causal(scores):
    time = scores.shape[-1]
    ahead = torch.ones(time, time).triu(1).bool()
    return torch.softmax(scores.masked_fill(ahead, -torch.inf), -1)


def row_kl(p, q):
    return (p * ((p + 1e-300).log() - (q + 1e-300).log())).sum(-1)


@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize("heads", ["match", "average"])
def test_attention_maps(kind, heads):
    from tf_gptopt.models.layers import CausalSelfAttention

    teacher, others = normal(2, 5, 3 * 12), 2 if heads == "match" else 3

    def oracle(student):
        p, q = maps(torch.tensor(teacher).double(), others), maps(student, 2)
        if heads == "average":
            p, q = (x.mean(1, keepdim=True) for x in (p, q))
        if kind == "kl":
            return row_kl(p, q).mean(1)
        return ((p - q).square().sum(-1) / torch.arange(1, 6)).mean(1)

    def mine(student):
        parts = CausalSelfAttention(2).split_heads(student)
        others_parts = CausalSelfAttention(others).split_heads(tf.constant(teacher))
        return attention_maps_loss(parts, others_parts, kind, heads)

    check(mine, oracle, normal(2, 5, 3 * 8), rtol=1e-3)


def test_relations():
    teacher, heads = normal(2, 5, 3 * 12), 4

    def oracle(student):
        total = 0.0
        others = torch.tensor(teacher).double().chunk(3, -1)
        for a, b in zip(student.chunk(3, -1), others, strict=True):
            own, other = split(a, heads), split(b, heads)
            q, p = (causal(x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5) for x in (own, other))
            total = total + row_kl(p, q).mean(1)
        return total

    check(lambda s: relations_loss(s, tf.constant(teacher), heads), oracle, normal(2, 5, 3 * 8))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 48), st.integers(1, 48))
def test_a_uniform_map_ends_with_the_last_blocks_and_goes_up(student, teacher):
    pairs = layer_pairs("uniform", student, teacher)
    assert [s for s, _ in pairs] == list(range(student))
    blocks = [t for _, t in pairs]
    assert blocks == sorted(blocks)
    assert blocks[0] >= 0
    assert blocks[-1] == teacher - 1
    if teacher >= student:
        assert len(set(blocks)) == student
    assert layer_pairs("last", student, teacher) == ((student - 1, teacher - 1),)
    assert layer_pairs(pairs, student, teacher) == pairs


def test_uniform_of_half_the_blocks_is_every_second():
    assert layer_pairs("uniform", 3, 6) == ((0, 1), (1, 3), (2, 5))


def test_a_config_asks_for_every_loss():
    assert DistillConfig().losses() == (SoftLabels(),)
    config = DistillConfig(
        temperature=3.0,
        divergence="js",
        beta=0.3,
        soft_labels=0.5,
        hidden_states=2.0,
        hidden_layers=((0, 1),),
        hidden_normalize=True,
        attention_maps=3.0,
        attention_layers="last",
        attention_divergence="mse",
        attention_heads="average",
        relations=4.0,
        relation_layers="uniform",
        relation_heads=6,
    )
    assert config.losses() == (
        SoftLabels(3.0, "js", 0.3, 0.5),
        HiddenStates(((0, 1),), True, 2.0),
        AttentionMaps("last", "mse", "average", 3.0),
        Relations("uniform", 6, 4.0),
    )
    assert dataclasses.replace(config, soft_labels=0.0).losses() == config.losses()[1:]


def test_a_config_comes_from_yaml_and_options():
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillConfig, "distillation")
    options = ["--distillation.hidden_layers=[[0,1],[1,3]]", "--distillation.hidden_states=1"]
    config = parser.instantiate(parser.parse_args(options)).distillation
    assert config.losses()[1] == HiddenStates(((0, 1), (1, 3)))
    text = {"distillation": {"hidden_layers": "last", "hidden_states": 2, "relation_heads": 4}}
    config = parser.instantiate(parser.parse_object(text)).distillation
    assert config.losses()[1] == HiddenStates("last", weight=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftLabels(divergence="revers"), "Did you mean 'reverse'"),
        (lambda: SoftLabels(beta=1.0), "Received: beta=1.0"),
        (lambda: SoftLabels(weight=0), "Received: weight=0"),
        (lambda: HiddenStates("unifrom"), "Did you mean 'uniform'"),
        (lambda: HiddenStates([(0, 1, 2)]), "pairs of block numbers"),
        (lambda: HiddenStates(3), "pairs of block numbers"),
        (lambda: AttentionMaps(divergence="js"), "Unknown divergence 'js'"),
        (lambda: AttentionMaps(heads="mean"), "Unknown heads 'mean'"),
        (lambda: Relations(heads=0), "Received: heads=0"),
        (lambda: layer_pairs([(0, 4)], 2, 4), r"Received: \(0, 4\), and the student has 2"),
        (lambda: DistillConfig(hidden_states=-1), "Received: hidden_states=-1"),
        (lambda: DistillConfig(hidden_layers="frist"), "Unknown layer_map 'frist'"),
        (lambda: DistillConfig(soft_labels=0), "every loss has weight 0"),
        (lambda: DistillConfig(top_k=0), "Received: top_k=0"),
        (lambda: DistillConfig(top_k=8, relations=1), "soft labels alone"),
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(UserError, match=message):
        make()
