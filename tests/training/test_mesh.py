"""Meshes as they are written, and weights as they are cut and joined."""

import numpy as np
import pytest

from tf_gptopt._errors import UserError
from tf_gptopt.models.config import GPTConfig
from tf_gptopt.training.config import TrainConfig
from tf_gptopt.training.parallel.mesh import Mesh
from tf_gptopt.training.parallel.sharding import check_columns, join_weight, sizes, split_weight

CONFIG = GPTConfig(
    11, 12, 2, num_heads=(3, 5), head_dim=4, intermediate_dim=(9, 7), tie_embeddings=False
)


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("batch=2,model=3", Mesh(2, 3)),
        ("model=3, batch=2", Mesh(2, 3)),
        ("model=4", Mesh(1, 4)),
        ("batch=8", Mesh(8, 1)),
    ],
)
def test_parse(text, mesh):
    assert Mesh.parse(text) == mesh
    assert Mesh.parse(str(mesh)) == mesh
    assert mesh.size == mesh.batch * mesh.model


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("modle=2", "Unknown mesh axis 'modle'. Did you mean 'model'?"),
        ("2x2", "written as axis=size, such as batch=2,model=2. Received: '2x2'"),
        ("batch=two", "written as axis=size"),
        ("batch=0", "positive size. Received: batch=0"),
        ("batch=2,batch=2", "given twice"),
        ("", "written as axis=size"),
    ],
)
def test_what_cannot_be_read(text, complaint):
    with pytest.raises(UserError) as error:
        Mesh.parse(text)
    assert complaint in str(error.value)
    with pytest.raises(UserError):
        TrainConfig(mesh=text)


def test_the_batch_is_a_multiple_of_the_rows():
    assert TrainConfig(batch_size=6, mesh="batch=3,model=5").mesh == "batch=3,model=5"
    with pytest.raises(UserError, match=r"3 rows .*batch_size=8. Take a multiple of 3"):
        TrainConfig(batch_size=8, mesh="batch=3")


def test_too_few_devices():
    import tensorflow as tf

    tf.constant(0)  # TensorFlow runs: it is too late to divide the CPU
    assert Mesh(1, 1).devices() == [["/device:CPU:0"]]
    with pytest.raises(UserError) as error:
        Mesh(32, 2).devices()
    message = str(error.value)
    assert "needs 64 devices, and TensorFlow has 1 CPU device" in message
    assert "Mesh.parse('batch=32,model=2').devices() at the very start" in message


def test_as_many_columns_as_heads_at_the_most():
    check_columns(CONFIG, 3)
    with pytest.raises(UserError, match=r"attention heads .* a block has 3. Take model=3 or less"):
        check_columns(CONFIG, 4)


def test_shares_are_nearly_equal():
    assert sizes(50257, 4) == [12565, 12564, 12564, 12564]
    assert sizes(6, 3) == [2, 2, 2]


def test_qkv_is_cut_by_head():
    q, k, v = (np.full((12, 3, 4), value) + np.arange(3)[:, None] / 10 for value in (1, 2, 3))
    kernel = np.concatenate([part.reshape(12, 12) for part in (q, k, v)], axis=1)
    first, second = split_weight("block_0_qkv/kernel", kernel, CONFIG, 2)
    assert first.shape == (12, 3 * 2 * 4)
    assert second.shape == (12, 3 * 1 * 4)
    np.testing.assert_array_equal(second[0, ::4], [1.2, 2.2, 3.2])  # head 2 of q, of k and of v
    np.testing.assert_array_equal(first[0, ::4], [1.0, 1.1, 2.0, 2.1, 3.0, 3.1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_join_undoes_split(count):
    from tf_gptopt.models.checkpoints import weight_shapes

    rng = np.random.default_rng(0)
    cut = 0
    for name, shape in weight_shapes(CONFIG).items():
        weight = rng.normal(size=shape)
        pieces = split_weight(name, weight, CONFIG, count)
        assert len(pieces) in (1, count)
        assert sum(piece.size for piece in pieces) == weight.size
        cut += len(pieces) == count
        np.testing.assert_array_equal(join_weight(name, pieces, CONFIG), weight)
    assert count == 1 or cut == 2 + 2 * 6  # tables; qkv, its bias, proj, fc, its bias, out
