import pytest
import torch

from hyperfunc.tiling import assemble, plain_kernel, tile, window_key


def test_units_are_row_major_output_tiles_first() -> None:
    tiling = tile({"w": plain_kernel((32, 48, 3, 3))})
    (layer,) = tiling.layers["3x3"]
    assert layer.grid == (2, 3)
    # Each basic kernel holds its own number everywhere.
    units = torch.arange(6.0)[:, None, None, None, None].expand(6, 16, 16, 3, 3)
    whole = assemble([layer], units)["w"]
    assert whole.shape == (32, 48, 3, 3)
    for row in range(2):
        for column in range(3):
            block = whole[16 * row : 16 * (row + 1), 16 * column : 16 * (column + 1)]
            assert (block == 3 * row + column).all()


def test_runs_of_equal_layers_and_others_keep_their_order() -> None:
    shapes = {"a": (4, 4, 3, 3), "b": (4, 4, 3, 3), "c": (8, 4, 3, 3), "d": (4, 4, 3, 3)}
    tiling = tile({name: plain_kernel(shape) for name, shape in shapes.items()}, unit=(4, 4))
    units = torch.arange(5.0)[:, None, None, None, None].expand(5, 4, 4, 3, 3)
    kernels = assemble(tiling.layers["3x3"], units)
    assert list(kernels) == list(shapes)
    assert [kernels[name].flatten()[0].item() for name in shapes] == [0, 1, 2, 4]
    assert kernels["c"][4:].unique().tolist() == [3]


def test_overhang_is_cropped() -> None:
    tiling = tile({"w": plain_kernel((20, 3, 5))}, unit=(16, 16))
    (layer,) = tiling.layers["5"]
    assert (layer.grid, layer.units, layer.fan_in) == ((2, 1), 2, 15)
    assert assemble([layer], torch.randn(2, 16, 16, 5))["w"].shape == (20, 3, 5)


def test_two_dimensional_windows_come_out_channels_last() -> None:
    """Cropped ones too."""
    shapes = (32, 32), (16, 16), (20, 16), (16, 20), (16, 20), (20, 20)
    tiling = tile({str(number): plain_kernel((*shape, 3, 3)) for number, shape in enumerate(shapes)})
    units = torch.randn(3, 3, sum(layer.units for layer in tiling.layers["3x3"]), 16, 16).permute(2, 3, 4, 0, 1)
    for kernel in assemble(tiling.layers["3x3"], units).values():
        assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_keys() -> None:
    assert [window_key(window) for window in ((3, 3), (1, 7), (5,), ())] == ["3x3", "1x7", "5", "matrix"]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"a generated tensor needs the shape \(out, in, \*window\), got \(16,\)"):
        plain_kernel((16,))
