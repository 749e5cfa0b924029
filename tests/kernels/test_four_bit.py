"""Experts' weights in 4 bits: values as published, the kernel gives the reference's bits, encoding is nearest."""

from statistics import NormalDist

import pytest
import torch

from expertmesh.kernels import packed as four_bit
from expertmesh.kernels.packed import FORMATS
from tests.kernels.compare import on_triton

SHAPE = 2, 3, 192


def empty(format, weight):
    held = four_bit.Packed.like(weight, format, False, four_bit.DecodeBuffer())
    return held.codes, held.scales


def packed(format, shape=SHAPE, device="cpu"):
    """Random codes and scales, among them the smallest and largest that there are."""
    codes, scales = empty(format, torch.empty(shape, device=device))
    codes.copy_(torch.randint(0, 256, codes.shape))
    if format == "mxfp4":
        scales.copy_(torch.randint(0, 255, scales.shape))
        scales.view(-1)[:4] = torch.tensor([0, 1, 254, 255])
    else:
        scales.copy_(torch.rand(scales.shape))
        scales.view(-1)[:3] = torch.tensor([0.0, 1.5e-38, 3e38])
    return codes, scales


def by_definition(codes, scales, format, dtype):
    """The formats as they are defined, one number at a time."""
    values, size = FORMATS[format].values, FORMATS[format].size
    out = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1])
    for place in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        *row, column = place
        code = (int(codes[*row, column // 2]) >> 4 * (column % 2)) & 15
        scale = scales[*row, column // size]
        if format == "mxfp4":
            sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
            number = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            number = torch.tensor(-number if sign else number, dtype=torch.float64)
            out[*place] = number * 2.0 ** (int(scale) - 127) if scale < 255 else torch.nan
        else:
            out[*place] = torch.tensor(values[code]) * scale.float()
    return out.to(dtype)


def same_bits(got, expected):
    return got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_values_are_those_of_qlora_and_ocp():
    # QLoRA's create_normal_map: quantiles of equal mass on either side of zero, divided by the largest
    normal, offset = NormalDist(), 0.9677083
    above = [normal.inv_cdf(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(offset + (0.5 - offset) * i / 7) for i in range(7)]
    expected = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
    torch.testing.assert_close(torch.tensor(FORMATS["nf4"].values), expected, rtol=0, atol=1e-6)
    floats = {(1 + m / 2) * 2.0 ** (e - 1) if e else m / 2 for e in range(4) for m in range(2)}
    assert [*FORMATS["mxfp4"].values[:8]] == sorted(floats)
    assert [*FORMATS["mxfp4"].values[8:]] == [-value for value in sorted(floats)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_kernel_and_the_reference_give_the_bits_of_the_definition(format, dtype):
    """The kernel in float32: the interpreter has its own bfloat16. On a GPU both: tests/gpu/test_four_bit.py."""
    codes, scales = packed(format)
    expected = by_definition(codes, scales, format, dtype)
    numbers = ~expected.isnan()  # which have many bits
    got = four_bit.decode_reference(codes, scales, format, torch.empty(SHAPE, dtype=dtype))
    assert torch.equal(got.isnan(), ~numbers) and same_bits(got[numbers], expected[numbers])
    if dtype == torch.float32:
        with on_triton():
            got = four_bit.decode(codes, scales, format, torch.empty(SHAPE))
        assert torch.equal(got.isnan(), ~numbers) and same_bits(got[numbers], expected[numbers])


def test_more_words_than_a_program_decodes():
    codes, scales = packed("nf4", (1, 200, 64))
    with on_triton():
        got = four_bit.decode(codes, scales, "nf4", torch.empty(1, 200, 64))
    assert same_bits(got, four_bit.decode_reference(codes, scales, "nf4", torch.empty(1, 200, 64)))


def test_mxfp4_is_what_transformers_makes_of_gpt_oss():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    codes, scales = packed("mxfp4")
    scales.clamp_(max=250)  # behind that Transformers overflows within its table
    theirs = convert_moe_packed_tensors(codes.unflatten(-1, (-1, 16)), scales).transpose(1, 2)
    got = four_bit.decode_reference(codes, scales, "mxfp4", torch.empty(SHAPE, dtype=torch.bfloat16))
    assert same_bits(got, theirs.contiguous())


@pytest.mark.parametrize("format", FORMATS)
def test_a_code_is_the_nearest_and_what_was_decoded_is_encoded_the_same(format):
    weight = torch.randn(SHAPE) * torch.logspace(-3, 3, 3)[:, None]
    weight[0, 0, :64] = 0
    codes, scales = empty(format, weight)
    four_bit.encode(weight, format, codes, scales)
    got = four_bit.decode_reference(codes, scales, format, torch.empty(SHAPE))
    assert not got[0, 0, :64].any()
    values = torch.tensor(FORMATS[format].values)
    factor = four_bit._scale_factors(scales).repeat_interleave(FORMATS[format].size, -1)
    distance = (weight[..., None] - values * factor[..., None]).abs().amin(-1)
    torch.testing.assert_close((weight - got).abs(), distance, rtol=1e-5, atol=1e-7)
    again = empty(format, weight)
    four_bit.encode(got, format, *again)
    torch.testing.assert_close(four_bit.decode_reference(*again, format, torch.empty(SHAPE)), got, rtol=0, atol=0)


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="rows of 96 weights cannot be packed in nf4, which takes blocks of 64"):
        empty("nf4", torch.empty(1, 1, 96))
