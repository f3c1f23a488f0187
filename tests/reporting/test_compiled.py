"""What is said of optimized programs, on texts as XLA for GPUs has them, written by hand."""

import pytest

from fp4jax.reporting.compiled import check

FORMATS = ("NVFP4", "NVFP4")
SCOPE = "jit(f)/fp4jax:averis/{}quantized_product/NVFP4:4*NVFP4:4"
# A loop's kernel in a fusion that cuts its codes and scales out of stacks.
IN_A_FUSION = f"""HloModule m

%cut (c0: f32[1], c1: u8[16,16], c2: u8[16,2], c3: u8[4,16,32], c4: u8[4,2,32], c5: s32[]) -> bf16[16,32] {{
  %c0 = f32[1]{{0}} parameter(0)
  %c1 = u8[16,16]{{1,0}} parameter(1)
  %c2 = u8[16,2]{{1,0}} parameter(2)
  %c3 = u8[4,16,32]{{2,1,0}} parameter(3)
  %c4 = u8[4,2,32]{{2,1,0}} parameter(4)
  %c5 = s32[] parameter(5)
  %zero = s32[] constant(0)
  %codes = u8[1,16,32]{{2,1,0}} dynamic-slice(%c3, %c5, %zero, %zero), dynamic_slice_sizes={{1,16,32}}
  %scales = u8[1,2,32]{{2,1,0}} dynamic-slice(%c4, %c5, %zero, %zero), dynamic_slice_sizes={{1,2,32}}
  ROOT %kernel = bf16[16,32]{{1,0}} custom-call(%c0, %c1, %c2, %codes, %scales), custom_call_target="mosaic_gpu_v2", metadata={{op_name="{SCOPE.format("wgrad/")}/dequant_matmul"}}
}}

ENTRY %main (a: f32[1], x: u8[16,16], s: u8[16,2], w: u8[4,16,32], t: u8[4,2,32], i: s32[]) -> bf16[16,32] {{
  %a = f32[1]{{0}} parameter(0)
  %x = u8[16,16]{{1,0}} parameter(1)
  %s = u8[16,2]{{1,0}} parameter(2)
  %w = u8[4,16,32]{{2,1,0}} parameter(3)
  %t = u8[4,2,32]{{2,1,0}} parameter(4)
  %i = s32[] parameter(5)
  ROOT %fused = bf16[16,32]{{1,0}} fusion(%a, %x, %s, %w, %t, %i), kind=kCustom, calls=%cut
}}
"""  # noqa: E501


def test_a_kernel_in_a_fusion_is_one_product_of_codes():
    found = check(IN_A_FUSION, "gpu")
    assert (found.products, found.operands, found.coded, found.folded) == (1, 2, 2, ())
    assert found.execution == {("averis", "wgrad", FORMATS): ("fused",)}
    assert found.corrections == {}


ONE_PRODUCT = """HloModule m
ENTRY %main (a: f4e2m1fn[1,32], b: f4e2m1fn[32,32], s: f8e4m3fn[1,2], t: f8e4m3fn[32,2]) -> f32[1,32] {
  %a = f4e2m1fn[1,32]{1,0} parameter(0)
  %b = f4e2m1fn[32,32]{1,0} parameter(1)
  %s = f8e4m3fn[1,2]{1,0} parameter(2)
  %t = f8e4m3fn[32,2]{1,0} parameter(3)
  ROOT %row = f32[1,32]{1,0} CALL, metadata={op_name="SCOPE/dot"}
}
"""


@pytest.mark.parametrize(
    ("call", "way"),
    [
        ('custom-call(%a, %b, %s, %t), custom_call_target="__cudnn$blockScaledDot"', "native (__cudnn$blockScaledDot)"),
        ("dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={1}", "emulated in f4e2m1fn"),
    ],
)
def test_products_and_corrections_are_told_apart(call, way):
    text = ONE_PRODUCT.replace("CALL", call)
    product, correction = (
        check(text.replace("SCOPE", SCOPE.format(of)), "gpu") for of in ("fprop/", "fprop/correction/")
    )
    assert product.execution == {("averis", "fprop", FORMATS): (way,)} and product.corrections == {}
    assert correction.execution == {} and correction.corrections == {("averis", FORMATS): (way,)}
    for found in (product, correction):
        assert (found.products, found.operands, found.coded) == (1, 2, 2)
